// 4-bit and 8-bit codes to values. Each thread writes eight neighbours of a row, or one element where
// rows are not made of aligned eights.
#include "types.cuh"

constexpr u32 THREADS = 256;
constexpr u32 EACH = 8;

struct FourBit {
    const u8* packed;   // two codes per byte, the first in the high half
    const f32* code;    // [16]
    const f32* absmax;  // per block; with `indices`, per 256 blocks
    const u8* indices;  // per block, or null
    const f32* map;     // [256], what an index stands for
    void* out;          // [rows, cols]
    u64 pitch, len;     // len: rows * cols
    u32 cols, block_shift;
    f32 offset;
    u32 eights;         // rows are made of aligned eights, fewer than 2^32
};

struct Int8 {
    const i8* values;
    const f32* absmax; // per row; null writes the bytes as numbers
    void* out;         // [rows, cols]
    u64 pitch, len;    // len: rows * cols
    u32 cols, eights;
};

DEVICE u64 own_index() { return static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x; }

DEVICE f32 absmax_of(const FourBit& p, u64 block) {
    if (p.indices == nullptr) {
        return p.absmax[block];
    }
    return multiply_rounded(p.map[p.indices[block]], p.absmax[block / 256]) + p.offset;
}

template <typename T>
DEVICE void store_eight(T* to, const f32 (&values)[EACH]) {
#pragma unroll
    for (u32 i = 0; i < EACH; i += LANES<T>) {
        Vec16<T> part;
#pragma unroll
        for (u32 l = 0; l < LANES<T>; l++) {
            part[l] = from_f32<T>(values[i + l]);
        }
        store_16(to + i, part);
    }
}

template <typename T>
DEVICE void four_bit_eight(const FourBit& p, const f32* code) {
    const u64 at = own_index() * EACH;
    if (at >= p.len) {
        return;
    }
    const u32 per_row = p.cols / EACH, item = static_cast<u32>(own_index());
    const u32 row = item / per_row, col = item % per_row * EACH;
    const f32 scale = absmax_of(p, at >> p.block_shift);
    const u32 codes = *reinterpret_cast<const u32*>(p.packed + at / 2);
    f32 values[EACH];
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        const u32 shift = i / 2 * 8 + (i % 2 == 0 ? 4 : 0);
        values[i] = code[codes >> shift & 15] * scale;
    }
    store_eight(static_cast<T*>(p.out) + row * p.pitch + col, values);
}

template <typename T>
DEVICE void four_bit_one(const FourBit& p, const f32* code) {
    const u64 at = own_index();
    if (at >= p.len) {
        return;
    }
    const u32 byte = p.packed[at / 2];
    const f32 value = code[at % 2 == 0 ? byte >> 4 : byte & 15];
    T* out = static_cast<T*>(p.out) + at / p.cols * p.pitch + at % p.cols;
    *out = from_f32<T>(value * absmax_of(p, at >> p.block_shift));
}

template <typename T>
DEVICE void four_bit(const FourBit& p) {
    SHARED f32 code[16];
    if (threadIdx.x < 16) {
        code[threadIdx.x] = p.code[threadIdx.x];
    }
    __syncthreads();
    if (p.eights) {
        four_bit_eight<T>(p, code);
    } else {
        four_bit_one<T>(p, code);
    }
}

DEVICE f32 int8_value(i8 value, const f32* absmax, u64 row) {
    const f32 code = static_cast<f32>(value);
    return absmax == nullptr ? code : code * absmax[row] * (1.0f / 127.0f);
}

template <typename T>
DEVICE void int8_eight(const Int8& p) {
    const u64 at = own_index() * EACH;
    if (at >= p.len) {
        return;
    }
    const u32 per_row = p.cols / EACH, item = static_cast<u32>(own_index());
    const u32 row = item / per_row, col = item % per_row * EACH;
    const Vec<i8, EACH> bytes = *reinterpret_cast<const Vec<i8, EACH>*>(p.values + at);
    f32 values[EACH];
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        values[i] = int8_value(bytes[i], p.absmax, row);
    }
    store_eight(static_cast<T*>(p.out) + row * p.pitch + col, values);
}

template <typename T>
DEVICE void int8(const Int8& p) {
    if (p.eights) {
        int8_eight<T>(p);
        return;
    }
    const u64 at = own_index();
    if (at < p.len) {
        const u64 row = at / p.cols;
        T* out = static_cast<T*>(p.out) + row * p.pitch + at % p.cols;
        *out = from_f32<T>(int8_value(p.values[at], p.absmax, row));
    }
}

// Matrices whose elements are read one by one; what arrays and sizes hold is said by each format.
struct Blocks {
    const void* arrays[4];
    void* out;       // [rows, cols]
    u64 pitch, len;  // len: rows * cols
    u32 cols, sizes[3];
};

template <typename T>
DEVICE const T* array(const Blocks& p, u32 i) {
    return static_cast<const T*>(p.arrays[i]);
}

DEVICE f32 half_value(const u8* bytes) {
    const u32 bits = bytes[0] | static_cast<u32>(bytes[1]) << 8;
    // The exponent of 1 is 15 there and 127 here; subnormal numbers become whole ones by the product.
    const f32 magnitude = bits_float((bits & 0x7fffu) << 13) * bits_float(0x77800000u);
    return bits & 0x8000u ? -magnitude : magnitude;
}

// Arrays: codes; scales of blocks. Sizes: rows and columns of a block, blocks of a row.
struct Float8 {
    static DEVICE f32 value(const Blocks& p, u64 row, u32 column) {
        const u32 code = array<u8>(p, 0)[row * p.cols + column], magnitude = code & 127;
        const f32 mantissa = static_cast<f32>(magnitude & 7);
        const u32 exponent = magnitude >> 3;
        const f32 whole = bits_float((exponent + 117) << 23) * (8.0f + mantissa);
        f32 value = exponent == 0 ? mantissa * bits_float(118u << 23) : whole;
        if (magnitude == 127) value = bits_float(0x7fc00000u);
        const u64 block = row / p.sizes[0] * p.sizes[2] + column / p.sizes[1];
        return (code & 128 ? -value : value) * array<f32>(p, 1)[block];
    }
};

// Arrays: codes; scales and zeros [rows, groups]; the group of a column. Sizes: groups, bits of a code.
struct Grouped {
    static DEVICE f32 value(const Blocks& p, u64 row, u32 column) {
        const u64 at = row * p.cols + column, group = row * p.sizes[0] + array<u32>(p, 3)[column];
        const u32 packed = array<u8>(p, 0)[p.sizes[1] == 4 ? at / 2 : at];
        const u32 code = p.sizes[1] == 4 ? packed >> at % 2 * 4 & 15 : packed;
        const f32 zero = static_cast<f32>(array<u16>(p, 2)[group]);
        return (static_cast<f32>(code) - zero) * array<f32>(p, 1)[group];
    }
};

// Arrays: blocks as in GGUF. Sizes: the type, weights and bytes of a block.
struct Ggml {
    static DEVICE u32 nibble(u32 byte, bool high) { return high ? byte >> 4 : byte & 15; }

    static DEVICE f32 q4_k(const u8* block, u32 i) {
        const u8* scales = block + 4;
        const u32 j = i / 32;
        const u32 scale = j < 4 ? scales[j] & 63u : (scales[j + 4] & 15u) | scales[j - 4] >> 6 << 4;
        const u32 minimum = j < 4 ? scales[j + 4] & 63u : scales[j + 4] >> 4 | scales[j] >> 6 << 4;
        const u32 code = nibble(block[16 + i / 64 * 32 + i % 32], i % 64 >= 32);
        const f32 step = half_value(block) * static_cast<f32>(scale);
        const f32 least = half_value(block + 2) * static_cast<f32>(minimum);
        // Both products are exact, so that it does not matter whether one is fused.
        return step * static_cast<f32>(code) - least;
    }

    static DEVICE f32 q6_k(const u8* block, u32 i) {
        const u32 part = i / 128, run = i % 128 / 32, l = i % 32;
        const u32 low = nibble(block[part * 64 + run % 2 * 32 + l], run >= 2);
        const u32 high = block[128 + part * 32 + l] >> (2 * run) & 3;
        const i8 scale = static_cast<i8>(block[192 + part * 8 + run * 2 + l / 16]);
        const f32 code = static_cast<f32>(static_cast<i32>(low | high << 4) - 32);
        return half_value(block + 208) * static_cast<f32>(scale) * code;
    }

    static DEVICE f32 value(const Blocks& p, u64 row, u32 column) {
        const u64 at = row * p.cols + column;
        const u8* block = array<u8>(p, 0) + at / p.sizes[1] * p.sizes[2];
        const u32 i = static_cast<u32>(at % p.sizes[1]);
        switch (p.sizes[0]) {
        case 0: {
            const u32 code = nibble(block[2 + i % 16], i >= 16);
            return (static_cast<f32>(code) - 8.0f) * half_value(block);
        }
        case 1: return static_cast<f32>(static_cast<i8>(block[2 + i])) * half_value(block);
        case 2: return q4_k(block, i);
        default: return q6_k(block, i);
        }
    }
};

template <typename Format, typename T>
DEVICE void blocks(const Blocks& p) {
    const u64 at = own_index();
    if (at >= p.len) return;
    const u64 row = at / p.cols;
    const u32 column = static_cast<u32>(at % p.cols);
    static_cast<T*>(p.out)[row * p.pitch + column] = from_f32<T>(Format::value(p, row, column));
}

KERNEL(dequantise_four_bit_f32, THREADS, FourBit, four_bit<f32>)
KERNEL(dequantise_four_bit_bf16, THREADS, FourBit, four_bit<bf16>)
KERNEL(dequantise_int8_f32, THREADS, Int8, int8<f32>)
KERNEL(dequantise_int8_bf16, THREADS, Int8, int8<bf16>)
KERNEL(dequantise_float8_f32, THREADS, Blocks, (blocks<Float8, f32>))
KERNEL(dequantise_float8_bf16, THREADS, Blocks, (blocks<Float8, bf16>))
KERNEL(dequantise_grouped_f32, THREADS, Blocks, (blocks<Grouped, f32>))
KERNEL(dequantise_grouped_bf16, THREADS, Blocks, (blocks<Grouped, bf16>))
KERNEL(dequantise_ggml_f32, THREADS, Blocks, (blocks<Ggml, f32>))
KERNEL(dequantise_ggml_bf16, THREADS, Blocks, (blocks<Ggml, bf16>))
