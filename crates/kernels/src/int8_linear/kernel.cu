// Inputs to bytes for LLM.int8(), and sums of products of bytes to values.
#include "rows.cuh"

constexpr u32 THREADS = 256;

struct Input {
    Matrix x;             // [T, in]
    Matrix codes;         // [T, in]
    f32* scales;          // [T]
    u32* outliers;        // [in] flags, how many, which
    const u32* documents; // bounds; rows from the last on are padding
    u32 rows, cols, bounds;
    f32 threshold;        // 0 for none
};

// x rounded to f16, as f32.
DEVICE f32 round_to_f16(f32 x) {
    const u32 bits = float_bits(x), sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) return x;
    if (magnitude >= 0x477ff000u) return bits_float(sign | 0x7f800000u);
    if (magnitude < 0x38800000u) {
        // Steps of 2^-24, which 0.5 has as its last place.
        const f32 stepped = (bits_float(magnitude) + 0.5f) - 0.5f;
        return bits_float(sign | float_bits(stepped));
    }
    return bits_float(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1)) & ~0x1fffu));
}

DEVICE f32 magnitude(f32 x) { return bits_float(float_bits(x) & 0x7fffffffu); }

DEVICE u32 used_rows(const Input& p) {
    return p.bounds == 0 ? p.rows : minimum(p.rows, p.documents[p.bounds - 1]);
}

// Marks columns; every thread has one, in several rows, and writers write the same.
DEVICE void flags(const Input& p) {
    const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.cols) return;
    const u32 used = used_rows(p);
    bool found = false;
    for (u32 row = blockIdx.y; row < used; row += gridDim.y) {
        found = found || magnitude(round_to_f16(Any::load(p.x, row, column).value)) >= p.threshold;
    }
    if (found) p.outliers[column] = 1;
}

// Lists the marked columns in order: one block, whose threads have a run of columns each.
DEVICE void list(const Input& p) {
    SHARED u32 counts[THREADS];
    const u32 each = ceil_div(p.cols, THREADS);
    const u32 first = minimum(threadIdx.x * each, p.cols), last = minimum(first + each, p.cols);
    u32 own = 0;
    for (u32 c = first; c < last; c++) own += p.outliers[c];
    counts[threadIdx.x] = own;
    __syncthreads();
    u32 before = 0, all = 0;
    for (u32 i = 0; i < THREADS; i++) {
        if (i < threadIdx.x) before += counts[i];
        all += counts[i];
    }
    u32* listed = p.outliers + p.cols + 1;
    for (u32 c = first; c < last; c++) {
        if (p.outliers[c]) listed[before++] = c;
    }
    if (threadIdx.x == 0) p.outliers[p.cols] = all;
}

// One row per block.
DEVICE void codes(const Input& p) {
    const u32 row = blockIdx.x;
    // Nothing is at least NaN.
    const f32 limit = p.threshold > 0.0f ? p.threshold : bits_float(0x7fc00000u);
    f32 most = 0.0f;
    for (u32 c = threadIdx.x; c < p.cols; c += THREADS) {
        const f32 x = magnitude(round_to_f16(Any::load(p.x, row, c).value));
        if (!(x >= limit) && !(x <= most)) most = most != most ? most : x;
    }
    const f32 scale = block_max(most), factor = 1.0f / scale * 127.0f;
    const bool usable = scale > 0.0f && scale < bits_float(0x7f800000u);
    for (u32 c = threadIdx.x; c < p.cols; c += THREADS) {
        const f32 x = round_to_f16(Any::load(p.x, row, c).value);
        const bool kept = usable && !(magnitude(x) >= limit) && p.outliers[c] == 0;
        // 1.5 * 2^23 leaves no room for a fraction.
        const f32 whole = (multiply_rounded(x, factor) + 12582912.0f) - 12582912.0f;
        Any::store(p.codes, row, c, {kept ? whole : 0.0f});
    }
    if (threadIdx.x == 0) p.scales[row] = scale;
}

struct Finish {
    Matrix x;            // [T, in]
    Matrix sums;         // [T, out] f32, may be y
    Matrix y;            // [T, out]
    const f32* scales;   // [T]
    const u32* outliers; // how many, which
    const i8* weight;    // [out, in]
    const f32* absmax;   // [out]
    u32 rows, out, cols, unused;
};

DEVICE void finish(const Finish& p) {
    const u32 r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r >= p.out) return;
    const u32 count = p.outliers[0];
    for (u32 t = blockIdx.y; t < p.rows; t += gridDim.y) {
        f32 kept = 0.0f;
        for (u32 i = 0; i < count; i++) {
            const u32 column = p.outliers[1 + i];
            const f32 code = static_cast<f32>(p.weight[static_cast<u64>(r) * p.cols + column]);
            const f32 value = code * p.absmax[r] * (1.0f / 127.0f);
            const f32 rounded = p.x.is_bf16 ? to_f32(from_f32<bf16>(value)) : value;
            kept = fmaf(Any::load(p.x, t, column).value, rounded, kept);
        }
        const f32 sum = load_element<f32>(p.sums, t, r);
        const f32 product = sum * (p.scales[t] * p.absmax[r]) * 6.200124e-5f;
        Any::store(p.y, t, r, {product + kept});
    }
}

KERNEL(int8_linear_flags, THREADS, Input, flags)
KERNEL(int8_linear_list, THREADS, Input, list)
KERNEL(int8_linear_codes, THREADS, Input, codes)
KERNEL(int8_linear_finish, THREADS, Finish, finish)
