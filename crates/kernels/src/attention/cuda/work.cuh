// What the kernels share: arguments, which rows a block of threads owns, which keys a query sees.
// The launcher defines WIDTH, the class of the head size: tiles are WIDTH wide, zero beyond the head.
#include "rows.cuh"

// Threads of a team, which walks over tiles by itself. A block has one team, or several that share what the
// block keeps.
constexpr u32 THREADS = 128;
constexpr f32 LOG2E = 1.4426950408889634f;
constexpr f32 LN2 = 0.6931471805599453f;

DEVICE f32 infinity() { return bits_float(0x7f800000u); }

// Place of this thread in its team.
DEVICE u32 team_thread() { return threadIdx.x % THREADS; }

struct Attention {
    Matrix q, k, v, out, d_out, d_qkv;
    f32* lse;    // [T, heads]
    f32* delta;  // [T, heads]
    const u32* cu_q;
    const u32* cu_k;
    u32 sequences, queries;
    u32 heads, kv_heads;
    u32 head_dim, window;
    f32 scale, softcap;  // no cap: 0
    u32 packed;          // all matrices are bf16 and each head of each row starts on 16 bytes
    u32 never;           // always 0, which the compiler does not know
};

// What a block of threads works on: some of the queries of a sequence and tiles of keys, or some of
// the keys and tiles of queries. Kept in shared memory, where it costs no registers while tiles are
// multiplied.
struct Block {
    u32 row;       // first own row of the matrix
    u32 rows;      // own rows up to the end of the sequence; more than the block's size are not its own
    u32 position;  // of the first own row among the keys of its sequence
    u32 other_row, other_rows;  // the whole sequence on the other side
    u32 begin, end;             // tiles of it that see or are seen; none: padding
};

struct Place {
    u32 sequence, first;
};

// Block `index` of all blocks of `size` rows, cut by the bounds `cu`: its sequence and its first row
// there, past the end for a surplus block.
//
// Sequence s owns the indices from cu[s] / size + s on. They suffice, floor(cu[s+1] / size) + 1 -
// floor(cu[s] / size) >= ceil((cu[s+1] - cu[s]) / size), they end at rows / size + sequences, and a
// binary search finds s without a pass over all sequences.
DEVICE Place find_place(const u32* cu, u32 sequences, u32 size, u32 index) {
    u32 low = 0, high = sequences;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (cu[middle] / size + middle <= index) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return {low, (index - cu[low] / size - low) * size};
}

// Own rows in the padding after the last sequence, which counts as one more: `row` may lie past its end.
DEVICE void own_padding(const Attention& p, u32 row, Block& block) {
    block.row = row;
    block.rows = row < p.queries ? p.queries - row : 0;
    block.begin = block.end = 0;
}

// The `size` queries of block `index` and the tiles of `tile` keys that they see; false for a surplus
// block. With one more than there are, `sequences` counts the padding. All threads call it.
DEVICE bool find_queries(const Attention& p, u32 sequences, u32 size, u32 tile, u32 index, Block& block) {
    if (threadIdx.x == 0) {
        const Place place = find_place(p.cu_q, sequences, size, index);
        const u32 *q = p.cu_q + place.sequence, *k = p.cu_k + place.sequence;
        if (place.sequence == p.sequences) {
            own_padding(p, q[0] + place.first, block);
        } else {
            const u32 queries = q[1] - q[0], keys = k[1] - k[0], past = keys - queries;
            const u32 next = place.first + past + 1;
            block.row = q[0] + place.first;
            block.rows = place.first < queries ? queries - place.first : 0;
            block.position = place.first + past;
            block.other_row = k[0];
            block.other_rows = keys;
            block.begin = (next > p.window ? next - p.window : 0) / tile;
            block.end = ceil_div(minimum(place.first + size, queries) + past, tile);
        }
    }
    __syncthreads();
    return block.rows > 0;
}

// The `size` keys of block `index` and the tiles of `tile` queries that see them, for as many queries
// as keys; false for a surplus block. All threads call it.
DEVICE bool find_keys(const Attention& p, u32 size, u32 tile, u32 index, Block& block) {
    if (threadIdx.x == 0) {
        const Place place = find_place(p.cu_k, p.sequences, size, index);
        const u32* k = p.cu_k + place.sequence;
        const u32 keys = k[1] - k[0];
        const u32 after = minimum(place.first + size, keys);
        block.row = k[0] + place.first;
        block.rows = place.first < keys ? keys - place.first : 0;
        block.position = place.first;
        block.other_row = k[0];
        block.other_rows = keys;
        block.begin = place.first / tile;
        // The last key is seen up to query after - 1 + window - 1.
        block.end = ceil_div(p.window <= keys - after ? after + p.window - 1 : keys, tile);
    }
    __syncthreads();
    return block.rows > 0;
}

// What makes products of queries and keys, or the tanh that a softcap makes of them, scores in units of
// ln 2. It is positive: the largest product has the largest score.
DEVICE f32 score_factor(const Attention& p) { return (p.softcap != 0.0f ? p.softcap : p.scale) * LOG2E; }

// Whether query and key, positions in one sequence, are apart by less than the window.
DEVICE bool is_visible(u32 query, u32 key, u32 window) { return key <= query && query - key < window; }

// Whether a rectangle of queries and keys has a hidden pair.
DEVICE bool has_hidden(u32 query, u32 queries, u32 key, u32 keys, u32 window) {
    return key + keys - 1 > query || query + queries - 1 - key >= window;
}

template <typename Engine>
DEVICE void scale_sums(typename Engine::Sums& sums, f32 scale) {
#pragma unroll
    for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
        for (u32 i = 0; i < Engine::WIDE; ++i) sums.at(r, i) *= scale;
    }
}

// Hides the pairs that may not see each other; rows are queries, or keys when TRANSPOSED. `row` and
// `column` are the positions of the first of each.
template <typename Engine, bool TRANSPOSED>
DEVICE void mask(const Attention& p, typename Engine::Scores& scores, u32 row, u32 column) {
    const bool partial = TRANSPOSED ? has_hidden(column, Engine::BLOCK_COLUMNS, row, Engine::BLOCK_ROWS, p.window)
                                    : has_hidden(row, Engine::BLOCK_ROWS, column, Engine::BLOCK_COLUMNS, p.window);
    if (!partial) return;
#pragma unroll
    for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
        for (u32 i = 0; i < Engine::COLUMNS; ++i) {
            const u32 a = row + Engine::row(r), b = column + Engine::column(i);
            const bool visible = TRANSPOSED ? is_visible(b, a, p.window) : is_visible(a, b, p.window);
            if (!visible) scores.at(r, i) = -infinity();
        }
    }
}
