// Layer norm over rows of any length.
//
// A team of threads owns a row. Its elements stay in registers from one pass to the next; only rows
// of more than one span are read again (spans.cuh).
#include "columns.cuh"
#include "spans.cuh"

struct Forward {
    Matrix x, y;
    const f32* weight;
    const f32* bias;
    f32* statistics;  // mean and reciprocal deviation of each row
    u32 rows, cols, team_threads;
    f32 eps;
};

// y = (x - mean) * rstd * weight + bias.
template <typename Access>
DEVICE void apply_group(const Forward& p, const typename Access::Group& x, f32 mean, f32 rstd, u32 row, u32 group) {
    f32 weights[Access::LEN], biases[Access::LEN];
    Access::load_vector(p.weight, group, weights);
    Access::load_vector(p.bias, group, biases);
    typename Access::Group out;
#pragma unroll
    for (u32 e = 0; e < Access::LEN; e++) {
        Access::set(p.y, out, e, (Access::get(x, e) - mean) * rstd * weights[e] + biases[e]);
    }
    Access::store(p.y, row, group, out);
}

template <typename Access>
DEVICE f32 sum_of(const typename Access::Group& x) {
    f32 sum = 0.0f;
#pragma unroll
    for (u32 e = 0; e < Access::LEN; e++) sum += Access::get(x, e);
    return sum;
}

// What follows the visit that has summed x: the variance, then y.
template <typename Access, typename Load>
DEVICE void finish(const Forward& p, const RowTeam& team, Spans& spans, f32 sum, const Load& load,
                   typename Access::Group (&x)[SLOTS]) {
    const f32 mean = team.sum(sum) / f32(p.cols);
    f32 squares = 0.0f;
    spans.visit(load, [&](u32 slot, u32) {
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            const f32 centred = Access::get(x[slot], e) - mean;
            squares += centred * centred;
        }
    });
    const f32 rstd = 1.0f / sqrtf(team.sum(squares) / f32(p.cols) + p.eps);
    if (team.lane == 0) {
        p.statistics[2 * u64(team.row)] = mean;
        p.statistics[2 * u64(team.row) + 1] = rstd;
    }
    spans.visit(load, [&](u32 slot, u32 group) { apply_group<Access>(p, x[slot], mean, rstd, team.row, group); });
}

template <typename Access>
DEVICE void forward(const Forward& p) {
    const RowTeam team(p.team_threads);
    if (team.row >= p.rows) return;
    Spans spans(team, p.cols / Access::LEN);
    typename Access::Group x[SLOTS];
    const auto load = [&](u32 slot, u32 group) { x[slot] = Access::load_once(p.x, team.row, group); };
    f32 sum = 0.0f;
    spans.visit(load, [&](u32 slot, u32) { sum += sum_of<Access>(x[slot]); });
    finish<Access>(p, team, spans, sum, load, x);
}

// Forward of x += branch, where x is the residual stream.
struct AddForward {
    Forward norm;
    Matrix branch;
};

template <typename Access>
DEVICE void add_forward(const AddForward& p) {
    const Matrix& residual = p.norm.x;
    const RowTeam team(p.norm.team_threads);
    if (team.row >= p.norm.rows) return;
    Spans spans(team, p.norm.cols / Access::LEN);
    typename Access::Group x[SLOTS], branch[SLOTS];
    const auto load = [&](u32 slot, u32 group) { x[slot] = Access::load(residual, team.row, group); };
    const auto load_both = [&](u32 slot, u32 group) {
        load(slot, group);
        branch[slot] = Access::load_once(p.branch, team.row, group);
    };
    f32 sum = 0.0f;
    spans.visit(load_both, [&](u32 slot, u32 group) {
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            Access::set(residual, x[slot], e, Access::get(x[slot], e) + Access::get(branch[slot], e));
        }
        Access::store(residual, team.row, group, x[slot]);
        sum += sum_of<Access>(x[slot]);
    });
    finish<Access>(p.norm, team, spans, sum, load, x);
}

// y from x and the statistics that are there.
template <typename Access>
DEVICE void apply(const Forward& p) {
    const RowTeam team(p.team_threads);
    if (team.row >= p.rows) return;
    const f32 mean = p.statistics[2 * u64(team.row)], rstd = p.statistics[2 * u64(team.row) + 1];
    typename Access::Group x[SLOTS];
    Spans(team, p.cols / Access::LEN)
        .visit([&](u32 slot, u32 group) { x[slot] = Access::load_once(p.x, team.row, group); },
               [&](u32 slot, u32 group) { apply_group<Access>(p, x[slot], mean, rstd, team.row, group); });
}

struct Backward {
    Matrix dy, x, dx;
    const f32* weight;
    const f32* statistics;
    f32* d_weight;
    u32 rows, cols, team_threads, unused;
};

template <typename Access>
DEVICE void backward(const Backward& p) {
    const RowTeam team(p.team_threads);
    if (team.row >= p.rows) return;
    const f32 mean = p.statistics[2 * u64(team.row)], rstd = p.statistics[2 * u64(team.row) + 1];
    typename Access::Group dy[SLOTS], x[SLOTS];
    const auto load = [&](u32 slot, u32 group) {
        dy[slot] = Access::load_once(p.dy, team.row, group);
        x[slot] = Access::load_once(p.x, team.row, group);
    };
    Spans spans(team, p.cols / Access::LEN);
    f32 offset = 0.0f, slope = 0.0f;
    spans.visit(load, [&](u32 slot, u32 group) {
        f32 weights[Access::LEN];
        Access::load_vector(p.weight, group, weights);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            const f32 g = Access::get(dy[slot], e) * weights[e];
            offset += g;
            slope += g * ((Access::get(x[slot], e) - mean) * rstd);
        }
    });
    offset = team.sum(offset) / f32(p.cols);
    slope = team.sum(slope) / f32(p.cols);
    spans.visit(load, [&](u32 slot, u32 group) {
        f32 weights[Access::LEN];
        Access::load_vector(p.weight, group, weights);
        auto dx = Access::load(p.dx, team.row, group);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            const f32 normed = (Access::get(x[slot], e) - mean) * rstd;
            const f32 inner = Access::get(dy[slot], e) * weights[e] - offset - normed * slope;
            Access::set(p.dx, dx, e, Access::get(dx, e) + inner * rstd);
        }
        Access::store(p.dx, team.row, group, dx);
    });
}

template <typename G, typename X>
DEVICE void backward_weight(const Backward& p) {
    add_column_sums(p.rows, p.cols, p.d_weight, [&](u32 row, u32 column) {
        const f32 mean = p.statistics[2 * u64(row)], rstd = p.statistics[2 * u64(row) + 1];
        return load_element<G>(p.dy, row, column) * ((load_element<X>(p.x, row, column) - mean) * rstd);
    });
}

KERNEL(layer_norm_forward_f32, 1024, Forward, forward<Packed<f32>>)
KERNEL(layer_norm_forward_bf16, 1024, Forward, forward<Packed<bf16>>)
KERNEL(layer_norm_forward_any, 1024, Forward, forward<Any>)
KERNEL(layer_norm_add_forward_f32, 1024, AddForward, add_forward<Packed<f32>>)
KERNEL(layer_norm_add_forward_bf16, 1024, AddForward, add_forward<Packed<bf16>>)
KERNEL(layer_norm_add_forward_any, 1024, AddForward, add_forward<Any>)
KERNEL(layer_norm_apply_f32, 1024, Forward, apply<Packed<f32>>)
KERNEL(layer_norm_apply_bf16, 1024, Forward, apply<Packed<bf16>>)
KERNEL(layer_norm_apply_any, 1024, Forward, apply<Any>)
KERNEL(layer_norm_backward_f32, 1024, Backward, backward<Packed<f32>>)
KERNEL(layer_norm_backward_bf16, 1024, Backward, backward<Packed<bf16>>)
KERNEL(layer_norm_backward_any, 1024, Backward, backward<Any>)
KERNEL(layer_norm_backward_weight_f32_f32, 1024, Backward, (backward_weight<f32, f32>))
KERNEL(layer_norm_backward_weight_f32_bf16, 1024, Backward, (backward_weight<f32, bf16>))
KERNEL(layer_norm_backward_weight_bf16_f32, 1024, Backward, (backward_weight<bf16, f32>))
KERNEL(layer_norm_backward_weight_bf16_bf16, 1024, Backward, (backward_weight<bf16, bf16>))
