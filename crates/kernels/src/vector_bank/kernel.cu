// Matrices put together from vectors of a bank, and gradients of logits and bank.
#include "rows.cuh"

struct VectorBank {
    // The matrix, or its gradient.
    Matrix matrix;
    // [pieces, vectors] and [vectors, length], or a gradient of one of them.
    const f32 *logits, *bank;
    f32* gradient;
    // [pieces, topk]: the chosen vectors, their weights, and the products of those with the gradient of the piece.
    u32* chosen;
    f32 *weights, *dots;
    u32 rows, cols;
    u32 pieces, vectors, length, topk;
    // Pieces side by side.
    u32 across;
    u32 along_columns;
};

// The piece and the element at a place, and back.
struct Place {
    u32 piece, element;

    DEVICE Place(const VectorBank& p, u32 row, u32 column) {
        if (p.along_columns) {
            piece = row / p.length * p.across + column;
            element = row % p.length;
        } else {
            piece = row * p.across + column / p.length;
            element = column % p.length;
        }
    }
};
DEVICE f32 at(const VectorBank& p, u32 piece, u32 e) {
    const u32 row = piece / p.across, column = piece % p.across;
    return p.along_columns ? load_element<f32>(p.matrix, row * p.length + e, column)
                           : load_element<f32>(p.matrix, row, column * p.length + e);
}

// Larger for a larger logit; of equal ones, for the earlier. Never 0 for a number, and no two are the same.
DEVICE u64 key_of(f32 logit, u32 vector) {
    const u32 bits = float_bits(logit);
    const u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<u64>(ordered) << 32 | ~vector;
}

// A warp has a piece: the largest key, then the largest below it.
DEVICE void choose(const VectorBank& p) {
    const u32 lane = threadIdx.x % WARP;
    const u32 piece = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (piece >= p.pieces) return;
    const f32* logits = p.logits + static_cast<u64>(piece) * p.vectors;
    u32* chosen = p.chosen + static_cast<u64>(piece) * p.topk;
    f32* weights = p.weights + static_cast<u64>(piece) * p.topk;
    f32 largest = 0.0f, total = 0.0f;
    u64 before = ~u64(0);
    for (u32 k = 0; k < p.topk; ++k) {
        u64 best = 0;
        for (u32 v = lane; v < p.vectors; v += WARP) {
            const u64 key = key_of(logits[v], v);
            if (key < before) best = maximum(best, key);
        }
#pragma unroll
        for (u32 mask = WARP / 2; mask > 0; mask /= 2) best = maximum(best, shuffle_xor(best, mask));
        before = best;
        const u32 vector = ~static_cast<u32>(best);
        if (k == 0) largest = logits[vector];
        const f32 weight = expf(logits[vector] - largest);
        total += weight;
        if (lane == 0) {
            chosen[k] = vector;
            weights[k] = weight;
        }
    }
    if (lane == 0) {
        for (u32 k = 0; k < p.topk; ++k) weights[k] /= total;
    }
}

// A thread has one column, in several rows.
DEVICE void compose(const VectorBank& p) {
    const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.cols) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const Place place(p, row, column);
        const u64 first = static_cast<u64>(place.piece) * p.topk;
        f32 sum = 0.0f;
        for (u64 k = first; k < first + p.topk; ++k) {
            sum += p.weights[k] * p.bank[static_cast<u64>(p.chosen[k]) * p.length + place.element];
        }
        row_of<f32>(p.matrix, row)[column] = sum;
    }
}

// A warp has a piece.
DEVICE void logits_gradient(const VectorBank& p) {
    const u32 lane = threadIdx.x % WARP;
    const u32 piece = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (piece >= p.pieces) return;
    const u64 first = static_cast<u64>(piece) * p.topk, last = first + p.topk;
    f32 mean = 0.0f;
    for (u64 k = first; k < last; ++k) {
        const f32* vector = p.bank + static_cast<u64>(p.chosen[k]) * p.length;
        f32 dot = 0.0f;
        for (u32 e = lane; e < p.length; e += WARP) dot += at(p, piece, e) * vector[e];
        dot = warp_sum(dot);
        mean += p.weights[k] * dot;
        if (lane == 0) p.dots[k] = dot;
    }
    if (lane > 0) return;
    f32* to = p.gradient + static_cast<u64>(piece) * p.vectors;
    for (u64 k = first; k < last; ++k) to[p.chosen[k]] += p.weights[k] * (p.dots[k] - mean);
}

// A thread has one element of one vector, and looks through all pieces for it.
DEVICE void bank_gradient(const VectorBank& p) {
    const u32 e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= p.length) return;
    for (u32 vector = blockIdx.y; vector < p.vectors; vector += gridDim.y) {
        f32 sum = 0.0f;
        for (u32 piece = 0; piece < p.pieces; ++piece) {
            for (u32 k = 0; k < p.topk; ++k) {
                const u64 of = static_cast<u64>(piece) * p.topk + k;
                if (p.chosen[of] == vector) sum += p.weights[of] * at(p, piece, e);
            }
        }
        p.gradient[static_cast<u64>(vector) * p.length + e] += sum;
    }
}

KERNEL(vector_bank_choose, 128, VectorBank, choose)
KERNEL(vector_bank_compose, 256, VectorBank, compose)
KERNEL(vector_bank_logits_gradient, 128, VectorBank, logits_gradient)
KERNEL(vector_bank_bank_gradient, 256, VectorBank, bank_gradient)
