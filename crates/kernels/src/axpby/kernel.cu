// Scaled sums, element by element: a thread has one group of columns, in several rows.
#include "rows.cuh"

struct Axpby {
    Matrix y, x;
    u32 rows, cols;
    f32 a, b;
};

template <typename Access>
DEVICE void add(const Axpby& p) {
    const u32 group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= p.cols / Access::LEN) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        auto y = Access::load(p.y, row, group);
        const auto x = Access::load_once(p.x, row, group);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            const f32 old = p.a == 0.0f ? 0.0f : p.a * Access::get(y, e);
            Access::set(p.y, y, e, fmaf(p.b, Access::get(x, e), old));
        }
        Access::store(p.y, row, group, y);
    }
}

struct Scale {
    Matrix y;
    u32 rows, cols;
    f32 a;
    u32 unused;
};

template <typename Access>
DEVICE void scale(const Scale& p) {
    const u32 group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= p.cols / Access::LEN) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        auto y = Access::load(p.y, row, group);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) Access::set(p.y, y, e, p.a * Access::get(y, e));
        Access::store(p.y, row, group, y);
    }
}

KERNEL(axpby_add_f32, 256, Axpby, add<Packed<f32>>)
KERNEL(axpby_add_bf16, 256, Axpby, add<Packed<bf16>>)
KERNEL(axpby_add_any, 256, Axpby, add<Any>)
KERNEL(axpby_scale_f32, 256, Scale, scale<Packed<f32>>)
KERNEL(axpby_scale_bf16, 256, Scale, scale<Packed<bf16>>)
KERNEL(axpby_scale_any, 256, Scale, scale<Any>)
