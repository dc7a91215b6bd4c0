// Factors into the margins of a weight, and a narrow matrix beside a wide one.
#include "rows.cuh"

constexpr u32 THREADS = 256;
constexpr u32 MOST = 4;

struct Factors {
    const f32* a;  // [rank, in]
    const f32* b;  // [rows, rank]
    u32 rank, rows;
    u32 row, first;  // of the weight; among all ranks
    f32 scale;
    u32 unused;
};

struct Place {
    Matrix weight;  // [out + R, in + R]
    Factors updates[MOST];
    u32 out, in;
};

// A block has an update in y and elements of A, then of B, in x.
DEVICE void place(const Place& p) {
    const Factors& own = p.updates[blockIdx.y];
    const u32 of_a = own.rank * p.in, all = of_a + own.rows * own.rank;
    for (u32 at = blockIdx.x * THREADS + threadIdx.x; at < all; at += gridDim.x * THREADS) {
        if (at < of_a) {
            Any::store(p.weight, p.out + own.first + at / p.in, at % p.in, {own.a[at]});
        } else {
            const u32 i = at - of_a;
            Any::store(p.weight, own.row + i / own.rank, p.in + own.first + i % own.rank, {own.scale * own.b[i]});
        }
    }
}

struct Copy {
    Matrix to, from;
    u32 rows, cols;
};

// A thread has a group of columns; blocks are full, however narrow the matrix.
template <typename Access>
DEVICE void copy(const Copy& p) {
    const u32 groups = p.cols / Access::LEN, all = p.rows * groups;
    for (u32 at = blockIdx.x * THREADS + threadIdx.x; at < all; at += gridDim.x * THREADS) {
        const u32 row = at / groups, group = at % groups;
        Access::store(p.to, row, group, Access::load_once(p.from, row, group));
    }
}

KERNEL(augmented_linear_place, 256, Place, place)
KERNEL(augmented_linear_copy_f32, 256, Copy, copy<Packed<f32>>)
KERNEL(augmented_linear_copy_bf16, 256, Copy, copy<Packed<bf16>>)
KERNEL(augmented_linear_copy_any, 256, Copy, copy<Any>)
