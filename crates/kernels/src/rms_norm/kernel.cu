// RMSNorm over rows of any length.
//
// A team of threads owns a row. Its elements stay in registers from one pass to the next; only rows
// of more than one span are read again (spans.cuh).
#include "columns.cuh"
#include "spans.cuh"

template <typename Access>
DEVICE f32 sum_of_squares(const typename Access::Group& x) {
    f32 sum = 0.0f;
#pragma unroll
    for (u32 e = 0; e < Access::LEN; e++) sum += Access::get(x, e) * Access::get(x, e);
    return sum;
}

struct Forward {
    Matrix x, y;
    const f32* weight;
    f32* rstd;
    u32 rows, cols, team_threads;
    f32 eps, offset;
    u32 unused;
};

// The factors of a group of columns.
template <typename Access, typename Params>
DEVICE void load_weights(const Params& p, u32 group, f32 (&weights)[Access::LEN]) {
    Access::load_vector(p.weight, group, weights);
#pragma unroll
    for (u32 e = 0; e < Access::LEN; e++) weights[e] += p.offset;
}

// y = x * rstd * weight.
template <typename Access>
DEVICE void scale(const Forward& p, const typename Access::Group& x, f32 rstd, u32 row, u32 group) {
    f32 weights[Access::LEN];
    Access::load_vector(p.weight, group, weights);
    typename Access::Group out;
#pragma unroll
    for (u32 e = 0; e < Access::LEN; e++) {
        const f32 n = Access::get(x, e) * rstd;
        Access::set(p.y, out, e, fmaf(n, weights[e], n * p.offset));
    }
    Access::store(p.y, row, group, out);
}

DEVICE f32 reciprocal_root(const Forward& p, const RowTeam& team, f32 sum_of_squares) {
    const f32 rstd = 1.0f / sqrtf(sum_of_squares / f32(p.cols) + p.eps);
    if (team.lane == 0) p.rstd[team.row] = rstd;
    return rstd;
}

template <typename Access>
DEVICE void forward(const Forward& p) {
    const RowTeam team(p.team_threads);
    if (team.row >= p.rows) return;
    Spans spans(team, p.cols / Access::LEN);
    typename Access::Group x[SLOTS];
    const auto load = [&](u32 slot, u32 group) { x[slot] = Access::load_once(p.x, team.row, group); };
    f32 sum = 0.0f;
    spans.visit(load, [&](u32 slot, u32) { sum += sum_of_squares<Access>(x[slot]); });
    const f32 rstd = reciprocal_root(p, team, team.sum(sum));
    spans.visit(load, [&](u32 slot, u32 group) { scale<Access>(p, x[slot], rstd, team.row, group); });
}

// Forward of x += branch, where x is the residual stream.
struct AddForward {
    Forward norm;
    Matrix branch;
};

template <typename Access>
DEVICE void add_forward(const AddForward& p) {
    const Forward& norm = p.norm;
    const RowTeam team(norm.team_threads);
    if (team.row >= norm.rows) return;
    Spans spans(team, norm.cols / Access::LEN);
    typename Access::Group x[SLOTS], branch[SLOTS];
    const auto load = [&](u32 slot, u32 group) { x[slot] = Access::load(norm.x, team.row, group); };
    const auto load_both = [&](u32 slot, u32 group) {
        load(slot, group);
        branch[slot] = Access::load_once(p.branch, team.row, group);
    };
    f32 sum = 0.0f;
    spans.visit(load_both, [&](u32 slot, u32 group) {
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            Access::set(norm.x, x[slot], e, Access::get(x[slot], e) + Access::get(branch[slot], e));
        }
        Access::store(norm.x, team.row, group, x[slot]);
        sum += sum_of_squares<Access>(x[slot]);
    });
    const f32 rstd = reciprocal_root(norm, team, team.sum(sum));
    spans.visit(load, [&](u32 slot, u32 group) { scale<Access>(norm, x[slot], rstd, team.row, group); });
}

// y from x and the rstd that is there.
template <typename Access>
DEVICE void apply(const Forward& p) {
    const RowTeam team(p.team_threads);
    if (team.row >= p.rows) return;
    const f32 rstd = p.rstd[team.row];
    typename Access::Group x[SLOTS];
    Spans(team, p.cols / Access::LEN)
        .visit([&](u32 slot, u32 group) { x[slot] = Access::load_once(p.x, team.row, group); },
               [&](u32 slot, u32 group) { scale<Access>(p, x[slot], rstd, team.row, group); });
}

struct Backward {
    Matrix dy, x, dx;
    const f32* weight;
    const f32* rstd;
    f32* d_weight;
    u32 rows, cols, team_threads;
    f32 offset;
};

template <typename Access>
DEVICE void backward(const Backward& p) {
    const RowTeam team(p.team_threads);
    if (team.row >= p.rows) return;
    const f32 rstd = p.rstd[team.row];
    typename Access::Group dy[SLOTS], x[SLOTS];
    const auto load = [&](u32 slot, u32 group) {
        dy[slot] = Access::load_once(p.dy, team.row, group);
        x[slot] = Access::load_once(p.x, team.row, group);
    };
    Spans spans(team, p.cols / Access::LEN);
    f32 sum = 0.0f;
    spans.visit(load, [&](u32 slot, u32 group) {
        f32 weights[Access::LEN];
        load_weights<Access>(p, group, weights);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) sum += Access::get(dy[slot], e) * weights[e] * Access::get(x[slot], e);
    });
    const f32 slope = team.sum(sum) * rstd * rstd / f32(p.cols);
    spans.visit(load, [&](u32 slot, u32 group) {
        f32 weights[Access::LEN];
        load_weights<Access>(p, group, weights);
        auto dx = Access::load(p.dx, team.row, group);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            const f32 inner = Access::get(dy[slot], e) * weights[e] - Access::get(x[slot], e) * slope;
            Access::set(p.dx, dx, e, Access::get(dx, e) + inner * rstd);
        }
        Access::store(p.dx, team.row, group, dx);
    });
}

template <typename G, typename X>
DEVICE void backward_weight(const Backward& p) {
    add_column_sums(p.rows, p.cols, p.d_weight, [&](u32 row, u32 column) {
        return load_element<G>(p.dy, row, column) * p.rstd[row] * load_element<X>(p.x, row, column);
    });
}

KERNEL(rms_norm_forward_f32, 1024, Forward, forward<Packed<f32>>)
KERNEL(rms_norm_forward_bf16, 1024, Forward, forward<Packed<bf16>>)
KERNEL(rms_norm_forward_any, 1024, Forward, forward<Any>)
KERNEL(rms_norm_add_forward_f32, 1024, AddForward, add_forward<Packed<f32>>)
KERNEL(rms_norm_add_forward_bf16, 1024, AddForward, add_forward<Packed<bf16>>)
KERNEL(rms_norm_add_forward_any, 1024, AddForward, add_forward<Any>)
KERNEL(rms_norm_apply_f32, 1024, Forward, apply<Packed<f32>>)
KERNEL(rms_norm_apply_bf16, 1024, Forward, apply<Packed<bf16>>)
KERNEL(rms_norm_apply_any, 1024, Forward, apply<Any>)
KERNEL(rms_norm_backward_f32, 1024, Backward, backward<Packed<f32>>)
KERNEL(rms_norm_backward_bf16, 1024, Backward, backward<Packed<bf16>>)
KERNEL(rms_norm_backward_any, 1024, Backward, backward<Any>)
KERNEL(rms_norm_backward_weight_f32_f32, 1024, Backward, (backward_weight<f32, f32>))
KERNEL(rms_norm_backward_weight_f32_bf16, 1024, Backward, (backward_weight<f32, bf16>))
KERNEL(rms_norm_backward_weight_bf16_f32, 1024, Backward, (backward_weight<bf16, f32>))
KERNEL(rms_norm_backward_weight_bf16_bf16, 1024, Backward, (backward_weight<bf16, bf16>))
