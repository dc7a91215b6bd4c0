// Dropout of whole parts of an update: one block of threads draws for all of a linear's.
#include "philox.cuh"
#include "reduce.cuh"

struct Parts {
    const u32* step;
    f32* out;
    // For blocks: where each swap goes.
    u32* swaps;
    u64 key;
    f64 rows, module;
    u32 count, scaled;
    u32 left_out, groups, group;
    u32 unused;
};

DEVICE u64 mix(u64 a, u64 b) {
    u64 z = a + 0x9e3779b97f4a7c15ull + (b << 32 | b >> 32);
    z = (z ^ (z >> 30)) * (0xbf58476d1ce4e5b9ull ^ (b << 1));
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// As Stream in rng.rs.
struct Stream {
    u64 key;

    DEVICE explicit Stream(const Parts& p) : key(mix(p.key, *p.step)) {}

    // The n-th number.
    DEVICE u64 bits(u32 n) const {
        const Words words = philox4x32(n / 2, 0, 0, 0, u32(key), u32(key >> 32));
        const u32 high = n & 1 ? words.word[2] : words.word[0];
        const u32 low = n & 1 ? words.word[3] : words.word[1];
        return u64(high) << 32 | low;
    }
    DEVICE f64 uniform(u32 n) const { return static_cast<f64>(bits(n) >> 11) / 9007199254740992.0; }
};

DEVICE void rows(const Parts& p) {
    const Stream stream(p);
    const bool module = stream.uniform(0) >= p.module;
    u32 count = 0;
    for (u32 i = threadIdx.x; i < p.count; i += blockDim.x) {
        const bool stays = module && stream.uniform(i + 1) >= p.rows;
        p.out[i] = stays ? 1.0f : 0.0f;
        count += stays ? 1 : 0;
    }
    if (!p.scaled) return;
    count = block_sum(count);
    if (count == 0) return;
    const f32 factor = f32(p.count) / f32(count);
    for (u32 i = threadIdx.x; i < p.count; i += blockDim.x) p.out[i] *= factor;
}

// Fisher and Yates swap places i and j_i <= i, from the last i to 1. Where one block ends is found by itself: it is moved
// when i is its place, and never again once it is moved to i.
DEVICE u32 place_of(const Parts& p, u32 block) {
    u32 place = block;
    for (u32 i = p.count - 1; i > 0; --i) {
        const u32 j = p.swaps[i];
        if (j == place) return i;
        if (i == place) place = j;
    }
    return place;
}

DEVICE void blocks(const Parts& p) {
    const Stream stream(p);
    u32 chosen = 0, first = 0;
    if (p.groups > 1) {
        chosen = static_cast<u32>(stream.uniform(0) * f64(p.groups));
        first = 1;
    }
    for (u32 i = threadIdx.x; i < p.count; i += blockDim.x) {
        p.out[i] = 1.0f;
        p.swaps[i] = u32(__umul64hi(stream.bits(first + p.count - 1 - i), u64(i) + 1));
    }
    if (chosen != p.group) return;
    __syncthreads();
    for (u32 block = threadIdx.x; block < p.left_out; block += blockDim.x) p.out[place_of(p, block)] = 0.0f;
}

KERNEL(parts_rows, 512, Parts, rows)
KERNEL(parts_blocks, 512, Parts, blocks)
