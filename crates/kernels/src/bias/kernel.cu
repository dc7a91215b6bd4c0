// Bias: a thread of the forward pass has one group of columns, in several rows.
#include "columns.cuh"
#include "rows.cuh"

struct Add {
    Matrix y;
    const f32* bias;
    u32 rows, cols;
    f32 scale;
    u32 unused;
};

template <typename Access>
DEVICE void add(const Add& p) {
    const u32 group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= p.cols / Access::LEN) return;
    f32 bias[Access::LEN];
    Access::load_vector(p.bias, group, bias);
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        auto y = Access::load(p.y, row, group);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) Access::set(p.y, y, e, Access::get(y, e) + p.scale * bias[e]);
        Access::store(p.y, row, group, y);
    }
}

struct Backward {
    Matrix dy;
    f32* d_bias;
    u32 rows, cols;
    f32 scale;
    u32 unused;
};

template <typename T>
DEVICE void backward(const Backward& p) {
    add_column_sums(p.rows, p.cols, p.d_bias, [&](u32 row, u32 column) { return p.scale * load_element<T>(p.dy, row, column); });
}

KERNEL(bias_add_f32, 256, Add, add<Packed<f32>>)
KERNEL(bias_add_bf16, 256, Add, add<Packed<bf16>>)
KERNEL(bias_add_any, 256, Add, add<Any>)
KERNEL(bias_backward_f32, 1024, Backward, backward<f32>)
KERNEL(bias_backward_bf16, 1024, Backward, backward<bf16>)
