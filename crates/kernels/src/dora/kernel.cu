// DoRA: norms of the rows of a weight with its update, and the scaling of an output by them.
#include "columns.cuh"
#include "rows.cuh"

struct Norms {
    Matrix weight;
    const f32 *b, *cross, *spread;
    f32* norms;
    u32 rows, cols, rank, team_threads;
    f32 scale;
    u32 unused;
};

// A team of threads owns a row of W.
template <typename Access>
DEVICE void row_norms(const Norms& p) {
    const RowTeam team(p.team_threads);
    if (team.row >= p.rows) return;
    f32 sum = 0.0f;
    for (u32 group = team.lane; group < p.cols / Access::LEN; group += team.threads) {
        const auto w = Access::load_once(p.weight, team.row, group);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) sum += Access::get(w, e) * Access::get(w, e);
    }
    for (u32 r = team.lane; r < p.rank; r += team.threads) {
        const u64 at = u64(r) * p.rows + team.row;
        sum += p.scale * p.b[u64(team.row) * p.rank + r] * (2.0f * p.cross[at] + p.scale * p.spread[at]);
    }
    sum = team.sum(sum);
    if (team.lane == 0) p.norms[team.row] = sqrtf(sum > 0.0f ? sum : 0.0f);
}

struct Scale {
    Matrix y;
    const f32 *magnitude, *norms;
    u32 rows, cols;
};

// A thread has one group of columns, in several rows.
template <typename Access>
DEVICE void scale(const Scale& p) {
    const u32 group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= p.cols / Access::LEN) return;
    f32 factor[Access::LEN], norms[Access::LEN];
    Access::load_vector(p.magnitude, group, factor);
    Access::load_vector(p.norms, group, norms);
#pragma unroll
    for (u32 e = 0; e < Access::LEN; e++) factor[e] /= norms[e];
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        auto y = Access::load(p.y, row, group);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) Access::set(p.y, y, e, Access::get(y, e) * factor[e]);
        Access::store(p.y, row, group, y);
    }
}

struct Backward {
    Matrix dy, u;
    const f32* norms;
    f32* d_magnitude;
    u32 rows, cols;
};

DEVICE void backward(const Backward& p) {
    add_column_sums(p.rows, p.cols, p.d_magnitude, [&](u32 row, u32 column) {
        return Any::load(p.dy, row, column).value * Any::load(p.u, row, column).value / p.norms[column];
    });
}

KERNEL(dora_row_norms_f32, 1024, Norms, row_norms<Packed<f32>>)
KERNEL(dora_row_norms_bf16, 1024, Norms, row_norms<Packed<bf16>>)
KERNEL(dora_row_norms_any, 1024, Norms, row_norms<Any>)
KERNEL(dora_scale_f32, 256, Scale, scale<Packed<f32>>)
KERNEL(dora_scale_bf16, 256, Scale, scale<Packed<bf16>>)
KERNEL(dora_scale_any, 256, Scale, scale<Any>)
KERNEL(dora_backward, 1024, Backward, backward)
