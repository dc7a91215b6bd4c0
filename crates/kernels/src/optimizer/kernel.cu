// Optimizers that treat every element alike, with moments in f32 or as bytes. Every product is rounded by itself and in
// the order of the host's, so that both have the same bits.
#include "types.cuh"
#include "reduce.cuh"

constexpr u32 THREADS = 256; // elements of a block of bytes, which share a scale
constexpr u32 BLOCKS = 16;   // of them, one after another
constexpr u32 MOMENTS = 3;   // at most
constexpr u32 SCALARS = 16;  // words

// A tensor, and where what is kept of it lies.
struct Tensor {
    u64 start, len;       // in the flat buffers
    u64 data[MOMENTS];    // f32 or bytes
    u64 scales[MOMENTS];  // of bytes: f32, one per block
    u32 first_span;       // of BLOCKS blocks, over all tensors
    u32 bytes;            // whether moments are bytes
    u32 is_signed;        // a bit per moment: which map
    u32 unused;
};

// What a byte stands for, and how the nearest one is found.
struct Codec {
    f32 map[256];
    f32 limits[256]; // halfway from each value to the next, in ascending order; the last is infinity
    u32 order[256];  // bytes in ascending order of their values
};

struct Outcome {
    f64 norm;
    f32 grad_scale;
    u32 finite; // or else nothing is updated
};

struct Step {
    const Tensor* tensors;
    const u32* scalars; // [tensors, SCALARS]
    const Outcome* outcome;
    const Codec* codecs; // of values without and with a sign
    f32* params;
    const f32* grads;
    bf16* shadow; // may be null
    u32 count;    // of tensors
    u32 moments;
};

DEVICE f32 mul(f32 a, f32 b) { return multiply_rounded(a, b); }

// Shares of what was and of what is new.
struct Decay {
    f32 keep, take;
    DEVICE f32 operator()(f32 old, f32 now) const { return mul(old, keep) + mul(now, take); }
    DEVICE f32 square(f32 old, f32 g) const { return mul(old, keep) + mul(mul(g, g), take); }
};

struct Adadelta {
    Decay rho;
    f32 eps, lr, l2;
    DEVICE void update(f32& p, f32 g, f32* m, u32) const {
        g = g + mul(l2, p);
        m[0] = rho.square(m[0], g);
        const f32 change = mul(sqrtf(m[1] + eps) / sqrtf(m[0] + eps), g);
        m[1] = rho.square(m[1], change);
        p = p - mul(lr, change);
    }
};

struct Adagrad {
    f32 lr, l2, eps, start;
    DEVICE void update(f32& p, f32 g, f32* m, u32) const {
        g = g + mul(l2, p);
        m[0] = m[0] + (start + mul(g, g));
        p = p - mul(lr, g / (sqrtf(m[0]) + eps));
    }
};

struct Adam {
    Decay beta1, beta2;
    f32 inverse_root_bias2, eps, step_size, keep, l2;
    DEVICE void update(f32& p, f32 g, f32* m, u32 moments) const {
        g = g + mul(l2, p);
        m[0] = beta1(m[0], g);
        m[1] = beta2.square(m[1], g);
        f32 second = m[1];
        if (moments == 3) second = m[2] = fmaxf(m[2], m[1]); // amsgrad
        const f32 denominator = mul(sqrtf(second), inverse_root_bias2) + eps;
        p = mul(p, keep) - mul(step_size, m[0] / denominator);
    }
};

struct Adamax {
    f32 beta1, beta2, eps, step_size, l2;
    DEVICE void update(f32& p, f32 g, f32* m, u32) const {
        g = g + mul(l2, p);
        m[0] = m[0] + mul(beta1, g - m[0]);
        m[1] = fmaxf(mul(m[1], beta2), fabsf(g) + eps);
        p = p - mul(step_size, m[0] / m[1]);
    }
};

struct AdEmaMix {
    Decay beta1, beta2, beta3;
    f32 alpha, inverse_bias1, inverse_root_bias2, eps, lr, keep;
    DEVICE void update(f32& p, f32 g, f32* m, u32) const {
        m[0] = beta1(m[0], g);
        m[1] = beta3(m[1], g);
        m[2] = beta2.square(m[2], g);
        const f32 mixed = mul(m[0], inverse_bias1) + mul(alpha, m[1]);
        const f32 denominator = mul(sqrtf(m[2]), inverse_root_bias2) + eps;
        p = mul(p, keep) - mul(lr, mixed / denominator);
    }
};

struct Lion {
    Decay beta1, beta2;
    f32 lr, keep;
    DEVICE void update(f32& p, f32 g, f32* m, u32) const {
        const f32 direction = beta1(m[0], g);
        const f32 sign = direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : direction == 0.0f ? 0.0f : direction;
        p = mul(p, keep) - mul(lr, sign);
        m[0] = beta2(m[0], g);
    }
};

struct NAdam {
    f32 beta1;
    Decay beta2;
    f32 inverse_bias2, eps, of_gradient, of_momentum, keep, l2;
    DEVICE void update(f32& p, f32 g, f32* m, u32) const {
        g = g + mul(l2, p);
        m[0] = m[0] + mul(beta1, g - m[0]);
        m[1] = beta2.square(m[1], g);
        const f32 denominator = sqrtf(mul(m[1], inverse_bias2)) + eps;
        const f32 direction = mul(of_gradient, g / denominator) + mul(of_momentum, m[0] / denominator);
        p = mul(p, keep) - direction;
    }
};

struct RAdam {
    f32 beta1;
    Decay beta2;
    f32 eps, step_size;
    u32 is_rectified;
    f32 rectified, keep, l2;
    DEVICE void update(f32& p, f32 g, f32* m, u32) const {
        g = g + mul(l2, p);
        m[0] = m[0] + mul(beta1, g - m[0]);
        m[1] = beta2.square(m[1], g);
        const f32 factor = is_rectified ? rectified / (sqrtf(m[1]) + eps) : 1.0f;
        p = mul(p, keep) - mul(mul(m[0], step_size), factor);
    }
};

struct RmsProp {
    Decay alpha;
    f32 eps, lr, l2, momentum;
    u32 centered;
    DEVICE void update(f32& p, f32 g, f32* m, u32 moments) const {
        g = g + mul(l2, p);
        m[0] = alpha.square(m[0], g);
        f32 variance = m[0];
        if (centered) {
            m[1] = m[1] + mul(alpha.take, g - m[1]);
            variance = variance - mul(m[1], m[1]);
        }
        f32 direction = g / (sqrtf(fmaxf(variance, 0.0f)) + eps);
        if (moments == 2 + centered) {
            direction = mul(centered ? m[2] : m[1], momentum) + direction;
            (centered ? m[2] : m[1]) = direction;
        }
        p = p - mul(lr, direction);
    }
};

struct Sgd {
    f32 lr, l2, momentum, fresh;
    u32 nesterov;
    DEVICE void update(f32& p, f32 g, f32* m, u32 moments) const {
        g = g + mul(l2, p);
        if (moments == 0) {
            p = p - mul(lr, g);
            return;
        }
        m[0] = mul(m[0], momentum) + mul(g, fresh);
        p = p - mul(lr, nesterov ? g + mul(momentum, m[0]) : m[0]);
    }
};

// The byte for a value between -1 and 1.
DEVICE u8 nearest(const Codec& codec, f32 value) {
    u32 low = 0, high = 255;
    while (low < high) {
        const u32 middle = (low + high) / 2;
        if (value > codec.limits[middle]) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return static_cast<u8>(codec.order[low]);
}

// Bytes of a block of values, and their scale.
DEVICE void encode(const Codec& codec, f32 value, bool inside, u8* to, f32* scale) {
    const f32 largest = block_max(inside ? fabsf(value) : 0.0f);
    if (threadIdx.x == 0) *scale = largest;
    if (!inside) return;
    if (largest == 0.0f) {
        *to = 0;
        return;
    }
    const f32 scaled = value == 0.0f ? 0.0f : mul(value, 1.0f / largest);
    *to = nearest(codec, scaled < -1.0f ? -1.0f : scaled > 1.0f ? 1.0f : scaled);
}

// The tensor of a span: the last that begins at it or before.
DEVICE u32 tensor_of(const Step& p, u32 span) {
    u32 low = 0, high = p.count - 1;
    while (low < high) {
        const u32 middle = (low + high + 1) / 2;
        if (p.tensors[middle].first_span <= span) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// A block of threads has a span of one tensor.
template <typename Rule>
DEVICE void step(const Step& p) {
    SHARED Codec codecs[2];
    SHARED u32 words[SCALARS];
    if (!p.outcome->finite) return;
    const u32 number = tensor_of(p, blockIdx.x), thread = threadIdx.x;
    const Tensor& tensor = p.tensors[number];
    if (thread < SCALARS) words[thread] = p.scalars[number * SCALARS + thread];
    if (tensor.bytes) {
        for (u32 sign = 0; sign < 2; sign++) {
            codecs[sign].map[thread] = p.codecs[sign].map[thread];
            codecs[sign].limits[thread] = p.codecs[sign].limits[thread];
            codecs[sign].order[thread] = p.codecs[sign].order[thread];
        }
    }
    __syncthreads();
    const Rule rule = *reinterpret_cast<const Rule*>(words);
    const f32 grad_scale = p.outcome->grad_scale;
    const u64 first = static_cast<u64>(blockIdx.x - tensor.first_span) * BLOCKS;
    for (u64 block = first; block < first + BLOCKS && block * THREADS < tensor.len; block++) {
        const u64 element = block * THREADS + thread, at = tensor.start + element;
        const bool inside = element < tensor.len;
        f32 value = 0.0f, m[MOMENTS] = {};
        if (inside) {
            value = p.params[at];
#pragma unroll
            for (u32 k = 0; k < MOMENTS; k++) {
                if (k >= p.moments) continue;
                if (tensor.bytes) {
                    const f32 scale = reinterpret_cast<const f32*>(tensor.scales[k])[block];
                    const u8 byte = reinterpret_cast<const u8*>(tensor.data[k])[element];
                    m[k] = mul(codecs[tensor.is_signed >> k & 1].map[byte], scale);
                } else {
                    m[k] = reinterpret_cast<const f32*>(tensor.data[k])[element];
                }
            }
            rule.update(value, mul(p.grads[at], grad_scale), m, p.moments);
            p.params[at] = value;
            if (p.shadow != nullptr) p.shadow[at] = from_f32<bf16>(value);
        }
#pragma unroll
        for (u32 k = 0; k < MOMENTS; k++) {
            if (k >= p.moments) continue;
            if (tensor.bytes) {
                u8* bytes = reinterpret_cast<u8*>(tensor.data[k]) + element;
                f32* scale = reinterpret_cast<f32*>(tensor.scales[k]) + block;
                encode(codecs[tensor.is_signed >> k & 1], m[k], inside, bytes, scale);
            } else if (inside) {
                reinterpret_cast<f32*>(tensor.data[k])[element] = m[k];
            }
        }
    }
}

KERNEL(optimizer_adadelta, THREADS, Step, step<Adadelta>)
KERNEL(optimizer_adagrad, THREADS, Step, step<Adagrad>)
KERNEL(optimizer_adam, THREADS, Step, step<Adam>)
KERNEL(optimizer_adamax, THREADS, Step, step<Adamax>)
KERNEL(optimizer_ademamix, THREADS, Step, step<AdEmaMix>)
KERNEL(optimizer_lion, THREADS, Step, step<Lion>)
KERNEL(optimizer_nadam, THREADS, Step, step<NAdam>)
KERNEL(optimizer_radam, THREADS, Step, step<RAdam>)
KERNEL(optimizer_rmsprop, THREADS, Step, step<RmsProp>)
KERNEL(optimizer_sgd, THREADS, Step, step<Sgd>)
