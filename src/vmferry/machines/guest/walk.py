"""One step of the walk: a page that is rewritten, and a page that is only read.

``step`` also holds the counters against one another; each is counted by itself, so that one that
is wrong stays wrong.  ``verify`` takes the page in r11 and the sequence number to expect in r10,
``stamp`` the one to write, and the number of lines in rcx.  What is wrong is left in the block, by
kind: 1 lost, 2 misplaced, 3 stale, 4 torn, 5 registers and 6 counters that disagree.
"""

from __future__ import annotations

_STORE_LINE = "".join(
    f"""
    4c 89 4e {offset:02x}                 ; mov [rsi+{offset}], r9
    4c 01 c8                    ; add rax, r9
    48 01 c2                    ; add rdx, rax
    4d 01 c1                    ; add r9, r8
"""
    for offset in range(0, 64, 8)
)
_ADD_HEAD = "".join(
    f"""
    48 03 47 {offset:02x}                 ; add rax, [rdi+{offset}]
    48 01 c2                    ; add rdx, rax
"""
    for offset in range(8, 48, 8)
)
_ADD_LINE = "".join(
    f"""
    48 03 46 {offset:02x}                 ; add rax, [rsi+{offset}]
    48 01 c2                    ; add rdx, rax
"""
    for offset in range(0, 64, 8)
)

LISTING = (
    """
step:
    66 48 0f 7e f0              ; movq rax, xmm6
    4c 89 e2                    ; mov rdx, r12
    b9 05 00 00 00              ; mov ecx, 5
    49 89 cb                    ; mov r11, rcx
    48 39 d0                    ; cmp rax, rdx
    0f 85 {bad.R}               ; jne bad
    48 8b 43 {HOT_STEPS.b}      ; mov rax, [rbx+HOT_STEPS]
    b9 06 00 00 00              ; mov ecx, 6
    48 39 d0                    ; cmp rax, rdx
    0f 85 {bad.R}               ; jne bad
    66 48 0f 7e f8              ; movq rax, xmm7
    4c 89 ea                    ; mov rdx, r13
    b9 05 00 00 00              ; mov ecx, 5
    48 39 d0                    ; cmp rax, rdx
    0f 85 {bad.R}               ; jne bad
    48 8b 43 {COLD_STEPS.b}     ; mov rax, [rbx+COLD_STEPS]
    b9 06 00 00 00              ; mov ecx, 6
    48 39 d0                    ; cmp rax, rdx
    0f 85 {bad.R}               ; jne bad
    48 8b 4b {HOT_COUNT.b}      ; mov rcx, [rbx+HOT_COUNT]
    48 85 c9                    ; test rcx, rcx
    74 {cold.r}                 ; jz cold
    4c 89 e0                    ; mov rax, r12
    31 d2                       ; xor edx, edx
    48 f7 f1                    ; div rcx
    49 89 c2                    ; mov r10, rax
    49 89 d3                    ; mov r11, rdx
    4c 03 5b {HOT_FIRST.b}      ; add r11, [rbx+HOT_FIRST]
    b9 3f 00 00 00              ; mov ecx, 63
    4d 85 d2                    ; test r10, r10
    74 {hot.r}                  ; jz hot
    e8 {verify.R}               ; call verify
    48 8b 4b {CHANGED.b}        ; mov rcx, [rbx+CHANGED]
hot:
    49 ff c2                    ; inc r10
    e8 {stamp.R}                ; call stamp
    49 ff c4                    ; inc r12
    66 0f 76 c0                 ; pcmpeqd xmm0, xmm0
    66 0f fb f0                 ; psubq xmm6, xmm0
    48 8b 43 {HOT_STEPS.b}      ; mov rax, [rbx+HOT_STEPS]
    48 ff c0                    ; inc rax
    48 89 43 {HOT_STEPS.b}      ; mov [rbx+HOT_STEPS], rax
cold:
    48 8b 4b {COLD_COUNT.b}     ; mov rcx, [rbx+COLD_COUNT]
    48 85 c9                    ; test rcx, rcx
    74 {walked.r}               ; jz walked
    4c 89 e8                    ; mov rax, r13
    31 d2                       ; xor edx, edx
    48 f7 f1                    ; div rcx
    6a 01                       ; push 1
    41 5a                       ; pop r10
    49 89 d3                    ; mov r11, rdx
    4c 03 5b {COLD_FIRST.b}     ; add r11, [rbx+COLD_FIRST]
    48 85 c0                    ; test rax, rax
    74 {fill.r}                 ; jz fill
    e8 {verify.R}               ; call verify
    eb {colder.r}               ; jmp colder
fill:
    b9 3f 00 00 00              ; mov ecx, 63
    e8 {stamp.R}                ; call stamp
colder:
    49 ff c5                    ; inc r13
    66 0f 76 c0                 ; pcmpeqd xmm0, xmm0
    66 0f fb f8                 ; psubq xmm7, xmm0
    48 8b 43 {COLD_STEPS.b}     ; mov rax, [rbx+COLD_STEPS]
    48 ff c0                    ; inc rax
    48 89 43 {COLD_STEPS.b}     ; mov [rbx+COLD_STEPS], rax
walked:
    c3                          ; ret
verify:
    4c 89 df                    ; mov rdi, r11
    48 c1 e7 0c                 ; shl rdi, 12
    48 03 7b {BASE.b}           ; add rdi, [rbx+BASE]
    48 8b 07                    ; mov rax, [rdi]
    48 ba {MAGIC.q}          ; mov rdx, MAGIC
    b9 01 00 00 00              ; mov ecx, 1
    48 39 d0                    ; cmp rax, rdx
    75 {bad.r}                  ; jne bad
    48 8b 47 08                 ; mov rax, [rdi+8]
    4c 89 da                    ; mov rdx, r11
    b9 02 00 00 00              ; mov ecx, 2
    48 39 d0                    ; cmp rax, rdx
    75 {bad.r}                  ; jne bad
    48 8b 47 10                 ; mov rax, [rdi+16]
    4c 89 d2                    ; mov rdx, r10
    b9 03 00 00 00              ; mov ecx, 3
    48 39 d0                    ; cmp rax, rdx
    75 {bad.r}                  ; jne bad
    e8 {head.R}                 ; call head
    6a 3f                       ; push 63
    59                          ; pop rcx
    e8 {rest.R}                 ; call rest
    48 89 d1                    ; mov rcx, rdx
    48 8b 57 30                 ; mov rdx, [rdi+48]
    48 39 d0                    ; cmp rax, rdx
    75 {torn.r}                 ; jne torn
    48 89 c8                    ; mov rax, rcx
    48 8b 57 38                 ; mov rdx, [rdi+56]
    48 39 d0                    ; cmp rax, rdx
    75 {torn.r}                 ; jne torn
    c3                          ; ret
torn:
    b9 04 00 00 00              ; mov ecx, 4
bad:
    4c 89 5b {PAGE.b}           ; mov [rbx+PAGE], r11
    48 89 93 {EXPECTED.d}       ; mov [rbx+EXPECTED], rdx
    48 89 83 {FOUND.d}          ; mov [rbx+FOUND], rax
    48 89 4b {KIND.b}           ; mov [rbx+KIND], rcx
    48 89 df                    ; mov rdi, rbx
    48 83 7b {INDEX.b} 00       ; cmp qword [rbx+INDEX], 0
    0f 84 {report.R}            ; je report
    48 8b 53 {TIMER.b}          ; mov rdx, [rbx+TIMER]
    48 c7 42 08 00 00 00 00     ; mov qword [rdx+8], 0
never:
    8b 53 {REST.b}              ; mov edx, [rbx+REST]
    ee                          ; out dx, al
    eb {never.r}                ; jmp never
stamp:
    4c 89 df                    ; mov rdi, r11
    48 c1 e7 0c                 ; shl rdi, 12
    48 03 7b {BASE.b}           ; add rdi, [rbx+BASE]
    48 b8 {PAGE_FACTOR.q}    ; mov rax, PAGE_FACTOR
    49 0f af c3                 ; imul rax, r11
    4c 01 d0                    ; add rax, r10
    49 b8 {SEED_FACTOR.q}    ; mov r8, SEED_FACTOR
    49 0f af c0                 ; imul rax, r8
    49 89 c1                    ; mov r9, rax
    48 b8 {MAGIC.q}          ; mov rax, MAGIC
    48 89 07                    ; mov [rdi], rax
    4c 89 5f 08                 ; mov [rdi+8], r11
    4c 89 57 10                 ; mov [rdi+16], r10
    4c 89 4f 18                 ; mov [rdi+24], r9
    48 89 4f 20                 ; mov [rdi+32], rcx
    48 8b 43 {INDEX.b}          ; mov rax, [rbx+INDEX]
    48 89 47 28                 ; mov [rdi+40], rax
    49 89 c8                    ; mov r8, rcx
    e8 {head.R}                 ; call head
    41 50                       ; push r8
    49 b8 {WORD_STEP.q}      ; mov r8, WORD_STEP
lines:
"""
    + _STORE_LINE
    + """
    48 83 c6 40                 ; add rsi, 64
    ff c9                       ; dec ecx
    75 {lines.r}                ; jnz lines
    41 58                       ; pop r8
    6a 3f                       ; push 63
    59                          ; pop rcx
    44 29 c1                    ; sub ecx, r8d
    e8 {rest.R}                 ; call rest
    48 89 47 30                 ; mov [rdi+48], rax
    48 89 57 38                 ; mov [rdi+56], rdx
    c3                          ; ret
head:
    48 8b 07                    ; mov rax, [rdi]
    48 89 c2                    ; mov rdx, rax
"""
    + _ADD_HEAD
    + """
    48 8d 77 40                 ; lea rsi, [rdi+64]
    c3                          ; ret
rest:
    85 c9                       ; test ecx, ecx
    74 {summed.r}               ; jz summed
sum:
"""
    + _ADD_LINE
    + """
    48 83 c6 40                 ; add rsi, 64
    ff c9                       ; dec ecx
    75 {sum.r}                  ; jnz sum
summed:
    c3                          ; ret
"""
)
