// Products of a warpgroup, four warps from a multiple of 128 threads on, on Hopper's tensor cores. sm_90a
// only; the twins of the host are in host/wgmma.h. All 128 threads call everything here together.
//
// A product runs on while the threads go on: registers it reads or writes belong to it until wgmma_wait,
// and so do its operands in shared memory. Results are those of mma_m16n8k16 (ptx.cuh), warp w of the group
// having rows 16 w to 16 w + 15: d[n / 8] is the fragment of columns n to n + 7, a that of 16 columns.
//
// Operands in shared memory have rows of 64 bf16 (128 bytes), in which the 16 bytes of number c of row r lie
// at number c ^ (r % 8); eight rows are 1024 bytes and start on a multiple of that.
#pragma once
#include "types.cuh"

#if defined(FERROTUNE_HOST)

#include "wgmma.h"

#else

// An operand that starts at `shared`: `leading` bytes from 64 columns to the next where columns are what is
// not summed over, `stride` bytes from 8 rows to the next.
DEVICE u64 wgmma_operand(const void* shared, u32 leading, u32 stride) {
    constexpr u64 SWIZZLE_128 = 1ull << 62;
    const u64 address = (shared_address(shared) & 0x3ffffu) >> 4;
    return SWIZZLE_128 | static_cast<u64>(stride >> 4) << 32 | static_cast<u64>(leading >> 4) << 16 | address;
}

// Before the first product, and before one that follows a change of registers by other means.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most the N youngest groups are under way.
template <u32 N>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Behind the wait for a product: the compiler may not read its result earlier.
template <u32 M>
DEVICE void wgmma_settle(f32 (&d)[M][4]) {
#pragma unroll
    for (u32 i = 0; i < M; ++i) {
        asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
    }
}
// Keeps a wait that follows behind what is computed before it. ptxas moves a wait up to the begin of its basic
// block, and with it away from the arithmetic that a product is to run beside; `never` is 0, at run time.
DEVICE void wgmma_hold(u32 never) {
    if (never) asm volatile("nanosleep.u32 0;" ::: "memory");
}
// What this thread wrote to shared memory, cp.async included once it was waited for, is there for products
// that are issued behind a barrier.
DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Makes 16 bytes of shared memory zero.
DEVICE void clear_shared_16(void* shared) { *static_cast<uint4*>(shared) = make_uint4(0, 0, 0, 0); }

// clang-format off
#define WGMMA_4(is, i) is(d[i][0]), is(d[i][1]), is(d[i][2]), is(d[i][3])
#define WGMMA_16(is, i) WGMMA_4(is, i), WGMMA_4(is, i + 1), WGMMA_4(is, i + 2), WGMMA_4(is, i + 3)
#define WGMMA_D64(is) WGMMA_16(is, 0), WGMMA_16(is, 4)
#define WGMMA_D96(is) WGMMA_D64(is), WGMMA_16(is, 8)
#define WGMMA_D128(is) WGMMA_D96(is), WGMMA_16(is, 12)
#define WGMMA_32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_48 WGMMA_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_64 WGMMA_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// d[64, N] = (FIRST ? 0 : d) + a[64, 16] b[N, 16]^T, both operands in shared memory.
#define WGMMA_SHARED(N, D, A, B, OPERANDS)                                                          \
    template <bool FIRST>                                                                           \
    DEVICE void wgmma_shared(f32 (&d)[N / 8][4], u64 a, u64 b) {                                    \
        if constexpr (FIRST) {                                                                      \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 " D "}, " A ", " \
                         B ", 0, 1, 1, 0, 0;" : OPERANDS("=f") : "l"(a), "l"(b));                   \
        } else {                                                                                    \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 " D "}, " A ", " \
                         B ", 1, 1, 1, 0, 0;" : OPERANDS("+f") : "l"(a), "l"(b));                   \
        }                                                                                           \
    }
// d[64, N] += a[64, 16] b[16, N], b in shared memory.
#define WGMMA_REGISTERS(N, D, A, B, OPERANDS)                                                       \
    DEVICE void wgmma_registers(f32 (&d)[N / 8][4], const u32 (&a)[4], u64 b) {                     \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 " D "}, " A ", "     \
                     B ", 1, 1, 1, 1;"                                                              \
                     : OPERANDS("+f") : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));        \
    }
WGMMA_SHARED(64, WGMMA_32, "%32", "%33", WGMMA_D64)
WGMMA_SHARED(96, WGMMA_48, "%48", "%49", WGMMA_D96)
WGMMA_SHARED(128, WGMMA_64, "%64", "%65", WGMMA_D128)
WGMMA_REGISTERS(64, WGMMA_32, "{%32, %33, %34, %35}", "%36", WGMMA_D64)
WGMMA_REGISTERS(128, WGMMA_64, "{%64, %65, %66, %67}", "%68", WGMMA_D128)
// clang-format on

#endif
