// Uniform noise of counter-based random words, four columns a counter.
#include "philox.cuh"
#include "rows.cuh"

struct Noise {
    Matrix x;
    const u32* tokens;  // sequence and position of every row, then the step
    const f32* scales;  // of every row
    u32 rows, cols;
    u32 key[2];
};

DEVICE f32 uniform(u32 word) { return f32(word) * 4.656612873077392578125e-10f - 1.0f; }

template <typename Access>
DEVICE void add(const Noise& p) {
    const u32 group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= p.cols / Access::LEN) return;
    const u32 step = p.tokens[2 * u64(p.rows)];
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const u32 sequence = p.tokens[2 * u64(row)], position = p.tokens[2 * u64(row) + 1];
        const f32 scale = p.scales[row];
        auto x = Access::load(p.x, row, group);
        const u32 column = group * Access::LEN;
#pragma unroll
        for (u32 first = 0; first < Access::LEN; first += 4) {
            const Words words = philox4x32((column + first) / 4, position, sequence, step, p.key[0], p.key[1]);
            if (Access::LEN == 1) {
                // Selected, not indexed: the words stay in registers.
                const u32 low = column & 1 ? words.word[1] : words.word[0];
                const u32 high = column & 1 ? words.word[3] : words.word[2];
                Access::set(p.x, x, 0, Access::get(x, 0) + uniform(column & 2 ? high : low) * scale);
            } else {
#pragma unroll
                for (u32 e = 0; e < 4; e++)
                    Access::set(p.x, x, first + e, Access::get(x, first + e) + uniform(words.word[e]) * scale);
            }
        }
        Access::store(p.x, row, group, x);
    }
}

KERNEL(noise_add_f32, 256, Noise, add<Packed<f32>>)
KERNEL(noise_add_bf16, 256, Noise, add<Packed<bf16>>)
KERNEL(noise_add_any, 256, Noise, add<Any>)
