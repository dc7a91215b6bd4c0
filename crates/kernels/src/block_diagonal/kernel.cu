// Products with a block-diagonal matrix, in tiles of 32 by 32.
#include "rows.cuh"

struct BlockDiagonal {
    Matrix x, y;
    f32* blocks;
    u32 rows, cols;
    // Of a block, and its tiles in one direction.
    u32 n, tiles;
};

constexpr u32 TILE = 32;
// 32 by 8 threads, each with one column of the tile in four rows.
constexpr u32 THREAD_ROWS = 8;
constexpr u32 PER_THREAD = TILE / THREAD_ROWS;

// Values of a tile [32, 32]: sums over k of left(i, k) * right(j, k), with k in 0..depth.
template <typename Left, typename Right>
DEVICE void tile_sums(u32 depth, const Left& left, const Right& right, f32 (&sums)[PER_THREAD]) {
    SHARED f32 a[TILE][TILE + 1], b[TILE][TILE + 1];
    const u32 column = threadIdx.x % TILE, row = threadIdx.x / TILE;
#pragma unroll
    for (u32 e = 0; e < PER_THREAD; e++) sums[e] = 0.0f;
    for (u32 first = 0; first < depth; first += TILE) {
#pragma unroll
        for (u32 e = 0; e < PER_THREAD; e++) {
            const u32 other = row + e * THREAD_ROWS;
            left(a, other, column, first);
            right(b, other, column, first);
        }
        __syncthreads();
#pragma unroll 8
        for (u32 k = 0; k < TILE; k++) {
            const f32 value = b[column][k];
#pragma unroll
            for (u32 e = 0; e < PER_THREAD; e++) sums[e] += a[row + e * THREAD_ROWS][k] * value;
        }
        __syncthreads();
    }
}

// blockIdx.x: tiles of the columns of y, block by block; blockIdx.y: tiles of rows.
DEVICE void product(const BlockDiagonal& p) {
    const u32 first = blockIdx.x / p.tiles * p.n, tile = blockIdx.x % p.tiles * TILE;
    const u32 column = threadIdx.x % TILE, row = threadIdx.x / TILE;
    for (u32 top = blockIdx.y * TILE; top < p.rows; top += gridDim.y * TILE) {
        f32 sums[PER_THREAD];
        tile_sums(
            p.n,
            [&](f32 (&a)[TILE][TILE + 1], u32 i, u32 lane, u32 k) {
                const bool inside = top + i < p.rows && k + lane < p.n;
                a[i][lane] = inside ? load_element<f32>(p.x, top + i, first + k + lane) : 0.0f;
            },
            [&](f32 (&b)[TILE][TILE + 1], u32 j, u32 lane, u32 k) {
                const bool inside = tile + j < p.n && k + lane < p.n;
                b[j][lane] = inside ? p.blocks[u64(first + tile + j) * p.n + k + lane] : 0.0f;
            },
            sums);
        if (tile + column >= p.n) continue;
#pragma unroll
        for (u32 e = 0; e < PER_THREAD; e++) {
            const u32 r = top + row + e * THREAD_ROWS;
            if (r < p.rows) row_of<f32>(p.y, r)[first + tile + column] = sums[e];
        }
    }
}

// blockIdx.x: blocks; blockIdx.y: tiles of a block, row by row.
DEVICE void gradient(const BlockDiagonal& p) {
    const u32 first = blockIdx.x * p.n;
    const u32 top = blockIdx.y / p.tiles * TILE, side = blockIdx.y % p.tiles * TILE;
    const u32 column = threadIdx.x % TILE, row = threadIdx.x / TILE;
    f32 sums[PER_THREAD];
    // Rows of dy and x are read as they lie, and stored across.
    tile_sums(
        p.rows,
        [&](f32 (&a)[TILE][TILE + 1], u32 k, u32 lane, u32 r) {
            const bool inside = r + k < p.rows && top + lane < p.n;
            a[lane][k] = inside ? load_element<f32>(p.y, r + k, first + top + lane) : 0.0f;
        },
        [&](f32 (&b)[TILE][TILE + 1], u32 k, u32 lane, u32 r) {
            const bool inside = r + k < p.rows && side + lane < p.n;
            b[lane][k] = inside ? load_element<f32>(p.x, r + k, first + side + lane) : 0.0f;
        },
        sums);
    if (side + column >= p.n) return;
#pragma unroll
    for (u32 e = 0; e < PER_THREAD; e++) {
        const u32 i = top + row + e * THREAD_ROWS;
        if (i < p.n) p.blocks[u64(first + i) * p.n + side + column] = sums[e];
    }
}

KERNEL(block_diagonal_product, 256, BlockDiagonal, product)
KERNEL(block_diagonal_gradient, 256, BlockDiagonal, gradient)
