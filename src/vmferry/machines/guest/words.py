"""What the guest says: lines on the serial port, and the status on the debug-exit port.

``hex`` writes a space and rax in 16 digits to rdi; ``print`` ends the line and sends it.
"""

from __future__ import annotations

LISTING = """
now:
    48 8b 53 {TIMER.b}          ; mov rdx, [rbx+TIMER]
    48 8b 02                    ; mov rax, [rdx]
    c3                          ; ret
report:
    49 89 f8                    ; mov r8, rdi
    48 8d bb {LINE.d}           ; lea rdi, [rbx+LINE]
    c6 07 45                    ; mov byte [rdi], 'E'
    48 ff c7                    ; inc rdi
    49 8b 40 {INDEX.b}          ; mov rax, [r8+INDEX]
    e8 {hex.R}                  ; call hex
    49 8b 40 {KIND.b}           ; mov rax, [r8+KIND]
    e8 {hex.R}                  ; call hex
    49 8b 40 {PAGE.b}           ; mov rax, [r8+PAGE]
    e8 {hex.R}                  ; call hex
    49 8b 80 {EXPECTED.d}       ; mov rax, [r8+EXPECTED]
    e8 {hex.R}                  ; call hex
    49 8b 80 {FOUND.d}          ; mov rax, [r8+FOUND]
    e8 {hex.R}                  ; call hex
    e8 {print.R}                ; call print
    b0 01                       ; mov al, 1
    e6 f4                       ; out 0xf4, al
    48 8b 53 {TIMER.b}          ; mov rdx, [rbx+TIMER]
    48 c7 42 08 00 00 00 00     ; mov qword [rdx+8], 0
    e9 {never.R}                ; jmp never
beat:
    4c 89 bb {LAST_BEAT.d}      ; mov [rbx+LAST_BEAT], r15
    45 31 c0                    ; xor r8d, r8d
    45 31 c9                    ; xor r9d, r9d
    41 b2 48                    ; mov r10b, 'H'
    48 89 de                    ; mov rsi, rbx
    48 8b 4b {CPUS.b}           ; mov rcx, [rbx+CPUS]
count:
    48 8b 46 {HOT_STEPS.b}      ; mov rax, [rsi+HOT_STEPS]
    49 01 c0                    ; add r8, rax
    48 3b 46 {HOT_COUNT.b}      ; cmp rax, [rsi+HOT_COUNT]
    48 8b 46 {COLD_STEPS.b}     ; mov rax, [rsi+COLD_STEPS]
    72 {filling.r}              ; jb filling
    48 3b 46 {COLD_COUNT.b}     ; cmp rax, [rsi+COLD_COUNT]
    73 {filled.r}               ; jae filled
filling:
    41 b2 46                    ; mov r10b, 'F'
filled:
    49 01 c1                    ; add r9, rax
    48 81 c6 00 10 00 00        ; add rsi, 0x1000
    48 ff c9                    ; dec rcx
    75 {count.r}                ; jnz count
    48 8d bb {LINE.d}           ; lea rdi, [rbx+LINE]
    44 88 17                    ; mov [rdi], r10b
    48 ff c7                    ; inc rdi
    e6 70                       ; out 0x70, al
    e5 7c                       ; in eax, 0x7c
    48 c1 e0 20                 ; shl rax, 32
    48 89 c1                    ; mov rcx, rax
    e5 78                       ; in eax, 0x78
    48 09 c8                    ; or rax, rcx
    e8 {hex.R}                  ; call hex
    e5 74                       ; in eax, 0x74
    48 c1 e0 20                 ; shl rax, 32
    48 89 c1                    ; mov rcx, rax
    e5 70                       ; in eax, 0x70
    48 09 c8                    ; or rax, rcx
    e8 {hex.R}                  ; call hex
    4c 89 c0                    ; mov rax, r8
    e8 {hex.R}                  ; call hex
    4c 89 c8                    ; mov rax, r9
    e8 {hex.R}                  ; call hex
print:
    c6 07 0a                    ; mov byte [rdi], 10
    48 ff c7                    ; inc rdi
    48 8d b3 {LINE.d}           ; lea rsi, [rbx+LINE]
    89 f9                       ; mov ecx, edi
    29 f1                       ; sub ecx, esi
    ba f8 03 00 00              ; mov edx, 0x3f8
    f3 6e                       ; rep outsb
    c3                          ; ret
hex:
    c6 07 20                    ; mov byte [rdi], ' '
    48 ff c7                    ; inc rdi
    6a 10                       ; push 16
    59                          ; pop rcx
digit:
    48 c1 c0 04                 ; rol rax, 4
    89 c2                       ; mov edx, eax
    80 e2 0f                    ; and dl, 15
    80 c2 30                    ; add dl, '0'
    80 fa 39                    ; cmp dl, '9'
    76 {decimal.r}              ; jbe decimal
    80 c2 27                    ; add dl, 39
decimal:
    88 17                       ; mov [rdi], dl
    48 ff c7                    ; inc rdi
    ff c9                       ; dec ecx
    75 {digit.r}                ; jnz digit
    c3                          ; ret
"""
