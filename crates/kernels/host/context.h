// Switching between stacks: saves what a call preserves, swaps the stack pointer, restores.
#pragma once

#include <cstddef>
#include <cstdint>

// Saves the current stack pointer in *from and goes on where `to` was saved.
extern "C" void ferrotune_host_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl ferrotune_host_switch
.hidden ferrotune_host_switch
.type ferrotune_host_switch, @function
ferrotune_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size ferrotune_host_switch, .-ferrotune_host_switch
)");

// A saved stack pointer from which a switch enters `entry`, which must not return.
inline void* prepare_stack(char* top, void (*entry)()) {
    auto* words = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
    *--words = 0; // where the return address of `entry` would be: keeps the alignment of a call
    *--words = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < 6; i++) {
        *--words = 0;
    }
    return words;
}

#elif defined(__aarch64__)
asm(R"(
.text
.globl ferrotune_host_switch
.hidden ferrotune_host_switch
.type ferrotune_host_switch, %function
ferrotune_host_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size ferrotune_host_switch, .-ferrotune_host_switch
)");

inline void* prepare_stack(char* top, void (*entry)()) {
    auto* words = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
    words -= 20;
    for (int i = 0; i < 20; i++) {
        words[i] = 0;
    }
    words[11] = reinterpret_cast<uintptr_t>(entry); // x30, to which `ret` goes
    return words;
}

#else
#error "the host stand-ins know x86_64 and aarch64"
#endif
