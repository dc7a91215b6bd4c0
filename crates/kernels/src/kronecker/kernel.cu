// The Kronecker product of two matrices, and the gradients of both.
#include "columns.cuh"
#include "rows.cuh"

struct Kronecker {
    // The product, or its gradient.
    Matrix product;
    // What is read, and what is added to where a factor's gradient is asked for.
    const f32* first;
    const f32* second;
    f32* sums;
    u32 rows, cols;
    // Of a block.
    u32 p, q;
    // Blocks in a row of blocks, and of all of them.
    u32 across, blocks;
    u32 transposed;
    f32 alpha;
    u32 team_threads, unused;
};

DEVICE u32 place(const Kronecker& p, u32 x, u32 y) {
    return p.transposed ? y * p.p + x : x * p.q + y;
}

// The gradient at [x, y] of a block; 0 where the block sticks out.
DEVICE f32 gradient(const Kronecker& p, u32 block, u32 x, u32 y) {
    const u32 row = block / p.across * p.p + x, column = block % p.across * p.q + y;
    if (row >= p.rows || column >= p.cols) return 0.0f;
    return load_element<f32>(p.product, row, column);
}

// A thread has one column, in several rows.
DEVICE void add(const Kronecker& p) {
    const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.cols) return;
    const u32 j = column / p.q, y = column % p.q;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const u32 i = row / p.p, x = row % p.p;
        f32* out = row_of<f32>(p.product, row) + column;
        *out = fmaf(p.alpha * p.first[i * p.across + j], p.second[place(p, x, y)], *out);
    }
}

// A team of threads owns a block.
DEVICE void first_gradient(const Kronecker& p) {
    const RowTeam team(p.team_threads);
    if (team.row >= p.blocks) return;
    f32 sum = 0.0f;
    for (u32 at = team.lane; at < p.p * p.q; at += team.threads) {
        const u32 x = at / p.q, y = at % p.q;
        sum += gradient(p, team.row, x, y) * p.second[place(p, x, y)];
    }
    sum = team.sum(sum);
    if (team.lane == 0) p.sums[team.row] += p.alpha * sum;
}

DEVICE void second_gradient(const Kronecker& p) {
    add_column_sums(p.blocks, p.p * p.q, p.sums, [&](u32 block, u32 at) {
        const u32 x = p.transposed ? at % p.p : at / p.q, y = p.transposed ? at / p.p : at % p.q;
        return p.alpha * gradient(p, block, x, y) * p.first[block];
    });
}

KERNEL(kronecker_add, 256, Kronecker, add)
KERNEL(kronecker_first_gradient, 1024, Kronecker, first_gradient)
KERNEL(kronecker_second_gradient, 1024, Kronecker, second_gradient)
