// SwiGLU, element by element: a thread has one group of columns of a row.
#include "rows.cuh"

struct Swiglu {
    Matrix gate_up, out;  // out is d_out in the backward pass
    u32 rows, cols;       // of out
};

// 1 / (1 + e^-x).
template <typename Access>
DEVICE f32 sigmoid(f32 x) {
    if constexpr (Access::FAST_MATH) return fast_rcp(1.0f + fast_exp(-x));
    return 1.0f / (1.0f + expf(-x));
}

template <typename Access>
DEVICE void forward(const Swiglu& p) {
    const u32 groups = p.cols / Access::LEN, group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const auto gate = Access::load_once(p.gate_up, row, group);
        const auto up = Access::load_once(p.gate_up, row, groups + group);
        typename Access::Group out;
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            const f32 g = Access::get(gate, e);
            Access::set(p.out, out, e, g * sigmoid<Access>(g) * Access::get(up, e));
        }
        Access::store(p.out, row, group, out);
    }
}

template <typename Access>
DEVICE void backward_in_place(const Swiglu& p) {
    const u32 groups = p.cols / Access::LEN, group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        auto gate = Access::load(p.gate_up, row, group);
        auto up = Access::load(p.gate_up, row, groups + group);
        const auto d_out = Access::load_once(p.out, row, group);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            const f32 g = Access::get(gate, e), u = Access::get(up, e), d = Access::get(d_out, e);
            const f32 s = sigmoid<Access>(g);
            Access::set(p.gate_up, gate, e, d * u * s * (1.0f + g * (1.0f - s)));
            Access::set(p.gate_up, up, e, d * (g * s));
        }
        Access::store(p.gate_up, row, group, gate);
        Access::store(p.gate_up, row, groups + group, up);
    }
}

KERNEL(swiglu_forward_f32, 256, Swiglu, forward<Packed<f32>>)
KERNEL(swiglu_forward_bf16, 256, Swiglu, forward<Packed<bf16>>)
KERNEL(swiglu_forward_any, 256, Swiglu, forward<Any>)
KERNEL(swiglu_backward_in_place_f32, 256, Swiglu, backward_in_place<Packed<f32>>)
KERNEL(swiglu_backward_in_place_bf16, 256, Swiglu, backward_in_place<Packed<bf16>>)
KERNEL(swiglu_backward_in_place_any, 256, Swiglu, backward_in_place<Any>)
