// RMSNorm and rotation of heads. A head belongs to a team of lanes, a power of two of them, so that
// narrow heads share a warp; a lane has one group of a rotated pair, or one of the rest, at a time.
#include "columns.cuh"

struct HeadNorm {
    Matrix x, out;  // out is d in the backward pass
    const f32* weight;
    const f32* cos;
    const f32* sin;
    f32* rstd;      // [rows, heads]; this and what follows for the gradient of the weight
    f32* sums;      // [heads, head_dim]
    f32* d_weight;
    f32 offset, eps;
    u32 rows, heads, head_dim, half, team, unused;
};

// The groups of a head that a lane visits. Pairs first: `low` with `high`; then what is not rotated.
template <typename Access>
struct Head {
    static constexpr u32 LEN = Access::LEN;
    const HeadNorm& p;
    u32 lane, row, first, pairs, items;
    bool valid;

    DEVICE explicit Head(const HeadNorm& params) : p(params) {
        const u64 teams_per_block = blockDim.x / p.team;
        const u64 index = blockIdx.x * teams_per_block + threadIdx.x / p.team;
        lane = threadIdx.x % p.team;
        valid = index < u64(p.rows) * p.heads;
        row = static_cast<u32>(index / p.heads);
        first = static_cast<u32>(index % p.heads) * (p.head_dim / LEN);
        pairs = p.half / LEN;
        items = valid ? p.head_dim / LEN - pairs : 0;
    }

    // body(low, high, paired): groups of a head; of an unpaired one `low` alone.
    template <typename Body>
    DEVICE void visit(const Body& body) const {
        for (u32 item = lane; item < items; item += p.team) {
            const bool paired = item < pairs;
            body(paired ? item : item + pairs, item + pairs, paired);
        }
    }

    // The sum over the team. All lanes of the warp call it.
    DEVICE f32 sum(f32 v) const {
        for (u32 mask = p.team / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
        return v;
    }

    DEVICE f32 rstd(f32 sum_of_squares) const {
        return 1.0f / sqrtf(sum_of_squares / f32(p.head_dim) + p.eps);
    }

    DEVICE void angles(u32 pair, f32 (&cos)[LEN], f32 (&sin)[LEN]) const {
        Access::load_vector(p.cos + u64(row) * p.half, pair, cos);
        Access::load_vector(p.sin + u64(row) * p.half, pair, sin);
    }

    // Elements of a group times weight.
    DEVICE void weights(u32 group, f32 (&to)[LEN]) const {
        Access::load_vector(p.weight, group, to);
#pragma unroll
        for (u32 e = 0; e < LEN; e++) to[e] += p.offset;
    }

    DEVICE typename Access::Group x(u32 group) const { return Access::load(p.x, row, first + group); }
    DEVICE typename Access::Group out(u32 group) const { return Access::load(p.out, row, first + group); }
    DEVICE void store(u32 group, const typename Access::Group& v) const {
        Access::store(p.out, row, first + group, v);
    }
};

template <typename Access>
DEVICE f32 squares(const typename Access::Group& x) {
    f32 sum = 0.0f;
#pragma unroll
    for (u32 e = 0; e < Access::LEN; e++) sum += Access::get(x, e) * Access::get(x, e);
    return sum;
}

template <typename Access>
DEVICE void forward(const HeadNorm& p) {
    constexpr u32 LEN = Access::LEN;
    const Head<Access> head(p);
    f32 sum = 0.0f;
    head.visit([&](u32 low, u32 high, bool paired) {
        sum += squares<Access>(head.x(low));
        if (paired) sum += squares<Access>(head.x(high));
    });
    const f32 rstd = head.rstd(head.sum(sum));
    head.visit([&](u32 low, u32 high, bool paired) {
        auto a = head.x(low);
        f32 weight[LEN];
        head.weights(low, weight);
        if (!paired) {
#pragma unroll
            for (u32 e = 0; e < LEN; e++) Access::set(p.out, a, e, Access::get(a, e) * rstd * weight[e]);
            head.store(low, a);
            return;
        }
        auto b = head.x(high);
        f32 high_weight[LEN], cos[LEN], sin[LEN];
        head.weights(high, high_weight);
        head.angles(low, cos, sin);
#pragma unroll
        for (u32 e = 0; e < LEN; e++) {
            const f32 u = Access::get(a, e) * rstd * weight[e], v = Access::get(b, e) * rstd * high_weight[e];
            Access::set(p.out, a, e, u * cos[e] - v * sin[e]);
            Access::set(p.out, b, e, v * cos[e] + u * sin[e]);
        }
        head.store(low, a);
        head.store(high, b);
    });
}

// The gradients of a pair, or of a single group, before the rotation.
template <typename Access>
DEVICE void rotate_back(const Head<Access>& head, u32 low, u32 high, bool paired, f32 (&a)[Access::LEN],
                        f32 (&b)[Access::LEN]) {
    constexpr u32 LEN = Access::LEN;
    const auto d_low = head.out(low);
#pragma unroll
    for (u32 e = 0; e < LEN; e++) a[e] = Access::get(d_low, e);
    if (!paired) return;
    const auto d_high = head.out(high);
    f32 cos[LEN], sin[LEN];
    head.angles(low, cos, sin);
#pragma unroll
    for (u32 e = 0; e < LEN; e++) {
        const f32 u = a[e], v = Access::get(d_high, e);
        a[e] = u * cos[e] + v * sin[e];
        b[e] = v * cos[e] - u * sin[e];
    }
}

// What of dy, x and weight goes into the two sums of a head.
template <typename Access>
DEVICE void add_sums(const Head<Access>& head, u32 group, const f32 (&dy)[Access::LEN], f32& square, f32& product) {
    const auto x = head.x(group);
    f32 weight[Access::LEN];
    head.weights(group, weight);
#pragma unroll
    for (u32 e = 0; e < Access::LEN; e++) {
        square += Access::get(x, e) * Access::get(x, e);
        product += dy[e] * weight[e] * Access::get(x, e);
    }
}

template <typename Access>
DEVICE void store_gradient(const Head<Access>& head, u32 group, const f32 (&dy)[Access::LEN], f32 rstd, f32 slope) {
    const auto x = head.x(group);
    f32 weight[Access::LEN];
    head.weights(group, weight);
    typename Access::Group d;
#pragma unroll
    for (u32 e = 0; e < Access::LEN; e++) {
        Access::set(head.p.out, d, e, (dy[e] * weight[e] - Access::get(x, e) * slope) * rstd);
    }
    head.store(group, d);
}

template <typename Access>
DEVICE void backward_in_place(const HeadNorm& p) {
    constexpr u32 LEN = Access::LEN;
    const Head<Access> head(p);
    f32 square = 0.0f, product = 0.0f;
    head.visit([&](u32 low, u32 high, bool paired) {
        f32 a[LEN], b[LEN];
        rotate_back(head, low, high, paired, a, b);
        add_sums(head, low, a, square, product);
        if (paired) add_sums(head, high, b, square, product);
    });
    const f32 rstd = head.rstd(head.sum(square));
    const f32 slope = head.sum(product) * rstd * rstd / f32(p.head_dim);
    // A lane writes what itself alone reads.
    head.visit([&](u32 low, u32 high, bool paired) {
        f32 a[LEN], b[LEN];
        rotate_back(head, low, high, paired, a, b);
        store_gradient(head, low, a, rstd, slope);
        if (paired) store_gradient(head, high, b, rstd, slope);
    });
}

// rstd of every head, for the gradient of the weight.
template <typename Access>
DEVICE void statistics(const HeadNorm& p) {
    const Head<Access> head(p);
    f32 sum = 0.0f;
    head.visit([&](u32 low, u32 high, bool paired) {
        sum += squares<Access>(head.x(low));
        if (paired) sum += squares<Access>(head.x(high));
    });
    const f32 rstd = head.rstd(head.sum(sum));
    const u32 which = head.first / (p.head_dim / Access::LEN);
    if (head.valid && head.lane == 0) p.rstd[u64(head.row) * p.heads + which] = rstd;
}

// Adds each column's share of the gradient of the weight to `sums`; the heads are still apart.
template <typename G, typename X>
DEVICE void backward_weight(const HeadNorm& p) {
    add_column_sums(p.rows, p.heads * p.head_dim, p.sums, [&](u32 row, u32 column) {
        const u32 head = column / p.head_dim, i = column % p.head_dim, pair = i % maximum(p.half, 1u);
        f32 dy = load_element<G>(p.out, row, column);
        if (i < 2 * p.half) {
            const bool low = i < p.half;
            const f32 other = load_element<G>(p.out, row, low ? column + p.half : column - p.half);
            const u64 at = u64(row) * p.half + pair;
            dy = dy * p.cos[at] + (low ? other : -other) * p.sin[at];
        }
        return dy * load_element<X>(p.x, row, column) * p.rstd[u64(row) * p.heads + head];
    });
}

// Adds the heads of `sums` to the gradient of the weight.
DEVICE void add_heads(const HeadNorm& p) {
    add_column_sums(p.heads, p.head_dim, p.d_weight,
                    [&](u32 head, u32 column) { return p.sums[u64(head) * p.head_dim + column]; });
}

KERNEL(qk_norm_forward_f32, 128, HeadNorm, forward<Packed<f32>>)
// May spill on sm_120a: 24 bytes outside of its loops, one load and store a thread.
KERNEL(qk_norm_forward_bf16, 128, HeadNorm, forward<Packed<bf16>>)
KERNEL(qk_norm_forward_any, 128, HeadNorm, forward<Any>)
KERNEL(qk_norm_backward_in_place_f32, 128, HeadNorm, backward_in_place<Packed<f32>>)
KERNEL(qk_norm_backward_in_place_bf16, 128, HeadNorm, backward_in_place<Packed<bf16>>)
KERNEL(qk_norm_backward_in_place_any, 128, HeadNorm, backward_in_place<Any>)
KERNEL(qk_norm_statistics_f32, 128, HeadNorm, statistics<Packed<f32>>)
KERNEL(qk_norm_statistics_bf16, 128, HeadNorm, statistics<Packed<bf16>>)
KERNEL(qk_norm_statistics_any, 128, HeadNorm, statistics<Any>)
// May spill on sm_90a and sm_120a: 8 and 16 bytes of loop bounds, in a kernel of trained norms alone.
KERNEL(qk_norm_backward_weight_f32_f32, 1024, HeadNorm, (backward_weight<f32, f32>))
KERNEL(qk_norm_backward_weight_f32_bf16, 1024, HeadNorm, (backward_weight<f32, bf16>))
KERNEL(qk_norm_backward_weight_bf16_f32, 1024, HeadNorm, (backward_weight<bf16, f32>))
KERNEL(qk_norm_backward_weight_bf16_bf16, 1024, HeadNorm, (backward_weight<bf16, bf16>))
KERNEL(qk_norm_add_heads, 1024, HeadNorm, add_heads)
