"""When the guest walks and when it waits.

Entered with the address of the vCPU's block in rdi.  From then on

====  ===========================================================
rbx   the block
r12   pages rewritten, also in xmm6
r13   pages read, also in xmm7
r14   what is due and below one page, in 10**-9 pages
r15   the time it is, in ns
rbp   how many pages to walk at a time where there is no limit
====  ===========================================================

A rate is held by counting: so many pages are due for the time that went by, of which no more than
50 ms count.  Where none is due, the vCPU rests until the timer's alarm, for 1 to 20 ms.
"""

from __future__ import annotations

LISTING = """
start:
    fc                          ; cld
    48 89 fb                    ; mov rbx, rdi
    48 8d a3 00 10 00 00        ; lea rsp, [rbx+0x1000]
    45 31 e4                    ; xor r12d, r12d
    45 31 ed                    ; xor r13d, r13d
    45 31 f6                    ; xor r14d, r14d
    66 49 0f 6e f4              ; movq xmm6, r12
    66 49 0f 6e fd              ; movq xmm7, r13
    6a 10                       ; push 16
    5d                          ; pop rbp
    e8 {now.R}                  ; call now
    49 89 c7                    ; mov r15, rax
    48 83 7b {INDEX.b} 00       ; cmp qword [rbx+INDEX], 0
    75 {loop.r}                 ; jne loop
    e8 {beat.R}                 ; call beat
loop:
    e8 {now.R}                  ; call now
    48 89 c1                    ; mov rcx, rax
    4c 29 f9                    ; sub rcx, r15
    49 89 c7                    ; mov r15, rax
    48 8b 73 {RATE.b}           ; mov rsi, [rbx+RATE]
    48 85 f6                    ; test rsi, rsi
    74 {unlimited.r}            ; jz unlimited
    4c 3b 63 {HOT_COUNT.b}      ; cmp r12, [rbx+HOT_COUNT]
    72 {unlimited.r}            ; jb unlimited
    4c 3b 6b {COLD_COUNT.b}     ; cmp r13, [rbx+COLD_COUNT]
    72 {unlimited.r}            ; jb unlimited
    b8 80 f0 fa 02              ; mov eax, 50000000
    48 39 c1                    ; cmp rcx, rax
    48 0f 47 c8                 ; cmova rcx, rax
    48 0f af ce                 ; imul rcx, rsi
    49 8d 04 0e                 ; lea rax, [r14+rcx]
    31 d2                       ; xor edx, edx
    bf 00 ca 9a 3b              ; mov edi, 1000000000
    48 f7 f7                    ; div rdi
    49 89 d6                    ; mov r14, rdx
    48 85 c0                    ; test rax, rax
    75 {walk.r}                 ; jnz walk
    48 89 f8                    ; mov rax, rdi
    4c 29 f0                    ; sub rax, r14
    31 d2                       ; xor edx, edx
    48 f7 f6                    ; div rsi
    b9 40 42 0f 00              ; mov ecx, 1000000
    48 39 c8                    ; cmp rax, rcx
    48 0f 42 c1                 ; cmovb rax, rcx
    b9 00 2d 31 01              ; mov ecx, 20000000
    48 39 c8                    ; cmp rax, rcx
    48 0f 47 c1                 ; cmova rax, rcx
    4c 01 f8                    ; add rax, r15
    48 8b 53 {TIMER.b}          ; mov rdx, [rbx+TIMER]
    48 89 42 08                 ; mov [rdx+8], rax
    8b 53 {REST.b}              ; mov edx, [rbx+REST]
    ee                          ; out dx, al
    eb {duties.r}               ; jmp duties
unlimited:
    48 81 f9 40 42 0f 00        ; cmp rcx, 1000000
    73 {longer.r}               ; jae longer
    81 fd 00 80 00 00           ; cmp ebp, 0x8000
    73 {go.r}                   ; jae go
    01 ed                       ; add ebp, ebp
longer:
    48 81 f9 00 09 3d 00        ; cmp rcx, 4000000
    76 {go.r}                   ; jbe go
    83 fd 01                    ; cmp ebp, 1
    74 {go.r}                   ; je go
    d1 ed                       ; shr ebp, 1
go:
    89 e8                       ; mov eax, ebp
walk:
    50                          ; push rax
    e8 {step.R}                 ; call step
    58                          ; pop rax
    48 ff c8                    ; dec rax
    75 {walk.r}                 ; jnz walk
duties:
    48 83 7b {INDEX.b} 00       ; cmp qword [rbx+INDEX], 0
    0f 85 {loop.R}              ; jne loop
    48 89 df                    ; mov rdi, rbx
    48 8b 4b {CPUS.b}           ; mov rcx, [rbx+CPUS]
look:
    48 83 7f {KIND.b} 00        ; cmp qword [rdi+KIND], 0
    0f 85 {report.R}            ; jne report
    48 81 c7 00 10 00 00        ; add rdi, 0x1000
    48 ff c9                    ; dec rcx
    75 {look.r}                 ; jnz look
    4c 89 f8                    ; mov rax, r15
    48 2b 83 {LAST_BEAT.d}      ; sub rax, [rbx+LAST_BEAT]
    48 3b 43 {INTERVAL.b}       ; cmp rax, [rbx+INTERVAL]
    0f 82 {loop.R}              ; jb loop
    e8 {beat.R}                 ; call beat
    e8 {journal.R}              ; call journal
    e9 {loop.R}                 ; jmp loop
"""
