// Activations, gated and plain, element by element: a thread has one group of columns of a row.
#include "rows.cuh"

struct Params {
    Matrix x, out;        // x is gate and up where there is a gate, out is d_out in the backward pass
    u32 rows, cols;       // of out
};

// 1 / (1 + e^-x).
template <typename Access>
DEVICE f32 sigmoid(f32 x) {
    if constexpr (Access::FAST_MATH) return fast_rcp(1.0f + fast_exp(-x));
    return 1.0f / (1.0f + expf(-x));
}

// Each activation: its value, and its derivative.
struct Silu {
    template <typename Access>
    static DEVICE f32 value(f32 g, f32& slope) {
        const f32 s = sigmoid<Access>(g);
        slope = s * (1.0f + g * (1.0f - s));
        return g * s;
    }
};

struct Gelu {
    // The share of a normal distribution below x. The fast one is the fit of the CPU's twin.
    template <typename Access>
    static DEVICE f32 share(f32 x) {
        if constexpr (!Access::FAST_MATH) return 0.5f * erfcf(-0.70710678f * x);
        const f32 z = fabsf(x) * 0.70710678f;
        const f32 t = fast_rcp(1.0f + 0.5f * z);
        f32 p = 0.17087277f;
        p = p * t - 0.8221522f;
        p = p * t + 1.4885159f;
        p = p * t - 1.13520398f;
        p = p * t + 0.27886807f;
        p = p * t - 0.18628806f;
        p = p * t + 0.09678418f;
        p = p * t + 0.37409196f;
        p = p * t + 1.0000237f;
        p = p * t - 1.2655122f;
        const f32 tail = 0.5f * t * fast_exp(p - z * z);
        return x < 0.0f ? tail : 1.0f - tail;
    }

    template <typename Access>
    static DEVICE f32 value(f32 g, f32& slope) {
        const f32 p = share<Access>(g), half_square = -0.5f * g * g;
        const f32 density = Access::FAST_MATH ? fast_exp(half_square) : expf(half_square);
        slope = p + g * (density * 0.3989423f);
        return g * p;
    }
};

struct GeluTanh {
    template <typename Access>
    static DEVICE f32 value(f32 g, f32& slope) {
        const f32 s = sigmoid<Access>(g * (1.5957691f + 0.071354814f * g * g));
        // Beyond 20 the slope is flat in f32, while this factor still grows.
        const f32 near = minimum(maximum(g, -20.0f), 20.0f);
        const f32 bend = near * (1.5957691f + 0.21406444f * near * near) * (1.0f - s);
        slope = s * (1.0f + bend);
        return g * s;
    }
};

struct QuickGelu {
    template <typename Access>
    static DEVICE f32 value(f32 g, f32& slope) {
        const f32 s = sigmoid<Access>(1.702f * g);
        slope = s * (1.0f + 1.702f * g * (1.0f - s));
        return g * s;
    }
};

struct Relu {
    template <typename Access>
    static DEVICE f32 value(f32 g, f32& slope) {
        slope = g > 0.0f ? 1.0f : 0.0f;
        return g < 0.0f ? 0.0f : g;
    }
};

template <typename Activation, typename Access>
DEVICE void forward_gated(const Params& p) {
    const u32 groups = p.cols / Access::LEN, group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const auto gate = Access::load_once(p.x, row, group);
        const auto up = Access::load_once(p.x, row, groups + group);
        typename Access::Group out;
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            f32 slope;
            const f32 value = Activation::template value<Access>(Access::get(gate, e), slope);
            Access::set(p.out, out, e, value * Access::get(up, e));
        }
        Access::store(p.out, row, group, out);
    }
}

template <typename Activation, typename Access>
DEVICE void backward_gated_in_place(const Params& p) {
    const u32 groups = p.cols / Access::LEN, group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        auto gate = Access::load(p.x, row, group);
        auto up = Access::load(p.x, row, groups + group);
        const auto d_out = Access::load_once(p.out, row, group);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            const f32 u = Access::get(up, e), d = Access::get(d_out, e);
            f32 slope;
            const f32 value = Activation::template value<Access>(Access::get(gate, e), slope);
            Access::set(p.x, gate, e, d * u * slope);
            Access::set(p.x, up, e, d * value);
        }
        Access::store(p.x, row, group, gate);
        Access::store(p.x, row, groups + group, up);
    }
}

template <typename Activation, typename Access>
DEVICE void forward(const Params& p) {
    const u32 group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= p.cols / Access::LEN) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const auto x = Access::load_once(p.x, row, group);
        typename Access::Group out;
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            f32 slope;
            Access::set(p.out, out, e, Activation::template value<Access>(Access::get(x, e), slope));
        }
        Access::store(p.out, row, group, out);
    }
}

template <typename Activation, typename Access>
DEVICE void backward_in_place(const Params& p) {
    const u32 group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= p.cols / Access::LEN) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        auto x = Access::load(p.x, row, group);
        const auto d_out = Access::load_once(p.out, row, group);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            f32 slope;
            Activation::template value<Access>(Access::get(x, e), slope);
            Access::set(p.x, x, e, Access::get(d_out, e) * slope);
        }
        Access::store(p.x, row, group, x);
    }
}

KERNEL(gated_silu_forward_f32, 256, Params, (forward_gated<Silu, Packed<f32>>))
KERNEL(gated_silu_forward_bf16, 256, Params, (forward_gated<Silu, Packed<bf16>>))
KERNEL(gated_silu_forward_any, 256, Params, (forward_gated<Silu, Any>))
KERNEL(gated_silu_backward_in_place_f32, 256, Params, (backward_gated_in_place<Silu, Packed<f32>>))
KERNEL(gated_silu_backward_in_place_bf16, 256, Params, (backward_gated_in_place<Silu, Packed<bf16>>))
KERNEL(gated_silu_backward_in_place_any, 256, Params, (backward_gated_in_place<Silu, Any>))
KERNEL(gated_gelu_forward_f32, 256, Params, (forward_gated<Gelu, Packed<f32>>))
KERNEL(gated_gelu_forward_bf16, 256, Params, (forward_gated<Gelu, Packed<bf16>>))
KERNEL(gated_gelu_forward_any, 256, Params, (forward_gated<Gelu, Any>))
KERNEL(gated_gelu_backward_in_place_f32, 256, Params, (backward_gated_in_place<Gelu, Packed<f32>>))
KERNEL(gated_gelu_backward_in_place_bf16, 256, Params, (backward_gated_in_place<Gelu, Packed<bf16>>))
KERNEL(gated_gelu_backward_in_place_any, 256, Params, (backward_gated_in_place<Gelu, Any>))
KERNEL(gated_gelu_tanh_forward_f32, 256, Params, (forward_gated<GeluTanh, Packed<f32>>))
KERNEL(gated_gelu_tanh_forward_bf16, 256, Params, (forward_gated<GeluTanh, Packed<bf16>>))
KERNEL(gated_gelu_tanh_forward_any, 256, Params, (forward_gated<GeluTanh, Any>))
KERNEL(gated_gelu_tanh_backward_in_place_f32, 256, Params, (backward_gated_in_place<GeluTanh, Packed<f32>>))
KERNEL(gated_gelu_tanh_backward_in_place_bf16, 256, Params, (backward_gated_in_place<GeluTanh, Packed<bf16>>))
KERNEL(gated_gelu_tanh_backward_in_place_any, 256, Params, (backward_gated_in_place<GeluTanh, Any>))
KERNEL(gated_quick_gelu_forward_f32, 256, Params, (forward_gated<QuickGelu, Packed<f32>>))
KERNEL(gated_quick_gelu_forward_bf16, 256, Params, (forward_gated<QuickGelu, Packed<bf16>>))
KERNEL(gated_quick_gelu_forward_any, 256, Params, (forward_gated<QuickGelu, Any>))
KERNEL(gated_quick_gelu_backward_in_place_f32, 256, Params, (backward_gated_in_place<QuickGelu, Packed<f32>>))
KERNEL(gated_quick_gelu_backward_in_place_bf16, 256, Params, (backward_gated_in_place<QuickGelu, Packed<bf16>>))
KERNEL(gated_quick_gelu_backward_in_place_any, 256, Params, (backward_gated_in_place<QuickGelu, Any>))
KERNEL(gated_relu_forward_f32, 256, Params, (forward_gated<Relu, Packed<f32>>))
KERNEL(gated_relu_forward_bf16, 256, Params, (forward_gated<Relu, Packed<bf16>>))
KERNEL(gated_relu_forward_any, 256, Params, (forward_gated<Relu, Any>))
KERNEL(gated_relu_backward_in_place_f32, 256, Params, (backward_gated_in_place<Relu, Packed<f32>>))
KERNEL(gated_relu_backward_in_place_bf16, 256, Params, (backward_gated_in_place<Relu, Packed<bf16>>))
KERNEL(gated_relu_backward_in_place_any, 256, Params, (backward_gated_in_place<Relu, Any>))
KERNEL(plain_silu_forward_f32, 256, Params, (forward<Silu, Packed<f32>>))
KERNEL(plain_silu_forward_bf16, 256, Params, (forward<Silu, Packed<bf16>>))
KERNEL(plain_silu_forward_any, 256, Params, (forward<Silu, Any>))
KERNEL(plain_silu_backward_in_place_f32, 256, Params, (backward_in_place<Silu, Packed<f32>>))
KERNEL(plain_silu_backward_in_place_bf16, 256, Params, (backward_in_place<Silu, Packed<bf16>>))
KERNEL(plain_silu_backward_in_place_any, 256, Params, (backward_in_place<Silu, Any>))
KERNEL(plain_gelu_forward_f32, 256, Params, (forward<Gelu, Packed<f32>>))
KERNEL(plain_gelu_forward_bf16, 256, Params, (forward<Gelu, Packed<bf16>>))
KERNEL(plain_gelu_forward_any, 256, Params, (forward<Gelu, Any>))
KERNEL(plain_gelu_backward_in_place_f32, 256, Params, (backward_in_place<Gelu, Packed<f32>>))
KERNEL(plain_gelu_backward_in_place_bf16, 256, Params, (backward_in_place<Gelu, Packed<bf16>>))
KERNEL(plain_gelu_backward_in_place_any, 256, Params, (backward_in_place<Gelu, Any>))
KERNEL(plain_gelu_tanh_forward_f32, 256, Params, (forward<GeluTanh, Packed<f32>>))
KERNEL(plain_gelu_tanh_forward_bf16, 256, Params, (forward<GeluTanh, Packed<bf16>>))
KERNEL(plain_gelu_tanh_forward_any, 256, Params, (forward<GeluTanh, Any>))
KERNEL(plain_gelu_tanh_backward_in_place_f32, 256, Params, (backward_in_place<GeluTanh, Packed<f32>>))
KERNEL(plain_gelu_tanh_backward_in_place_bf16, 256, Params, (backward_in_place<GeluTanh, Packed<bf16>>))
KERNEL(plain_gelu_tanh_backward_in_place_any, 256, Params, (backward_in_place<GeluTanh, Any>))
KERNEL(plain_quick_gelu_forward_f32, 256, Params, (forward<QuickGelu, Packed<f32>>))
KERNEL(plain_quick_gelu_forward_bf16, 256, Params, (forward<QuickGelu, Packed<bf16>>))
KERNEL(plain_quick_gelu_forward_any, 256, Params, (forward<QuickGelu, Any>))
KERNEL(plain_quick_gelu_backward_in_place_f32, 256, Params, (backward_in_place<QuickGelu, Packed<f32>>))
KERNEL(plain_quick_gelu_backward_in_place_bf16, 256, Params, (backward_in_place<QuickGelu, Packed<bf16>>))
KERNEL(plain_quick_gelu_backward_in_place_any, 256, Params, (backward_in_place<QuickGelu, Any>))
KERNEL(plain_relu_forward_f32, 256, Params, (forward<Relu, Packed<f32>>))
KERNEL(plain_relu_forward_bf16, 256, Params, (forward<Relu, Packed<bf16>>))
KERNEL(plain_relu_forward_any, 256, Params, (forward<Relu, Any>))
KERNEL(plain_relu_backward_in_place_f32, 256, Params, (backward_in_place<Relu, Packed<f32>>))
KERNEL(plain_relu_backward_in_place_bf16, 256, Params, (backward_in_place<Relu, Packed<bf16>>))
KERNEL(plain_relu_backward_in_place_any, 256, Params, (backward_in_place<Relu, Any>))
