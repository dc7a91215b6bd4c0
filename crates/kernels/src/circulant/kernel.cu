// Matrices of circulant blocks, and the gradient of their kernels.
#include "rows.cuh"

struct Circulant {
    // The matrix, or its gradient.
    Matrix matrix;
    // [rows / block, cols]; what is added to where its gradient is asked for.
    f32* kernel;
    u32 rows, cols;
    u32 block, reflected;
    f32 alpha;
    u32 unused;
};

// A thread has one column, in several rows.
DEVICE void add(const Circulant& p) {
    const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.cols) return;
    const u32 j = column % p.block;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const u32 i = row % p.block;
        const u32 t = (j + (p.reflected ? i : p.block - i)) % p.block;
        const u64 at = static_cast<u64>(row / p.block) * p.cols + column - j + t;
        f32* out = row_of<f32>(p.matrix, row) + column;
        *out = fmaf(p.alpha, p.kernel[at], *out);
    }
}

// A thread has one element of the kernel in several rows of blocks.
DEVICE void gradient(const Circulant& p) {
    const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.cols) return;
    const u32 t = column % p.block;
    for (u32 m = blockIdx.y; m < p.rows / p.block; m += gridDim.y) {
        f32 sum = 0.0f;
        for (u32 i = 0; i < p.block; ++i) {
            sum += load_element<f32>(p.matrix, m * p.block + i, column - t + (t + i) % p.block);
        }
        f32* to = p.kernel + static_cast<u64>(m) * p.cols + column;
        *to = fmaf(p.alpha, sum, *to);
    }
}

KERNEL(circulant_add, 256, Circulant, add)
KERNEL(circulant_gradient, 256, Circulant, gradient)
