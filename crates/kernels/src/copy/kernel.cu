// Copies and fills: a thread has one group of columns, in several rows.
#include "convert.cuh"
#include "rows.cuh"

struct CopyRows {
    Matrix from, to;
    u32 rows, cols;
};

template <typename C>
DEVICE void copy_rows(const CopyRows& p) {
    const u32 group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= p.cols / C::LEN) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) C::copy(p.from, row, p.to, row, group);
}

struct Fill {
    Matrix to;
    u32 rows, cols;
    f32 value;
    u32 unused;
};

template <typename Access>
DEVICE void fill(const Fill& p) {
    const u32 group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= p.cols / Access::LEN) return;
    typename Access::Group values;
#pragma unroll
    for (u32 e = 0; e < Access::LEN; e++) Access::set(p.to, values, e, p.value);
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) Access::store(p.to, row, group, values);
}

KERNEL(copy_f32_f32, 256, CopyRows, (copy_rows<Copy<f32, f32>>))
KERNEL(copy_f32_bf16, 256, CopyRows, (copy_rows<Copy<f32, bf16>>))
KERNEL(copy_bf16_f32, 256, CopyRows, (copy_rows<Copy<bf16, f32>>))
KERNEL(copy_bf16_bf16, 256, CopyRows, (copy_rows<Copy<bf16, bf16>>))
KERNEL(copy_any, 256, CopyRows, copy_rows<CopyAny>)
KERNEL(fill_f32, 256, Fill, fill<Packed<f32>>)
KERNEL(fill_bf16, 256, Fill, fill<Packed<bf16>>)
KERNEL(fill_any, 256, Fill, fill<Any>)
