// Every instruction that C++ has no name for. Included by types.cuh; the twins of the host are in
// host/shim.h under the same names. Warp operations take the full warp: all 32 lanes call them.
//
// Fragments of mma_m16n8k16 (g = lane / 4, t = lane % 4; a u32 holds two bf16, lower column or k in
// the lower half):
//   A 16x16:  a[0] = (row g,   k 2t, 2t+1)   a[1] = (row g+8, k 2t, 2t+1)
//             a[2] = (row g,   k 2t+8, +9)   a[3] = (row g+8, k 2t+8, +9)
//   B 16x8:   b[0] = (k 2t, 2t+1; column g)  b[1] = (k 2t+8, 2t+9; column g)
//   C, D 16x8: c[0] = (row g, column 2t)     c[1] = (row g, column 2t+1)
//              c[2] = (row g+8, column 2t)   c[3] = (row g+8, column 2t+1)
//
// ldmatrix: lanes 8i..8i+7 hold the addresses of the rows (8 bf16 = 16 bytes each) of matrix i; lane
// l receives r[i] = (row l / 4, columns 2 (l % 4), +1), and with _trans (rows 2 (l % 4), +1; column
// l / 4), lower index in the lower half. x2 reads the addresses of lanes 0..15 only.
//   A from row-major [16][k]:   x4 with lane address row (l % 16), column 8 (l / 16)
//   B from [n][k] (k adjacent): x2 with lane address row (l % 8), column 8 ((l / 8) % 2)
//   B from [k][n] (n adjacent): x2_trans with lane address row (l % 16)
#pragma once

#if !defined(FERROTUNE_HOST)

constexpr u32 ALL_LANES = 0xffffffffu;

// The value of lane (own ^ mask), (own + delta; own value past lane 31), lane. T: 4 or 8 bytes.
template <typename T>
DEVICE T shuffle_xor(T value, u32 mask) {
    return __shfl_xor_sync(ALL_LANES, value, static_cast<int>(mask));
}
template <typename T>
DEVICE T shuffle_down(T value, u32 delta) {
    return __shfl_down_sync(ALL_LANES, value, delta);
}
template <typename T>
DEVICE T shuffle_up(T value, u32 delta) {
    return __shfl_up_sync(ALL_LANES, value, delta);
}
template <typename T>
DEVICE T shuffle_idx(T value, u32 lane) {
    return __shfl_sync(ALL_LANES, value, static_cast<int>(lane));
}
// Bit l is set when `condition` holds in lane l.
DEVICE u32 ballot(bool condition) { return __ballot_sync(ALL_LANES, condition); }

// 2^x, 1/x, log2 x, 1/sqrt x: relative error about 2^-22, denormals flushed to zero.
DEVICE f32 fast_exp2(f32 x) {
    f32 y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE f32 fast_rcp(f32 x) {
    f32 y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE f32 fast_log2(f32 x) {
    f32 y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// One bf16, round to nearest even. (The GPU makes every NaN 0x7fff; the host keeps its payload.)
DEVICE u16 round_to_bf16(f32 value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
// Two bf16 in a u32, `low` in the lower half.
DEVICE u32 pack_bf16x2(f32 low, f32 high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// A barrier of the `threads` threads, whole warps, whose number is `team` when divided by `threads`; at most
// 15 teams.
DEVICE void team_barrier(u32 team, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "r"(threads) : "memory");
}

// 16 bytes between two addresses aligned to 16.
DEVICE void move_16(void* to, const void* from) {
    *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
}
// As move_16 from global memory, past the first-level cache.
DEVICE void move_nc_16(void* to, const void* from) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(__cvta_generic_to_global(from)));
    *static_cast<uint4*>(to) = v;
}

// d = a b + c; d may be c.
DEVICE void mma_m16n8k16_bf16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const f32 (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
}

DEVICE u32 shared_address(const void* shared) {
    return static_cast<u32>(__cvta_generic_to_shared(shared));
}

DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void ldmatrix_x2(u32 (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void ldmatrix_x2_trans(u32 (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// Starts a copy of 16 bytes from global to shared memory, both aligned to 16. Only the first
// `valid_bytes` are read; the rest become zero. The data is there after cp_async_wait, for other
// threads after a barrier behind that.
DEVICE void cp_async_16(void* shared, const void* global, u32 valid_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid_bytes)
                 : "memory");
}
// Ends a group of copies.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the N youngest groups of this thread are under way.
template <u32 N>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif

// e^x by fast_exp2.
DEVICE f32 fast_exp(f32 x) { return fast_exp2(x * 1.4426950408889634f); }
