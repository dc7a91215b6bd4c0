// The product of every row of one matrix with every row of another, and gradients.
#include "columns.cuh"
#include "rows.cuh"

struct KhatriRao {
    // [n, A * B]: the product, or its gradient.
    Matrix product;
    // [A, n], and [B, n] or its gradient.
    Matrix a, g;
    const f32* scale;
    f32* sums;
    u32 rows, cols;
    u32 of_g;
    f32 alpha;
};

DEVICE f32 pair(const KhatriRao& p, u32 j, u32 column) {
    return load_element<f32>(p.a, column / p.of_g, j) * load_element<f32>(p.g, column % p.of_g, j);
}

// A thread has one column, in several rows.
DEVICE void product(const KhatriRao& p) {
    const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.cols) return;
    const f32 scale = p.scale[column];
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        row_of<f32>(p.product, row)[column] = scale * pair(p, row, column);
    }
}

DEVICE void scale_gradient(const KhatriRao& p) {
    add_column_sums(p.rows, p.cols, p.sums, [&](u32 row, u32 column) {
        return p.alpha * load_element<f32>(p.product, row, column) * pair(p, row, column);
    });
}

// A thread has one row of g, in several columns: of the product, neighbours read neighbours.
DEVICE void second_gradient(const KhatriRao& p) {
    const u32 b = blockIdx.x * blockDim.x + threadIdx.x;
    if (b >= p.of_g) return;
    for (u32 j = blockIdx.y; j < p.rows; j += gridDim.y) {
        f32 sum = 0.0f;
        for (u32 k = 0, column = b; column < p.cols; ++k, column += p.of_g) {
            sum += load_element<f32>(p.product, j, column) * p.scale[column] * load_element<f32>(p.a, k, j);
        }
        f32* to = row_of<f32>(p.g, b) + j;
        *to = fmaf(p.alpha, sum, *to);
    }
}

KERNEL(khatri_rao_product, 256, KhatriRao, product)
KERNEL(khatri_rao_scale_gradient, 1024, KhatriRao, scale_gradient)
KERNEL(khatri_rao_second_gradient, 256, KhatriRao, second_gradient)
