// The norm of the flat gradient, the factor it is scaled by, and AdamW.
#include "types.cuh"
#include "reduce.cuh"

// What changes from step to step; a group per entry of the table behind it.
struct Settings {
    f64 divisor;  // of the gradient: trained tokens
    f64 max_norm; // infinity: no clipping
    f32 beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
    u32 groups;
};

struct Group {
    u64 start, end;
    f32 keep, step_size, inverse_sqrt_bias2;
    u32 unused;
};

struct Outcome {
    f64 norm; // of the gradient divided by the divisor
    f32 grad_scale;
    u32 finite; // norm and loss are; else nothing is updated
};

constexpr u32 THREADS = 256;

struct Squares {
    const f32* grads;
    f64* partial; // [gridDim.x]
    u64 len;
};

// One f64 sum of squares per block; which elements it covers depends on the length alone.
DEVICE void sum_of_squares(const Squares& p) {
    const bool vectors = aligned_16(p.grads);
    const u64 whole = vectors ? p.len / 4 * 4 : 0;
    const u64 first = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x;
    const u64 stride = static_cast<u64>(gridDim.x) * THREADS;
    f64 sum = 0.0;
    for (u64 i = 4 * first; i < whole; i += 4 * stride) {
        const Vec16<f32> g = load_nc_16(p.grads + i);
#pragma unroll
        for (u32 l = 0; l < 4; l++) {
            sum = fma(static_cast<f64>(g[l]), static_cast<f64>(g[l]), sum);
        }
    }
    for (u64 i = whole + first; i < p.len; i += stride) {
        sum = fma(static_cast<f64>(p.grads[i]), static_cast<f64>(p.grads[i]), sum);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        p.partial[blockIdx.x] = sum;
    }
}

struct Scale {
    const Settings* settings;
    const f64* partial; // [partials]
    const f64* loss;    // may be null
    Outcome* outcome;
    u64 partials;
};

DEVICE bool is_finite(f64 x) { return x - x == 0.0; }

// One block. As torch.nn.utils.clip_grad_norm_: max_norm / (norm + 1e-6), at most 1.
DEVICE void scale(const Scale& p) {
    f64 sum = 0.0;
    for (u64 i = threadIdx.x; i < p.partials; i += THREADS) {
        sum += p.partial[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        const Settings& s = *p.settings;
        const f64 norm = sqrt(sum) / s.divisor, clip = s.max_norm / (norm + 1e-6);
        const bool finite = is_finite(norm) && (p.loss == nullptr || is_finite(*p.loss));
        *p.outcome = {norm, static_cast<f32>((clip < 1.0 ? clip : 1.0) / s.divisor), finite};
    }
}

struct Update {
    const Settings* settings;
    const Group* groups;
    const Outcome* outcome;
    f32* params;
    f32* grads;
    f32* m;
    f32* v;
    bf16* shadow; // may be null
    u64 len;
    u32 vectors;    // all may be read by 16 bytes
    u32 zero_grads;
};

// What one element needs besides itself.
struct Scalars {
    f32 grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
    f32 keep, step_size, inverse_sqrt_bias2;
};

DEVICE void update(const Scalars& s, f32& param, f32 grad, f32& m, f32& v) {
    const f32 g = grad * s.grad_scale;
    m = fmaf(m, s.beta1, g * s.one_minus_beta1);
    v = fmaf(v, s.beta2, g * g * s.one_minus_beta2);
    const f32 denominator = fmaf(sqrtf(v), s.inverse_sqrt_bias2, s.eps);
    param = fmaf(m / denominator, -s.step_size, param * s.keep);
}

DEVICE void update_one(const Update& p, const Scalars& s, u64 i) {
    update(s, p.params[i], p.grads[i], p.m[i], p.v[i]);
    if (p.shadow != nullptr) {
        p.shadow[i] = from_f32<bf16>(p.params[i]);
    }
}

DEVICE void update_four(const Update& p, const Scalars& s, u64 i) {
    Vec16<f32> param = load_16(p.params + i), m = load_16(p.m + i), v = load_16(p.v + i);
    const Vec16<f32> grad = load_16(p.grads + i);
    Vec<bf16, 4> shadow;
#pragma unroll
    for (u32 l = 0; l < 4; l++) {
        update(s, param[l], grad[l], m[l], v[l]);
        shadow[l] = from_f32<bf16>(param[l]);
    }
    store_16(p.params + i, param);
    store_16(p.m + i, m);
    store_16(p.v + i, v);
    if (p.shadow != nullptr) {
        *reinterpret_cast<Vec<bf16, 4>*>(p.shadow + i) = shadow;
    }
}

// Elements start..end of one group, by the whole block.
DEVICE void update_range(const Update& p, const Scalars& s, u64 start, u64 end) {
    const u64 head = p.vectors ? minimum((start + 3) / 4 * 4, end) : end;
    const u64 tail = p.vectors ? maximum(end / 4 * 4, head) : end;
    for (u64 i = start + threadIdx.x; i < head; i += THREADS) {
        update_one(p, s, i);
    }
    for (u64 i = head + 4 * threadIdx.x; i < tail; i += 4 * THREADS) {
        update_four(p, s, i);
    }
    for (u64 i = tail + threadIdx.x; i < end; i += THREADS) {
        update_one(p, s, i);
    }
}

constexpr u64 SPAN = 4096; // elements of a block

// Index of the first group that ends behind `at`; groups are ordered.
DEVICE u32 first_group(const Group* groups, u32 count, u64 at) {
    u32 low = 0, high = count;
    while (low < high) {
        const u32 middle = (low + high) / 2;
        if (groups[middle].end > at) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

DEVICE void step(const Update& p) {
    const u64 start = blockIdx.x * SPAN, end = minimum(start + SPAN, p.len);
    const Settings& settings = *p.settings;
    if (p.outcome->finite) {
        u32 i = first_group(p.groups, settings.groups, start);
        for (; i < settings.groups && p.groups[i].start < end; i++) {
            const Group& group = p.groups[i];
            const Scalars s = {p.outcome->grad_scale, settings.beta1,
                               settings.one_minus_beta1, settings.beta2,
                               settings.one_minus_beta2, settings.eps,
                               group.keep, group.step_size, group.inverse_sqrt_bias2};
            update_range(p, s, maximum(group.start, start), minimum(group.end, end));
        }
    }
    if (p.zero_grads) {
        __syncthreads(); // other threads read the gradients that this one clears
        for (u64 i = start + threadIdx.x; i < end; i += THREADS) {
            p.grads[i] = 0.0f;
        }
    }
}

KERNEL(adamw_sum_of_squares, THREADS, Squares, sum_of_squares)
KERNEL(adamw_scale, THREADS, Scale, scale)
KERNEL(adamw_step, THREADS, Update, step)
