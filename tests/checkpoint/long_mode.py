"""A guest of 64 bits that stands still: every register that a core file holds has its own value.

A multiboot kernel, for ``-kernel``.  It maps the first 2 MiB, and 2 MiB from 4 GiB on, where it
writes ``MARK``; then it loads the registers, says ``R`` on the serial port and halts for good.
"""

from __future__ import annotations

from vmferry.machines.listing import assemble

MARK = 0x1122334455667788
HIGH = 1 << 32
BASES = {"fs": 0x0000111122223333, "gs": 0xFFFF888899990000}
KERNEL_GS = 0x0000123456789ABC
GENERAL = {f"r{number}": 0x0123_4567_0000_0000 | number for number in range(8, 16)}

_ORIGIN = 0x7C00
_SIZE = 512
_MAGIC = 0x1BADB002
_FLAGS = 1 << 16

_LISTING = """
header:
    {MAGIC.d} {FLAGS.d} {CHECKSUM.d}
    {header.d} {ORIGIN.d} {END.d} 00 00 00 00 {run.d}
gdt:
    00 00 00 00 00 00 00 00
    00 00 00 00 00 9a 20 00     ; 08: code of 64 bits
    ff ff 00 00 00 92 cf 00     ; 10: data
gdtr:
    17 00 {gdt.d}
run:
    fa                          ; cli
    fc                          ; cld
    bc 00 70 00 00              ; mov esp, 0x7000
    bf 00 00 01 00              ; mov edi, 0x10000
    b9 00 10 00 00              ; mov ecx, 0x1000
    31 c0                       ; xor eax, eax
    f3 ab                       ; rep stosd
    c7 05 00 00 01 00 03 10 01 00   ; mov dword [0x10000], 0x11003
    c7 05 00 10 01 00 03 20 01 00   ; mov dword [0x11000], 0x12003
    c7 05 20 10 01 00 03 30 01 00   ; mov dword [0x11020], 0x13003  (4 GiB)
    c7 05 00 20 01 00 83 00 00 00   ; mov dword [0x12000], 0x83
    c7 05 00 30 01 00 83 00 00 00   ; mov dword [0x13000], 0x83
    c7 05 04 30 01 00 01 00 00 00   ; mov dword [0x13004], 1
    b8 00 00 01 00              ; mov eax, 0x10000
    0f 22 d8                    ; mov cr3, eax
    0f 20 e0                    ; mov eax, cr4
    83 c8 20                    ; or eax, 0x20          (PAE)
    0f 22 e0                    ; mov cr4, eax
    b9 80 00 00 c0              ; mov ecx, 0xc0000080
    0f 32                       ; rdmsr
    0d 00 01 00 00              ; or eax, 0x100         (LME)
    0f 30                       ; wrmsr
    0f 20 c0                    ; mov eax, cr0
    0d 01 00 00 80              ; or eax, 0x80000001    (PG, PE)
    0f 22 c0                    ; mov cr0, eax
    0f 01 15 {gdtr.d}           ; lgdt [gdtr]
    ea {long.d} 08 00           ; jmp 08:long
msr:                            ; ecx: which; rax: value
    48 89 c2                    ; mov rdx, rax
    48 c1 ea 20                 ; shr rdx, 32
    0f 30                       ; wrmsr
    c3                          ; ret
long:
    66 b8 10 00                 ; mov ax, 0x10
    8e d8                       ; mov ds, eax
    8e d0                       ; mov ss, eax
    b9 00 01 00 c0              ; mov ecx, 0xc0000100   (FS base)
    48 b8 {FS_LOW.d} {FS_HIGH.d}
    e8 {msr.R}
    b9 01 01 00 c0              ; mov ecx, 0xc0000101   (GS base)
    48 b8 {GS_LOW.d} {GS_HIGH.d}
    e8 {msr.R}
    b9 02 01 00 c0              ; mov ecx, 0xc0000102   (kernel GS base)
    48 b8 {KERNEL_LOW.d} {KERNEL_HIGH.d}
    e8 {msr.R}
    48 b8 {MARK_LOW.d} {MARK_HIGH.d}    ; mov rax, MARK
    48 bb 00 00 00 00 01 00 00 00       ; mov rbx, 4 GiB
    48 89 03                    ; mov [rbx], rax
    49 b8 08 00 00 00 67 45 23 01       ; mov r8, ...
    49 b9 09 00 00 00 67 45 23 01
    49 ba 0a 00 00 00 67 45 23 01
    49 bb 0b 00 00 00 67 45 23 01
    49 bc 0c 00 00 00 67 45 23 01
    49 bd 0d 00 00 00 67 45 23 01
    49 be 0e 00 00 00 67 45 23 01
    49 bf 0f 00 00 00 67 45 23 01
    be 01 02 03 04              ; mov esi, 0x04030201
    bd 05 06 07 08              ; mov ebp, 0x08070605
    66 ba f8 03                 ; mov dx, 0x3f8
    b0 52 ee                    ; 'R'
    b0 0a ee                    ; a new line
halt:
    f4                          ; hlt
    eb {halt.r}                 ; jmp halt
"""


def long_mode() -> bytes:
    """The image of the guest."""
    values = {"FS": BASES["fs"], "GS": BASES["gs"], "KERNEL": KERNEL_GS, "MARK": MARK}
    halves = {
        f"{name}_{half}": value >> shift & 0xFFFFFFFF
        for name, value in values.items()
        for half, shift in (("LOW", 0), ("HIGH", 32))
    }
    header = {"MAGIC": _MAGIC, "FLAGS": _FLAGS, "CHECKSUM": -(_MAGIC + _FLAGS)}
    place = {"ORIGIN": _ORIGIN, "END": _ORIGIN + _SIZE}
    code = assemble(_LISTING, origin=_ORIGIN, parameters=header | place | halves)
    return code.ljust(_SIZE, b"\0")
