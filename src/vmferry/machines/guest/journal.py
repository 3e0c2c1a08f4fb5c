"""The journal that the guest keeps on its disk: a record with each heartbeat.

A record is a sector of 64 words: MAGIC, its number, guest time, 60 words that follow from the
number, and the sum of all others.  Record *n* goes to sector *n* modulo the number of sectors.  The
next one is written only after this one was acknowledged and read back, and every eighth is made
durable: so a record that was acknowledged and is not there, or is there twice, shows.

The vCPU's block has the sector that is written at RECORD, the one that is read at READ, and the
ring of the disk's requests at RING (:mod:`vmferry.machines.devices.disk`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from .pages import MAGIC, PAGE_FACTOR, WORD_STEP

LISTING = """
journal:
    48 8b 93 {DISK.d}                   ; mov rdx, [rbx+DISK]
    48 85 d2                            ; test rdx, rdx
    0f 84 {written.R}                   ; jz written
    48 83 bb {HEAD.d} 00                ; cmp qword [rbx+HEAD], 0
    75 {known.r}                        ; jne known
    48 8d 83 {RING.d}                   ; lea rax, [rbx+RING]
    48 89 42 08                         ; mov [rdx+8], rax
    48 c7 42 10 08 00 00 00             ; mov qword [rdx+16], 8
known:
    4c 8b 9b {RECORDS.d}                ; mov r11, [rbx+RECORDS]
    48 8d bb {RECORD.d}                 ; lea rdi, [rbx+RECORD]
    48 b8 {MAGIC.q}                     ; mov rax, MAGIC
    49 89 c0                            ; mov r8, rax
    48 ab                               ; stosq
    4c 89 d8                            ; mov rax, r11
    49 01 c0                            ; add r8, rax
    48 ab                               ; stosq
    4c 89 f8                            ; mov rax, r15
    49 01 c0                            ; add r8, rax
    48 ab                               ; stosq
    48 b8 {PAGE_FACTOR.q}               ; mov rax, PAGE_FACTOR
    49 0f af c3                         ; imul rax, r11
    49 b9 {WORD_STEP.q}                 ; mov r9, WORD_STEP
    b9 3c 00 00 00                      ; mov ecx, 60
word:
    48 ab                               ; stosq
    49 01 c0                            ; add r8, rax
    4c 01 c8                            ; add rax, r9
    ff c9                               ; dec ecx
    0f 85 {word.R}                      ; jnz word
    4c 89 c0                            ; mov rax, r8
    48 ab                               ; stosq
    b8 01 00 00 00                      ; mov eax, 1
    48 8d b3 {RECORD.d}                 ; lea rsi, [rbx+RECORD]
    e8 {request.R}                      ; call request
    41 f6 c3 07                         ; test r11b, 7
    75 {reread.r}                       ; jnz reread
    b8 02 00 00 00                      ; mov eax, 2
    e8 {request.R}                      ; call request
reread:
    31 c0                               ; xor eax, eax
    48 8d b3 {READ.d}                   ; lea rsi, [rbx+READ]
    e8 {request.R}                      ; call request
    48 8d b3 {RECORD.d}                 ; lea rsi, [rbx+RECORD]
    48 8d bb {READ.d}                   ; lea rdi, [rbx+READ]
    b9 40 00 00 00                      ; mov ecx, 64
    f3 48 a7                            ; repe cmpsq
    75 {unlike.r}                       ; jne unlike
    49 ff c3                            ; inc r11
    4c 89 9b {RECORDS.d}                ; mov [rbx+RECORDS], r11
written:
    c3                                  ; ret
unlike:
    48 8b 46 f8                         ; mov rax, [rsi-8]
    48 89 83 {EXPECTED.d}               ; mov [rbx+EXPECTED], rax
    48 8b 47 f8                         ; mov rax, [rdi-8]
    48 89 83 {FOUND.d}                  ; mov [rbx+FOUND], rax
    4c 89 9b {PAGE.d}                   ; mov [rbx+PAGE], r11
    48 c7 83 {KIND.d} 07 00 00 00       ; mov qword [rbx+KIND], 7
    c3                                  ; ret
request:
    4c 8b 93 {HEAD.d}                   ; mov r10, [rbx+HEAD]
    44 89 d1                            ; mov ecx, r10d
    83 e1 07                            ; and ecx, 7
    c1 e1 05                            ; shl ecx, 5
    48 8d bc 0b {RING.d}                ; lea rdi, [rbx+rcx+RING]
    89 07                               ; mov [rdi], eax
    c7 47 04 00 00 00 00                ; mov dword [rdi+4], 0
    4c 89 d8                            ; mov rax, r11
    31 d2                               ; xor edx, edx
    48 f7 b3 {SLOTS.d}                  ; div qword [rbx+SLOTS]
    48 c1 e2 09                         ; shl rdx, 9
    48 89 57 08                         ; mov [rdi+8], rdx
    48 89 77 10                         ; mov [rdi+16], rsi
    48 c7 47 18 00 02 00 00             ; mov qword [rdi+24], 512
    49 ff c2                            ; inc r10
    4c 89 93 {HEAD.d}                   ; mov [rbx+HEAD], r10
    48 8b 93 {DISK.d}                   ; mov rdx, [rbx+DISK]
    4c 89 52 18                         ; mov [rdx+24], r10
pending:
    f3 90                               ; pause
    8b 47 04                            ; mov eax, [rdi+4]
    85 c0                               ; test eax, eax
    74 {pending.r}                      ; jz pending
    c3                                  ; ret
"""

SECTOR: Final = 512
_WORDS: Final = SECTOR // 8
_FIRST: Final = 3
"""The first word that follows from the number alone."""

_STEPS: Final = np.arange(_WORDS - _FIRST - 1, dtype=np.uint64) * np.uint64(WORD_STEP)


@dataclass(frozen=True, slots=True)
class Journal:
    """What a reader finds on the disk: the number of the last record, -1 for none, and faults."""

    last: int
    faults: tuple[str, ...]


def read_journal(data: bytes | memoryview) -> Journal:
    """Look at all sectors of a journal, as *data*.

    Every record up to the last one must be there, once and whole, as far as none later has its
    place.
    """
    sectors = np.frombuffer(data, "<u8").reshape(-1, _WORDS)
    count = len(sectors)
    written = np.asarray(sectors.any(axis=1))
    numbers = sectors[:, 1]
    expected = np.zeros_like(sectors)
    expected[:, 0], expected[:, 1], expected[:, 2] = MAGIC, numbers, sectors[:, 2]
    expected[:, _FIRST:-1] = numbers[:, None] * np.uint64(PAGE_FACTOR) + _STEPS
    expected[:, -1] = expected[:, :-1].sum(axis=1, dtype=np.uint64)
    whole = np.asarray((sectors == expected).all(axis=1))
    faults = [f"sector {n} holds no whole record" for n in np.flatnonzero(written & ~whole)]
    last = int(numbers[whole].max()) if whole.any() else -1
    for place in range(min(count, last + 1)):
        number = last - (last - place) % count
        if whole[place] and numbers[place] != number:
            faults.append(f"sector {place} holds record {numbers[place]}, not {number}")
        elif not written[place]:
            faults.append(f"record {number} is missing")
    faults += [f"sector {n} was written too soon" for n in np.flatnonzero(written[last + 1 :])]
    return Journal(last, tuple(faults))
