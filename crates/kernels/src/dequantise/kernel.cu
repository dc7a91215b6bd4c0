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
    // Exact in f64, so that the product is rounded once before the sum and not fused with it.
    const f64 product = static_cast<f64>(p.map[p.indices[block]]) * p.absmax[block / 256];
    return static_cast<f32>(product) + p.offset;
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

KERNEL(dequantise_four_bit_f32, THREADS, FourBit, four_bit<f32>)
KERNEL(dequantise_four_bit_bf16, THREADS, FourBit, four_bit<bf16>)
KERNEL(dequantise_int8_f32, THREADS, Int8, int8<f32>)
KERNEL(dequantise_int8_bf16, THREADS, Int8, int8<bf16>)
