// Sums over the rows of a matrix, one per column.
#pragma once
#include "rows.cuh"

// total[c] += sum of value(row, c) over the rows, in a fixed order. A block of 1024 threads has 32
// columns: no second pass, no scratch memory.
template <typename Value>
DEVICE void add_column_sums(u32 rows, u32 cols, f32* total, const Value& value) {
    constexpr u32 WARPS = 32;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 column = blockIdx.x * WARP + lane;
    f32 sum = 0.0f;
    if (column < cols) {
#pragma unroll 8
        for (u32 row = warp; row < rows; row += WARPS) sum += value(row, column);
    }
    // A row more than lanes, so that the transposed reads meet different banks.
    SHARED f32 sums[WARPS][WARP + 1];
    sums[warp][lane] = sum;
    __syncthreads();
    // Warp w now adds the partial sums of column w.
    sum = warp_sum(sums[lane][warp]);
    const u32 target = blockIdx.x * WARP + warp;
    if (lane == 0 && target < cols) total[target] += sum;
}
