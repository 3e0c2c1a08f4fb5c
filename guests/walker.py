"""The walker: a guest of 512 bytes that rewrites its memory, checks it, and says so.

One image serves three ways to start, and behaves the same afterwards:

* a boot sector: ``-drive file=IMAGE,format=raw`` or a floppy; it enters protected mode itself;
* a multiboot kernel: ``-kernel IMAGE``, on every x86 machine, ``microvm`` included;
* wrapped by :func:`firmware`, in place of a BIOS: ``-bios FIRMWARE``; nothing else is in memory.

Life of the guest: fill ``fill`` pages from ``start`` with pseudo-random words, then for ever walk
over ``pages`` pages from ``start``.  In the first pass it stamps every page; in each later pass it
verifies the stamp of every page, and stamps the first ``hot`` ones anew.  A stamp is::

    offset 0     magic 0x59524546
           4     index of the page in the walk
           8     number of the pass
          12     check: ((pass * 0x9e3779b1) ^ index) * 0x85ebca6b
        4092     check again, so that a page with a new head and an old tail shows

On the serial port (0x3f8) it prints lines, numbers as eight hex digits:

``R``                            every page is stamped once
``C pass``                       at the end of a pass, at most every 2**26 ticks of the TSC
``E page found expected``        page *page* was lost, stale or torn; the first words that differ

The pass counter lives in a register, the stamps in memory: a machine whose memory and CPU do not
belong to the same instant prints ``E``.
"""

from __future__ import annotations

from vmferry.machines.listing import assemble

PAGE = 4096
MAGIC = 0x59524546
PASS_FACTOR = 0x9E3779B1
CHECK_FACTOR = 0x85EBCA6B
SEED = 0x2545F491

ORIGIN = 0x7C00
# Data and stack live in pages without code: TCG takes a slow path for each write beside code.
_STACK = 0x7000
_STAMP = 0x5000
_LAST = 0x5010
_SECTOR = 512
_MULTIBOOT = 0x1BADB002
_MULTIBOOT_FLAGS = 1 << 16  # the header holds the addresses: no ELF needed

_LISTING = """
    eb {real.r}                 ; jmp real
    90 90                       ; (the header is aligned to 4)
header:
    {MULTIBOOT.d}               ; magic
    {FLAGS.d}                   ; flags
    {CHECKSUM.d}                ; checksum
    {header.d}                  ; address of the header
    {ORIGIN.d}                  ; load the file here
    {LOAD_END.d}                ; up to here
    00 00 00 00                 ; nothing to clear
    {run.d}                     ; entry, in 32 bits with flat segments
gdt:
    00 00 00 00 00 00 00 00     ; null
    ff ff 00 00 00 9a cf 00     ; 08: code, base 0, 4 GiB
    ff ff 00 00 00 92 cf 00     ; 10: data, base 0, 4 GiB
gdtr:
    17 00 {gdt.d}               ; limit and address

real:
    fa                          ; cli
    31 c0                       ; xor ax, ax
    8e d8                       ; mov ds, ax
    e4 92                       ; in al, 0x92
    0c 02                       ; or al, 2          (A20 on)
    24 fe                       ; and al, 0xfe      (no reset)
    e6 92                       ; out 0x92, al
    0f 01 16 {gdtr.w}           ; lgdt [gdtr]
    0f 20 c0                    ; mov eax, cr0
    0c 01                       ; or al, 1
    0f 22 c0                    ; mov cr0, eax
    ea {flat.w} 08 00           ; jmp 08:flat
flat:
    b8 10 00 00 00              ; mov eax, 0x10
    8e d8                       ; mov ds, eax
    8e c0                       ; mov es, eax
    8e d0                       ; mov ss, eax
run:
    fa                          ; cli
    fc                          ; cld
    bc {STACK.d}                ; mov esp, STACK
    bf {START.d}                ; mov edi, START
    b9 {FILL_WORDS.d}           ; mov ecx, FILL_WORDS
    b8 {SEED.d}                 ; mov eax, SEED
    e3 {walk.r}                 ; jecxz walk
fill:
    89 c2                       ; mov edx, eax
    c1 e2 0d                    ; shl edx, 13
    31 d0                       ; xor eax, edx
    89 c2                       ; mov edx, eax
    c1 ea 11                    ; shr edx, 17
    31 d0                       ; xor eax, edx
    89 c2                       ; mov edx, eax
    c1 e2 05                    ; shl edx, 5
    31 d0                       ; xor eax, edx
    ab                          ; stosd
    e2 {fill.r}                 ; loop fill
walk:
    31 ed                       ; xor ebp, ebp          ebp: passes finished
pass:
    31 db                       ; xor ebx, ebx          ebx: page
page:
    85 ed                       ; test ebp, ebp
    74 {stamp.r}                ; jz stamp
    89 e8                       ; mov eax, ebp
    81 fb {HOT.d}               ; cmp ebx, HOT
    72 {hot.r}                  ; jb hot
    31 c0                       ; xor eax, eax
    40                          ; inc eax               a cold page keeps the stamp of pass 1
hot:
    e8 {frame.R}                ; call frame
    f3 a7                       ; repe cmpsd
    8b 46 fc                    ; mov eax, [esi-4]
    8b 4f fc                    ; mov ecx, [edi-4]
    75 {bad.r}                  ; jne bad
    8b 8f ec 0f 00 00           ; mov ecx, [edi+4076]
    39 c8                       ; cmp eax, ecx
    74 {good.r}                 ; je good
bad:
    50                          ; push eax              expected
    51                          ; push ecx              found
    53                          ; push ebx              page
    b0 45                       ; mov al, 'E'
    e8 {put.R}                  ; call put
    58                          ; pop eax
    e8 {hex.R}                  ; call hex
    58                          ; pop eax
    e8 {hex.R}                  ; call hex
    58                          ; pop eax
    e8 {hex.R}                  ; call hex
    e8 {newline.R}              ; call newline
good:
    81 fb {HOT.d}               ; cmp ebx, HOT
    73 {stamped.r}              ; jae stamped
stamp:
    8d 45 01                    ; lea eax, [ebp+1]
    e8 {frame.R}                ; call frame
    f3 a5                       ; rep movsd
    89 87 ec 0f 00 00           ; mov [edi+4076], eax
stamped:
    0f 31                       ; rdtsc
    89 c6                       ; mov esi, eax
wait:
    0f 31                       ; rdtsc
    29 f0                       ; sub eax, esi
    3d {DELAY.d}                ; cmp eax, DELAY
    72 {wait.r}                 ; jb wait
    43                          ; inc ebx
    81 fb {PAGES.d}             ; cmp ebx, PAGES
    0f 82 {page.R}              ; jb page
    45                          ; inc ebp
    83 fd 01                    ; cmp ebp, 1
    75 {beat.r}                 ; jne beat
    b0 52                       ; mov al, 'R'
    e8 {put.R}                  ; call put
    e8 {newline.R}              ; call newline
beat:
    0f 31                       ; rdtsc
    0f ac d0 1a                 ; shrd eax, edx, 26
    39 05 {LAST.d}              ; cmp [LAST], eax   (the time of the last C, in 2**26 ticks)
    0f 84 {pass.R}              ; je pass
    a3 {LAST.d}                 ; mov [LAST], eax
    b0 43                       ; mov al, 'C'
    e8 {put.R}                  ; call put
    89 e8                       ; mov eax, ebp
    e8 {hex.R}                  ; call hex
    e8 {newline.R}              ; call newline
    e9 {pass.R}                 ; jmp pass

frame:                          ; stamp of page ebx in pass eax: esi to it, edi to the page, ecx 4
    be {STAMP.d}                ; mov esi, STAMP
    c7 06 {MAGIC.d}             ; mov dword [esi], MAGIC
    89 5e 04                    ; mov [esi+4], ebx
    89 46 08                    ; mov [esi+8], eax
    69 c0 {PASS_FACTOR.d}       ; imul eax, eax, PASS_FACTOR
    31 d8                       ; xor eax, ebx
    69 c0 {CHECK_FACTOR.d}      ; imul eax, eax, CHECK_FACTOR
    89 46 0c                    ; mov [esi+12], eax
    89 df                       ; mov edi, ebx
    c1 e7 0c                    ; shl edi, 12
    81 c7 {START.d}             ; add edi, START
    6a 04                       ; push 4
    59                          ; pop ecx
    c3                          ; ret
hex:                            ; a space and eax in eight digits
    50                          ; push eax
    b0 20                       ; mov al, ' '
    e8 {put.R}                  ; call put
    58                          ; pop eax
    6a 08                       ; push 8
    59                          ; pop ecx
digit:
    c1 c0 04                    ; rol eax, 4
    50                          ; push eax
    24 0f                       ; and al, 15
    3c 0a                       ; cmp al, 10
    1c 69                       ; sbb al, 0x69
    2f                          ; das
    e8 {put.R}                  ; call put
    58                          ; pop eax
    e2 {digit.r}                ; loop digit
    c3                          ; ret
newline:
    b0 0a                       ; mov al, 10
put:                            ; al to the serial port
    66 ba f8 03                 ; mov dx, 0x3f8
    ee                          ; out dx, al
    c3                          ; ret
"""

# At F000:0200 in a firmware whose first 512 bytes are the boot sector; entered by the reset vector.
_FIRMWARE = """
    fa                          ; cli
    fc                          ; cld
    8c c8                       ; mov ax, cs
    8e d8                       ; mov ds, ax
    31 c0                       ; xor ax, ax
    8e c0                       ; mov es, ax
    31 f6                       ; xor si, si
    bf {ORIGIN.w}               ; mov di, ORIGIN
    b9 00 01                    ; mov cx, 256
    f3 a5                       ; rep movsw
    ea {ORIGIN.w} 00 00         ; jmp 0:ORIGIN
"""
_RESET = bytes.fromhex("ea 0002 00f0")  # jmp F000:0200
_FIRMWARE_SIZE = 64 << 10


def walker(
    *,
    start: int = 1 << 20,
    pages: int,
    hot: int | None = None,
    fill: int = 0,
    delay: int = 0,
) -> bytes:
    """The image of a walker, 512 bytes.

    start: physical address of the first page, a multiple of 4096, at least 64 KiB.
    pages: how many pages it walks over.
    hot:   how many of them it rewrites in each pass (default: all of them).
    fill:  how many pages from *start* it first fills with words that do not compress.
    delay: ticks of the TSC to wait after each page, to set the rate at which memory gets dirty.
    """
    hot = pages if hot is None else hot
    top = start + max(pages, fill) * PAGE
    if start % PAGE or start < 1 << 16 or top > 3 << 30:
        raise ValueError(
            f"a walker lives in whole pages in 64 KiB to 3 GiB, not {start:#x}+{top:#x}"
        )
    if pages < 1 or not 0 <= hot <= pages or fill < 0 or not 0 <= delay < 1 << 31:
        raise ValueError(f"no such walk: {pages=} {hot=} {fill=} {delay=}")
    code = assemble(
        _LISTING,
        origin=ORIGIN,
        parameters={
            "MULTIBOOT": _MULTIBOOT,
            "FLAGS": _MULTIBOOT_FLAGS,
            "CHECKSUM": -(_MULTIBOOT + _MULTIBOOT_FLAGS),
            "ORIGIN": ORIGIN,
            "LOAD_END": ORIGIN + _SECTOR,
            "STACK": _STACK,
            "STAMP": _STAMP,
            "LAST": _LAST,
            "START": start,
            "PAGES": pages,
            "HOT": hot,
            "FILL_WORDS": fill * (PAGE // 4),
            "SEED": SEED,
            "DELAY": delay,
            "MAGIC": MAGIC,
            "PASS_FACTOR": PASS_FACTOR,
            "CHECK_FACTOR": CHECK_FACTOR,
        },
    )
    return code.ljust(_SECTOR - 2, b"\0") + b"\x55\xaa"


def firmware(image: bytes) -> bytes:
    """A BIOS of 64 KiB that does nothing but start *image*, a boot sector."""
    loader = assemble(_FIRMWARE, origin=_SECTOR, parameters={"ORIGIN": ORIGIN})
    return (image + loader).ljust(_FIRMWARE_SIZE - 16, b"\0") + _RESET.ljust(16, b"\0")
