// Embedding: a gather of rows, and its gradient without atomics.
#include "convert.cuh"
#include "rows.cuh"

struct Forward {
    Matrix table, out;
    const u32* ids;
    u32 rows, cols;
    u32 first;  // id of the table's first row; tokens of earlier ones are left alone
    u32 threads;  // of a block that share a row
};

template <typename C>
DEVICE void forward(const Forward& p) {
    const u32 group = blockIdx.x * p.threads + threadIdx.x % p.threads;
    if (group >= p.cols / C::LEN) return;
    const u32 together = blockDim.x / p.threads;
    for (u32 row = blockIdx.y * together + threadIdx.x / p.threads; row < p.rows; row += gridDim.y * together) {
        const u32 id = p.ids[row];
        if (id >= p.first) C::copy(p.table, id - p.first, p.out, row, group);
    }
}

struct Backward {
    Matrix d_out, d_table;  // d_table is f32, rows back to back
    const u32* ids;
    u32 rows, cols;
    u32 first, unused;
};

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
// Ids a block compares at a time: SCAN_STEPS by each thread.
constexpr u32 SCAN_STEPS = 4;
constexpr u32 SCAN = THREADS * SCAN_STEPS;

// Writes the tokens of [start, min(start + SCAN, end)) whose id is `id`, in order, to `matches`, and
// returns how many there are.
DEVICE u32 block_matches(const u32* ids, u32 id, u32 start, u32 end, u32 (&matches)[SCAN]) {
    SHARED u32 counts[SCAN_STEPS * WARPS];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 hits[SCAN_STEPS];
#pragma unroll
    for (u32 step = 0; step < SCAN_STEPS; step++) {
        const u32 token = start + step * THREADS + threadIdx.x;
        hits[step] = ballot(token < end && ids[token] == id);
        if (lane == 0) counts[step * WARPS + warp] = __popc(hits[step]);
    }
    __syncthreads();
    u32 total = 0;
#pragma unroll
    for (u32 step = 0; step < SCAN_STEPS; step++) {
        for (u32 other = 0; other < WARPS; other++) {
            if (other == warp && hits[step] >> lane & 1) {
                const u32 before = __popc(hits[step] & ((1u << lane) - 1));
                matches[total + before] = start + step * THREADS + threadIdx.x;
            }
            total += counts[step * WARPS + other];
        }
    }
    __syncthreads();
    return total;
}

// Block (t, tile) owns columns of d_table[ids[t]] if t is the first token with that id. It adds the
// rows of d_out of all tokens with that id, in their order.
template <typename Access>
DEVICE void backward(const Backward& p) {
    SHARED u32 matches[SCAN];
    const u32 first = blockIdx.x, id = p.ids[first];
    if (id < p.first) return;
    // From the end: a repeated id is often near.
    for (u32 end = first; end > 0; end = end > SCAN ? end - SCAN : 0) {
        if (block_matches(p.ids, id, end > SCAN ? end - SCAN : 0, end, matches) > 0) return;
    }
    const u32 group = blockIdx.y * THREADS + threadIdx.x;
    const bool inside = group < p.cols / Access::LEN;
    f32* const d_row = row_of<f32>(p.d_table, id - p.first);
    f32 sums[Access::LEN] = {};
    if (inside) Access::load_vector(d_row, group, sums);
    for (u32 start = first; start < p.rows; start += SCAN) {
        const u32 count = block_matches(p.ids, id, start, p.rows, matches);
        if (!inside) continue;
#pragma unroll 4
        for (u32 i = 0; i < count; i++) {
            const auto d_out = Access::load_once(p.d_out, matches[i], group);
#pragma unroll
            for (u32 e = 0; e < Access::LEN; e++) sums[e] += Access::get(d_out, e);
        }
    }
    if (inside) Access::store_vector(d_row, group, sums);
}

KERNEL(embedding_forward_f32_f32, 256, Forward, (forward<Copy<f32, f32>>))
KERNEL(embedding_forward_f32_bf16, 256, Forward, (forward<Copy<f32, bf16>>))
KERNEL(embedding_forward_bf16_f32, 256, Forward, (forward<Copy<bf16, f32>>))
KERNEL(embedding_forward_bf16_bf16, 256, Forward, (forward<Copy<bf16, bf16>>))
KERNEL(embedding_forward_any, 256, Forward, forward<CopyAny>)
KERNEL(embedding_backward_f32, 256, Backward, backward<Packed<f32>>)
KERNEL(embedding_backward_bf16, 256, Backward, backward<Packed<bf16>>)
KERNEL(embedding_backward_any, 256, Backward, backward<Any>)
