// One over the product of the norms of two factors. A block of threads has a rank.
#include "reduce.cuh"

struct NormProduct {
    // [R, n] and [m, R], and their gradients.
    const f32 *a, *b;
    f32 *d_a, *d_b;
    // [R]: the inverses, or their gradient.
    f32* inverses;
    u32 rank, inputs, outputs;
    f32 least;
};

struct Norms {
    f64 a, b, inverse;

    DEVICE explicit Norms(const NormProduct& p) : a(0.0), b(0.0) {
        const u32 k = blockIdx.x;
        for (u32 i = threadIdx.x; i < p.inputs; i += blockDim.x) {
            const f64 value = p.a[static_cast<u64>(k) * p.inputs + i];
            a += value * value;
        }
        for (u32 i = threadIdx.x; i < p.outputs; i += blockDim.x) {
            const f64 value = p.b[static_cast<u64>(i) * p.rank + k];
            b += value * value;
        }
        block_sum2(a, b);
        a = sqrt(a);
        b = sqrt(b);
        const f64 least = p.least;
        inverse = 1.0 / ((a > least ? a : least) * (b > least ? b : least));
    }
};

DEVICE void inverse(const NormProduct& p) {
    const Norms norms(p);
    if (threadIdx.x == 0) p.inverses[blockIdx.x] = static_cast<f32>(norms.inverse);
}

DEVICE void inverse_gradients(const NormProduct& p) {
    const Norms norms(p);
    const u32 k = blockIdx.x;
    const f64 along = static_cast<f64>(p.inverses[k]) * norms.inverse, least = p.least;
    const f32 of_a = norms.a > least ? static_cast<f32>(along / (norms.a * norms.a)) : 0.0f;
    const f32 of_b = norms.b > least ? static_cast<f32>(along / (norms.b * norms.b)) : 0.0f;
    for (u32 i = threadIdx.x; i < p.inputs; i += blockDim.x) {
        const u64 at = static_cast<u64>(k) * p.inputs + i;
        p.d_a[at] -= of_a * p.a[at];
    }
    for (u32 i = threadIdx.x; i < p.outputs; i += blockDim.x) {
        const u64 at = static_cast<u64>(i) * p.rank + k;
        p.d_b[at] -= of_b * p.b[at];
    }
}

KERNEL(norm_product_inverse, 512, NormProduct, inverse)
KERNEL(norm_product_inverse_gradients, 512, NormProduct, inverse_gradients)
