// Types, conversions, 16-byte vectors and the KERNEL macro. Every kernel.cu starts with this header
// (it brings ptx.cuh along) and includes nothing from CUDA or the standard library.
//
// Two halves: NVRTC compiles the GPU half; with FERROTUNE_HOST the same kernel is compiled by a C++
// compiler and its threads run as fibers (host/README.md).
#pragma once

using i8 = signed char;
using u8 = unsigned char;
using u16 = unsigned short;
using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;
using f32 = float;
using f64 = double;

static_assert(sizeof(u32) == 4 && sizeof(u64) == 8 && sizeof(void*) == 8, "64-bit targets only");

// 16 bits: sign, 8 bits of exponent, 7 of mantissa; the upper half of an f32.
struct alignas(2) bf16 {
    u16 bits;
};

#if defined(FERROTUNE_HOST)

#include "shim.h"

#else

#define DEVICE __device__ __forceinline__
// Static shared memory: `SHARED f32 tile[256];`
#define SHARED __shared__

// KERNEL(name, threads, Params, body): the entry point `name`, which calls `body(const Params&)` in
// each thread; `threads` is the largest block. A body with a comma goes in parentheses.
#define KERNEL(name, threads, Params, body)                                                      \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Params p) { \
        (body)(p);                                                                               \
    }

// The dynamic shared memory of the block, aligned to 16 bytes.
template <typename T>
DEVICE T* dynamic_shared() {
    extern __shared__ __align__(16) u8 ferrotune_dynamic_shared[];
    return reinterpret_cast<T*>(ferrotune_dynamic_shared);
}

DEVICE u32 float_bits(f32 value) { return __float_as_uint(value); }
DEVICE f32 bits_float(u32 bits) { return __uint_as_float(bits); }

#endif

constexpr u32 WARP = 32;

// a b, rounded by itself. The compiler fuses `a * b + c`, also where the product goes through f64.
DEVICE f32 multiply_rounded(f32 a, f32 b) { return __fmul_rn(a, b); }

#include "ptx.cuh"

DEVICE f32 to_f32(f32 value) { return value; }
DEVICE f32 to_f32(bf16 value) { return bits_float(static_cast<u32>(value.bits) << 16); }

// Rounds to nearest, ties to even; a NaN stays a NaN.
template <typename T>
DEVICE T from_f32(f32 value);
template <>
DEVICE f32 from_f32<f32>(f32 value) {
    return value;
}
template <>
DEVICE bf16 from_f32<bf16>(f32 value) {
    return bf16{round_to_bf16(value)};
}

// N neighbouring elements that move in one instruction when they are 16, 8 or 4 bytes.
template <typename T, u32 N>
struct alignas(sizeof(T) * N) Vec {
    T v[N];
    DEVICE T& operator[](u32 i) { return v[i]; }
    DEVICE const T& operator[](u32 i) const { return v[i]; }
};

// How many T are 16 bytes, and that many.
template <typename T>
constexpr u32 LANES = 16 / sizeof(T);
template <typename T>
using Vec16 = Vec<T, LANES<T>>;

// Whether `p` may be read and written by 16 bytes.
DEVICE bool aligned_16(const void* p) { return (reinterpret_cast<u64>(p) & 15) == 0; }

// 16 bytes at `p`, which is aligned to 16.
template <typename T>
DEVICE Vec16<T> load_16(const T* p) {
    Vec16<T> out;
    move_16(&out, p);
    return out;
}
template <typename T>
DEVICE void store_16(T* p, const Vec16<T>& value) {
    move_16(p, &value);
}

// As load_16, past the first-level cache: for data that is read once and that no thread of this
// launch writes.
template <typename T>
DEVICE Vec16<T> load_nc_16(const T* p) {
    Vec16<T> out;
    move_nc_16(&out, p);
    return out;
}

template <typename T>
DEVICE T minimum(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
DEVICE T maximum(T a, T b) {
    return a < b ? b : a;
}
// Smallest integer >= a / b.
template <typename T>
DEVICE T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}
