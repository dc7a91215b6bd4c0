// Unit vectors along the columns of a matrix. A block has one of them or, where they are made orthogonal, all, one
// after the other. A thread always has the same elements, so that only sums need barriers.
#include "reduce.cuh"

struct Directions {
    // [n, r], and their gradient.
    const f32* vectors;
    f32* d_vectors;
    // [r, n]: the directions, or their gradient.
    f32* directions;
    // [r, n] twice, and r.
    f64* scratch;
    u32 n, rank;
    u32 orthogonal, unused;
};

struct Own {
    const Directions& p;
    // Directions of this block.
    u32 first, last;

    DEVICE explicit Own(const Directions& p)
        : p(p), first(p.orthogonal ? 0 : blockIdx.x), last(p.orthogonal ? p.rank : blockIdx.x + 1) {}

    DEVICE f64* vector(u32 i) const { return p.scratch + static_cast<u64>(i) * p.n; }
    DEVICE f64* gradient(u32 i) const { return vector(p.rank + i); }
    DEVICE f64* along() const { return vector(2 * p.rank); }
};

template <typename Body>
DEVICE void each(const Own& own, const Body& body) {
    for (u32 k = threadIdx.x; k < own.p.n; k += blockDim.x) body(k);
}

DEVICE f64 dot(const Own& own, const f64* a, const f64* b) {
    f64 sum = 0.0;
    each(own, [&](u32 k) { sum += a[k] * b[k]; });
    return block_sum(sum);
}

// Vector i becomes v_i, from the directions before it, whose parts in it are kept. Returns its norm.
DEVICE f64 make(const Own& own, u32 i) {
    f64* const v = own.vector(i);
    each(own, [&](u32 k) { v[k] = static_cast<f64>(own.p.vectors[static_cast<u64>(k) * own.p.rank + i]); });
    for (u32 j = own.first; j < i; ++j) {
        const f64* q = own.vector(j);
        const f64 part = dot(own, q, v);
        each(own, [&](u32 k) { v[k] -= part * q[k]; });
        if (threadIdx.x == 0) own.along()[j] = part;
    }
    return sqrt(dot(own, v, v));
}

// As make, and becomes a direction.
DEVICE void make_unit(const Own& own, u32 i) {
    f64* const v = own.vector(i);
    const f64 norm = make(own, i);
    each(own, [&](u32 k) { v[k] /= norm; });
}

DEVICE void forward(const Directions& p) {
    const Own own(p);
    for (u32 i = own.first; i < own.last; ++i) {
        make_unit(own, i);
        const f64* q = own.vector(i);
        each(own, [&](u32 k) { p.directions[static_cast<u64>(i) * p.n + k] = static_cast<f32>(q[k]); });
    }
}

DEVICE void gradient(const Directions& p) {
    const Own own(p);
    for (u32 i = own.first; i < own.last; ++i) {
        make_unit(own, i);
        f64* const d = own.gradient(i);
        each(own, [&](u32 k) { d[k] = static_cast<f64>(p.directions[static_cast<u64>(i) * p.n + k]); });
    }
    for (u32 i = own.last; i-- > own.first;) {
        f64 *const v = own.vector(i), *const d = own.gradient(i);
        const f64 norm = make(own, i);
        const f64 through = dot(own, v, d) / norm;
        each(own, [&](u32 k) { d[k] = (d[k] - through * (v[k] / norm)) / norm; });
        // What thread 0 has kept.
        __syncthreads();
        // v_{j+1} = v_j - (q_j . v_j) q_j, from the last j to the first.
        for (u32 j = i; j-- > own.first;) {
            const f64* q = own.vector(j);
            f64* const d_q = own.gradient(j);
            const f64 part = own.along()[j], back = dot(own, d, q);
            each(own, [&](u32 k) {
                v[k] += part * q[k];
                d_q[k] -= back * v[k] + part * d[k];
                d[k] -= back * q[k];
            });
        }
        each(own, [&](u32 k) { p.d_vectors[static_cast<u64>(k) * p.rank + i] += static_cast<f32>(d[k]); });
        // Before thread 0 keeps others.
        __syncthreads();
    }
}

KERNEL(directions_forward, 512, Directions, forward)
KERNEL(directions_gradient, 512, Directions, gradient)
