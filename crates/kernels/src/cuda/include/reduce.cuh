// Reductions over a warp and over a block, in a fixed order: the same bits on every run.
//
// All threads of the block call a block_* function and all receive the result. blockDim.x is a
// multiple of 32, at most 1024. They may follow each other without a barrier between.
#pragma once

#include "types.cuh"

// In a namespace, because a kernel file names its own structs.
namespace reduction {

// What merges two values, and the value that changes nothing.
struct Add {
    template <typename T>
    static DEVICE T merge(T a, T b) {
        return a + b;
    }
    template <typename T>
    static DEVICE T neutral() {
        return T(0);
    }
};

// A NaN on either side stays: fmaxf alone would drop it.
struct Larger {
    static DEVICE f32 merge(f32 a, f32 b) { return a > b || a != a ? a : b; }
    template <typename T>
    static DEVICE T neutral() {
        return -bits_float(0x7f800000u);
    }
};

template <typename Op, typename T>
DEVICE T warp_reduce(T value) {
#pragma unroll
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) {
        value = Op::merge(value, shuffle_xor(value, mask));
    }
    return value;
}

// The result of each warp goes through shared memory, then every warp merges all of them.
template <typename Op, typename T>
DEVICE T block_reduce(T value) {
    SHARED T partial[WARP];
    value = warp_reduce<Op>(value);
    const u32 lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    if (warps == 1) {
        return value;
    }
    __syncthreads(); // all have read the partials of an earlier call
    if (lane == 0) {
        partial[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    return warp_reduce<Op>(lane < warps ? partial[lane] : Op::template neutral<T>());
}

} // namespace reduction

DEVICE f32 warp_sum(f32 value) { return reduction::warp_reduce<reduction::Add>(value); }
DEVICE f64 warp_sum(f64 value) { return reduction::warp_reduce<reduction::Add>(value); }
DEVICE u32 warp_sum(u32 value) { return reduction::warp_reduce<reduction::Add>(value); }
DEVICE f32 warp_max(f32 value) { return reduction::warp_reduce<reduction::Larger>(value); }

DEVICE f32 block_sum(f32 value) { return reduction::block_reduce<reduction::Add>(value); }
DEVICE f64 block_sum(f64 value) { return reduction::block_reduce<reduction::Add>(value); }
DEVICE u32 block_sum(u32 value) { return reduction::block_reduce<reduction::Add>(value); }
DEVICE f32 block_max(f32 value) { return reduction::block_reduce<reduction::Larger>(value); }

// Two sums for the barriers of one: `a` and `b` become their sums.
template <typename T>
DEVICE void block_sum2(T& a, T& b) {
    SHARED T partial[2][WARP];
    a = warp_sum(a);
    b = warp_sum(b);
    const u32 lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    if (warps == 1) {
        return;
    }
    __syncthreads();
    if (lane == 0) {
        partial[0][threadIdx.x / WARP] = a;
        partial[1][threadIdx.x / WARP] = b;
    }
    __syncthreads();
    a = warp_sum(lane < warps ? partial[0][lane] : T(0));
    b = warp_sum(lane < warps ? partial[1][lane] : T(0));
}

struct ArgMax {
    f32 value;
    u32 index;
};

// The larger value; of equal ones the lower index. A NaN is larger than any number.
DEVICE ArgMax merge(ArgMax a, ArgMax b) {
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    const bool equal = a.value == b.value || (a_nan && b_nan);
    const bool first = equal ? a.index < b.index : a_nan || a.value > b.value;
    return first ? a : b;
}

DEVICE ArgMax warp_argmax(ArgMax best) {
#pragma unroll
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) {
        best = merge(best, ArgMax{shuffle_xor(best.value, mask), shuffle_xor(best.index, mask)});
    }
    return best;
}

DEVICE ArgMax block_argmax(ArgMax best) {
    SHARED f32 values[WARP];
    SHARED u32 indices[WARP];
    best = warp_argmax(best);
    const u32 lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    if (warps == 1) {
        return best;
    }
    __syncthreads();
    if (lane == 0) {
        values[threadIdx.x / WARP] = best.value;
        indices[threadIdx.x / WARP] = best.index;
    }
    __syncthreads();
    const bool inside = lane < warps;
    const ArgMax none = {-bits_float(0x7f800000u), 0xffffffffu};
    return warp_argmax(inside ? ArgMax{values[lane], indices[lane]} : none);
}
