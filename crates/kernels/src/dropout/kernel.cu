// Dropout with a mask of counter-based random words, four columns a counter.
#include "philox.cuh"
#include "rows.cuh"

struct Dropout {
    Matrix x, out;
    const u32* tokens;  // sequence and position of every row, then the step
    u32 rows, cols;
    u32 key[2];
    u32 threshold;  // keep a word from here on
    f32 scale;
};

// The factors of the LEN columns from `column` on.
template <u32 LEN>
DEVICE void factors(const Dropout& p, u32 row, u32 column, f32 (&to)[LEN]) {
    const u32 sequence = p.tokens[2 * u64(row)], position = p.tokens[2 * u64(row) + 1];
    const u32 step = p.tokens[2 * u64(p.rows)];
#pragma unroll
    for (u32 first = 0; first < LEN; first += 4) {
        const Words words = philox4x32((column + first) / 4, position, sequence, step, p.key[0], p.key[1]);
        if (LEN == 1) {
            // Selected, not indexed: the words stay in registers.
            const u32 low = column & 1 ? words.word[1] : words.word[0];
            const u32 high = column & 1 ? words.word[3] : words.word[2];
            to[0] = (column & 2 ? high : low) >= p.threshold ? p.scale : 0.0f;
        } else {
#pragma unroll
            for (u32 e = 0; e < 4; e++) to[first + e] = words.word[e] >= p.threshold ? p.scale : 0.0f;
        }
    }
}

// out = x * factor, or, with ADD, out += x * factor.
template <typename Access, bool ADD>
DEVICE void dropout(const Dropout& p) {
    const u32 group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= p.cols / Access::LEN) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const auto x = Access::load_once(p.x, row, group);
        typename Access::Group out = {};
        if (ADD) out = Access::load(p.out, row, group);
        f32 factor[Access::LEN];
        factors(p, row, group * Access::LEN, factor);
#pragma unroll
        for (u32 e = 0; e < Access::LEN; e++) {
            const f32 masked = Access::get(x, e) * factor[e];
            Access::set(p.out, out, e, ADD ? Access::get(out, e) + masked : masked);
        }
        Access::store(p.out, row, group, out);
    }
}

KERNEL(dropout_forward_f32, 256, Dropout, (dropout<Packed<f32>, false>))
KERNEL(dropout_forward_bf16, 256, Dropout, (dropout<Packed<bf16>, false>))
KERNEL(dropout_forward_any, 256, Dropout, (dropout<Any, false>))
KERNEL(dropout_add_masked_f32, 256, Dropout, (dropout<Packed<f32>, true>))
KERNEL(dropout_add_masked_bf16, 256, Dropout, (dropout<Packed<bf16>, true>))
KERNEL(dropout_add_masked_any, 256, Dropout, (dropout<Any, true>))
