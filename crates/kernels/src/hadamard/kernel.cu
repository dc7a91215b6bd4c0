// Products element by element, and their sums. Operands of one row or one column stand for all.
#include "columns.cuh"
#include "rows.cuh"

struct Operand {
    Matrix matrix;
    // 0 where the only row, or column, stands for all.
    u32 row_step, column_step;
};

DEVICE f32 at(const Operand& of, u32 row, u32 column) {
    return Any::load(of.matrix, row * of.row_step, column * of.column_step).value;
}

struct Add {
    Matrix out;
    Operand a, b;
    u32 rows, cols;
    f32 beta, alpha;
};

// A thread has one column, in several rows.
DEVICE void add(const Add& p) {
    const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.cols) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const f32 product = at(p.a, row, column) * at(p.b, row, column);
        const f32 old = p.beta == 0.0f ? 0.0f : p.beta * Any::load(p.out, row, column).value;
        Any::store(p.out, row, column, {fmaf(p.alpha, product, old)});
    }
}

struct Scale {
    Matrix out;
    Operand b;
    u32 rows, cols;
    f32 offset;
    u32 unused;
};

DEVICE void scale(const Scale& p) {
    const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.cols) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const f32 factor = p.offset + at(p.b, row, column);
        Any::store(p.out, row, column, {Any::load(p.out, row, column).value * factor});
    }
}

struct Sums {
    f32* sums;
    Operand a, b;
    u32 rows, cols;
    f32 alpha;
    u32 team_threads;
};

// A team of threads owns a row.
DEVICE void row_sums(const Sums& p) {
    const RowTeam team(p.team_threads);
    if (team.row >= p.rows) return;
    f32 sum = 0.0f;
    for (u32 column = team.lane; column < p.cols; column += team.threads) {
        sum += at(p.a, team.row, column) * at(p.b, team.row, column);
    }
    sum = team.sum(sum);
    if (team.lane == 0) p.sums[team.row] += p.alpha * sum;
}

DEVICE void column_sums(const Sums& p) {
    add_column_sums(p.rows, p.cols, p.sums, [&](u32 row, u32 column) {
        return p.alpha * at(p.a, row, column) * at(p.b, row, column);
    });
}

KERNEL(hadamard_add, 256, Add, add)
KERNEL(hadamard_scale, 256, Scale, scale)
KERNEL(hadamard_row_sums, 1024, Sums, row_sums)
KERNEL(hadamard_column_sums, 1024, Sums, column_sums)
