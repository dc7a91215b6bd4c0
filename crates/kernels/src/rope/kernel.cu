// Rotary embedding in place: a thread has one group of a head's rotated pairs, in several rows.
#include "rows.cuh"

struct Rope {
    Matrix x;
    const f32* cos;
    const f32* sin;
    u32 rows, heads, head_dim, half;
    f32 sign;  // of sin: -1 for the transpose
    u32 unused;
};

template <typename Access>
DEVICE void rotate(const Rope& p) {
    const u32 head_groups = p.half / Access::LEN, item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= p.heads * head_groups) return;
    const u32 head = item / head_groups, pair = item % head_groups;
    const u32 low_group = head * (p.head_dim / Access::LEN) + pair, high_group = low_group + head_groups;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        auto low = Access::load(p.x, row, low_group);
        auto high = Access::load(p.x, row, high_group);
        f32 cos[Access::LEN], sin[Access::LEN];
        Access::load_vector(p.cos + u64(row) * p.half, pair, cos);
        Access::load_vector(p.sin + u64(row) * p.half, pair, sin);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            const f32 a = Access::get(low, e), b = Access::get(high, e), s = sin[e] * p.sign;
            Access::set(p.x, low, e, a * cos[e] - b * s);
            Access::set(p.x, high, e, b * cos[e] + a * s);
        }
        Access::store(p.x, row, low_group, low);
        Access::store(p.x, row, high_group, high);
    }
}

KERNEL(rope_f32, 256, Rope, rotate<Packed<f32>>)
KERNEL(rope_bf16, 256, Rope, rotate<Packed<bf16>>)
KERNEL(rope_any, 256, Rope, rotate<Any>)
