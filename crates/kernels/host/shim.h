// The host half of the kernel headers: CUDA's builtins and the twins of ptx.cuh, on top of the
// fibers of runtime.cpp. Included by types.cuh when FERROTUNE_HOST is defined.
#pragma once

#include <cmath>
#include <cstring>

#define DEVICE inline __attribute__((always_inline))
// One block runs on an OS thread at a time.
#define SHARED static thread_local

struct HostIndex {
    u32 x, y, z;
};
struct HostThread {
    HostIndex thread, block, block_dim, grid_dim;
    u8* dynamic_shared;
};

// What a lane gives to and takes from an operation of its warp.
struct alignas(16) HostSlot {
    u32 word[12];
};

#pragma GCC visibility push(default)
extern "C" {
// The calling thread. It is the same all through a kernel, so a compiler may keep it.
const HostThread* ferrotune_host_thread() __attribute__((const));
void ferrotune_host_barrier(int line);
void ferrotune_host_team_barrier(u32 team, u32 threads);
// Gives `bytes` at `mine` to the warp, waits for all 32 lanes, calls `combine` on their slots once,
// and returns the slots. `name` must be the same in all lanes.
const HostSlot* ferrotune_host_warp(const char* name, const void* mine, u32 bytes,
                                    void (*combine)(HostSlot*));
void ferrotune_host_cp_async(void* shared, const void* global, u32 valid_bytes);
void ferrotune_host_cp_async_commit();
void ferrotune_host_cp_async_wait(u32 groups);
// Ends the launch with a message that names the kernel, block and thread.
[[noreturn]] void ferrotune_host_fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
}
#pragma GCC visibility pop

#define HOST_EXPORT extern "C" __attribute__((visibility("default")))
#define KERNEL(name, threads, Params, body)                                              \
    HOST_EXPORT const u32 name##_params;                                                 \
    const u32 name##_params = sizeof(Params);                                            \
    HOST_EXPORT const u32 name##_threads;                                                \
    const u32 name##_threads = threads;                                                  \
    HOST_EXPORT void name(const void* params) {                                          \
        (body)(*static_cast<const Params*>(params));                                     \
    }

#define threadIdx (ferrotune_host_thread()->thread)
#define blockIdx (ferrotune_host_thread()->block)
#define blockDim (ferrotune_host_thread()->block_dim)
#define gridDim (ferrotune_host_thread()->grid_dim)

template <typename T>
DEVICE T* dynamic_shared() {
    return reinterpret_cast<T*>(ferrotune_host_thread()->dynamic_shared);
}

DEVICE u32 float_bits(f32 value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
DEVICE f32 bits_float(u32 bits) {
    f32 value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// CUDA's own names.
DEVICE void __syncthreads(int line = __builtin_LINE()) { ferrotune_host_barrier(line); }
DEVICE void __syncwarp() { ferrotune_host_warp("__syncwarp", nullptr, 0, nullptr); }
DEVICE void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
DEVICE void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
DEVICE u32 __float_as_uint(f32 value) { return float_bits(value); }
DEVICE f32 __uint_as_float(u32 bits) { return bits_float(bits); }
DEVICE f32 __fmul_rn(f32 a, f32 b) {
    volatile f32 product = a * b; // some targets fuse it with an addition otherwise
    return product;
}
DEVICE f32 rsqrtf(f32 x) { return 1.0f / std::sqrt(x); }
DEVICE u32 __umulhi(u32 a, u32 b) { return static_cast<u32>((static_cast<u64>(a) * b) >> 32); }
DEVICE u64 __umul64hi(u64 a, u64 b) {
    return static_cast<u64>((static_cast<unsigned __int128>(a) * b) >> 64);
}
DEVICE int __popc(u32 bits) { return __builtin_popcount(bits); }
DEVICE int __clz(i32 bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<u32>(bits)); }
DEVICE int __ffs(i32 bits) { return __builtin_ffs(bits); }
DEVICE u32 atomicAdd(u32* p, u32 v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
DEVICE i32 atomicAdd(i32* p, i32 v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
DEVICE u64 atomicAdd(u64* p, u64 v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
DEVICE u32 atomicOr(u32* p, u32 v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
DEVICE u32 atomicMax(u32* p, u32 v) {
    u32 old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST,
                                                   __ATOMIC_SEQ_CST)) {
    }
    return old;
}

// Twins of ptx.cuh.

template <typename T>
DEVICE T host_shuffle(const char* name, T value, u32 source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    const HostSlot* slots = ferrotune_host_warp(name, &value, sizeof(T), nullptr);
    T out;
    std::memcpy(&out, &slots[source], sizeof(T));
    return out;
}
template <typename T>
DEVICE T shuffle_xor(T value, u32 mask) {
    return host_shuffle("shuffle_xor", value, (threadIdx.x % 32) ^ (mask % 32));
}
template <typename T>
DEVICE T shuffle_down(T value, u32 delta) {
    const u32 lane = threadIdx.x % 32;
    return host_shuffle("shuffle_down", value, lane + delta < 32 ? lane + delta : lane);
}
template <typename T>
DEVICE T shuffle_up(T value, u32 delta) {
    const u32 lane = threadIdx.x % 32;
    return host_shuffle("shuffle_up", value, lane >= delta ? lane - delta : lane);
}
template <typename T>
DEVICE T shuffle_idx(T value, u32 lane) {
    return host_shuffle("shuffle_idx", value, lane % 32);
}
DEVICE u32 ballot(bool condition) {
    const u32 mine = condition;
    const HostSlot* slots = ferrotune_host_warp("ballot", &mine, sizeof(mine), nullptr);
    u32 bits = 0;
    for (u32 lane = 0; lane < 32; lane++) {
        bits |= slots[lane].word[0] << lane;
    }
    return bits;
}

// As the GPU does: a denormal counts as zero, in and out.
DEVICE f32 host_flush(f32 x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
DEVICE f32 fast_exp2(f32 x) { return host_flush(std::exp2(host_flush(x))); }
DEVICE f32 fast_rcp(f32 x) { return host_flush(1.0f / host_flush(x)); }
DEVICE f32 fast_log2(f32 x) { return std::log2(host_flush(x)); }

DEVICE u16 round_to_bf16(f32 value) {
    const u32 bits = float_bits(value);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const u32 rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
    return static_cast<u16>(nan ? (bits >> 16) | 0x40u : rounded);
}
DEVICE u32 pack_bf16x2(f32 low, f32 high) {
    return round_to_bf16(low) | static_cast<u32>(round_to_bf16(high)) << 16;
}

DEVICE void host_aligned_16(const void* p, const char* what) {
    if (reinterpret_cast<u64>(p) % 16 != 0) {
        ferrotune_host_fail("%s at %p, which is not aligned to 16", what, p);
    }
}
DEVICE void team_barrier(u32 team, u32 threads) { ferrotune_host_team_barrier(team, threads); }
DEVICE void move_16(void* to, const void* from) {
    host_aligned_16(to, "16-byte access");
    host_aligned_16(from, "16-byte access");
    std::memcpy(to, from, 16);
}
DEVICE void move_nc_16(void* to, const void* from) { move_16(to, from); }

struct HostMma {
    u32 a[4], b[2];
    f32 c[4];
};
inline f32 host_bf16_half(u32 pair, u32 half) { return bits_float(half ? pair & 0xffff0000u : pair << 16); }
// Slots hold HostMma; c becomes d. Layouts: ptx.cuh. One rounding per element.
inline void host_mma(HostSlot* slots) {
    HostMma lanes[32];
    f64 a[16][16], b[16][8];
    for (u32 lane = 0; lane < 32; lane++) {
        HostMma& m = lanes[lane];
        std::memcpy(static_cast<void*>(&m), &slots[lane], sizeof(m));
        const u32 g = lane / 4, t = lane % 4;
        for (u32 i = 0; i < 8; i++) {
            a[g + 8 * (i / 2 % 2)][2 * t + 8 * (i / 4) + i % 2] = host_bf16_half(m.a[i / 2], i % 2);
        }
        for (u32 i = 0; i < 4; i++) {
            b[2 * t + 8 * (i / 2) + i % 2][g] = host_bf16_half(m.b[i / 2], i % 2);
        }
    }
    for (u32 lane = 0; lane < 32; lane++) {
        for (u32 i = 0; i < 4; i++) {
            const u32 row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            f64 sum = lanes[lane].c[i];
            for (u32 k = 0; k < 16; k++) {
                sum += a[row][k] * b[k][column];
            }
            const f32 d = static_cast<f32>(sum);
            std::memcpy(&slots[lane].word[6 + i], &d, 4);
        }
    }
}
DEVICE void mma_m16n8k16_bf16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const f32 (&c)[4]) {
    HostMma mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
    const HostSlot* slots = ferrotune_host_warp("mma_m16n8k16", &mine, sizeof(mine), host_mma);
    std::memcpy(d, &slots[threadIdx.x % 32].word[6], sizeof(d));
}

// The 32-bit words of `matrices` 8x8 matrices whose row addresses the lanes hold.
inline void host_ldmatrix(u32* r, const void* row, u32 matrices, bool transposed) {
    const u32 lane = threadIdx.x % 32;
    if (lane < 8 * matrices) {
        host_aligned_16(row, "ldmatrix row");
    }
    const HostSlot* slots = ferrotune_host_warp("ldmatrix", &row, sizeof(row), nullptr);
    const u32 g = lane / 4, t = lane % 4;
    for (u32 m = 0; m < matrices; m++) {
        u16 half[2];
        for (u32 i = 0; i < 2; i++) {
            const u32 from = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
            const u16* address;
            std::memcpy(&address, &slots[8 * m + from], sizeof(address));
            half[i] = address[column];
        }
        r[m] = half[0] | static_cast<u32>(half[1]) << 16;
    }
    // The rows are read before any lane goes on.
    ferrotune_host_warp("ldmatrix", nullptr, 0, nullptr);
}
DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) { host_ldmatrix(r, row, 4, false); }
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) { host_ldmatrix(r, row, 4, true); }
DEVICE void ldmatrix_x2(u32 (&r)[2], const void* row) { host_ldmatrix(r, row, 2, false); }
DEVICE void ldmatrix_x2_trans(u32 (&r)[2], const void* row) { host_ldmatrix(r, row, 2, true); }

DEVICE void cp_async_16(void* shared, const void* global, u32 valid_bytes) {
    host_aligned_16(shared, "cp.async destination");
    host_aligned_16(global, "cp.async source");
    ferrotune_host_cp_async(shared, global, valid_bytes);
}
DEVICE void cp_async_commit() { ferrotune_host_cp_async_commit(); }
template <u32 N>
DEVICE void cp_async_wait() {
    ferrotune_host_cp_async_wait(N);
}
