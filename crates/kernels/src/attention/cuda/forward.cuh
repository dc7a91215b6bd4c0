// FlashAttention-2, forward: a block of queries of one head walks over tiles of keys and values with a
// running maximum and sum. While it works on one tile the next one arrives.

// Puts the tanh of a softcap in the place of products of queries and keys.
template <typename Engine>
DEVICE void cap_scores(const Attention& p, typename Engine::Scores& scores) {
    if (p.softcap == 0.0f) return;
    const f32 scale = p.scale / p.softcap;
#pragma unroll
    for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
        for (u32 i = 0; i < Engine::COLUMNS; ++i) scores.at(r, i) = Engine::tanh(scores.at(r, i) * scale);
    }
}

// By how much, in units of ln 2, a score may exceed the maximum that powers are relative to. As long as
// it does not, nothing summed so far has to be scaled, and 2^8 is far from the end of a float.
constexpr f32 SLACK = 8.0f;

// Running softmax of the rows of a thread.
template <typename Engine>
struct Softmax {
    f32 max[Engine::ROWS];  // at most SLACK below the largest score
    f32 sum[Engine::ROWS];  // this thread's columns

    DEVICE Softmax() {
#pragma unroll
        for (u32 r = 0; r < Engine::ROWS; ++r) max[r] = -infinity(), sum[r] = 0.0f;
    }

    // What sums of older tiles are to be multiplied by.
    struct Shrink {
        f32 by[Engine::ROWS];
        bool any;
    };

    // Replaces scores by 2^(factor score - max).
    DEVICE Shrink add(typename Engine::Scores& scores, f32 factor) {
        Shrink shrink;
        shrink.any = false;
#pragma unroll
        for (u32 r = 0; r < Engine::ROWS; ++r) {
            f32 next = scores.at(r, 0);
#pragma unroll
            for (u32 i = 1; i < Engine::COLUMNS; ++i) next = fmaxf(next, scores.at(r, i));
            next = Engine::row_max(next) * factor;
            const bool grows = next > max[r] + SLACK;
            shrink.by[r] = grows ? fast_exp2(max[r] - next) : 1.0f;
            max[r] = grows ? next : max[r];
            shrink.any |= grows;
            // A row that has seen no key yet: every power is 0, not NaN.
            const f32 base = max[r] == -infinity() ? 0.0f : max[r];
            sum[r] *= shrink.by[r];
#pragma unroll
            for (u32 i = 0; i < Engine::COLUMNS; i += 2) {
                scores.at(r, i) = fast_exp2(fmaf(scores.at(r, i), factor, -base));
                scores.at(r, i + 1) = fast_exp2(fmaf(scores.at(r, i + 1), factor, -base));
                sum[r] += scores.at(r, i) + scores.at(r, i + 1);
            }
        }
        return shrink;
    }

    static DEVICE void scale(typename Engine::Sums& sums, const Shrink& shrink) {
        if (!shrink.any) return;
#pragma unroll
        for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
            for (u32 i = 0; i < Engine::WIDE; ++i) sums.at(r, i) *= shrink.by[r];
        }
    }

    // Makes sums means, and writes the log-sum-exp of `block`'s rows.
    DEVICE void finish(const Attention& p, typename Engine::Sums& sums, const Block& block, u32 head) const {
#pragma unroll
        for (u32 r = 0; r < Engine::ROWS; ++r) {
            const f32 total = Engine::row_sum(sum[r]);
            const f32 norm = 1.0f / total;
#pragma unroll
            for (u32 i = 0; i < Engine::WIDE; ++i) sums.at(r, i) *= norm;
            const u32 row = Engine::row(r);
            if (Engine::is_leader() && row < block.rows) {
                p.lse[static_cast<u64>(block.row + row) * p.heads + head] = max[r] * LN2 + logf(total);
            }
        }
    }
};

// Zeros of a head in rows that belong to no sequence, by COUNT threads.
template <u32 COUNT>
DEVICE void clear_outputs(const Attention& p, u32 row, u32 rows, u32 head) {
    const u32 width = p.head_dim, column = head * width;
    for (u32 at = threadIdx.x; at < rows * width; at += COUNT) {
        Any::store(p.out, row + at / width, column + at % width, {0.0f});
    }
    for (u32 r = threadIdx.x; r < rows; r += COUNT) p.lse[static_cast<u64>(row + r) * p.heads + head] = 0.0f;
}

// Keys and values that stream past a block of queries: two tiles of each.
template <typename Engine>
struct Stream {
    typename Engine::Element* shared;

    DEVICE typename Engine::Tile tile(u32 stage, u32 which) const {
        return {shared + (stage % 2 * 2 + which) * Engine::BLOCK_COLUMNS * Engine::PITCH};
    }
};

template <typename Engine>
DEVICE void forward(const Attention& p) {
    using Tile = typename Engine::Tile;
    constexpr u32 M = Engine::BLOCK_ROWS, N = Engine::BLOCK_COLUMNS;
    SHARED Block block;
    // Later queries see more keys: their blocks start first.
    if (!find_queries(p, p.sequences + 1, M, N, gridDim.y - 1 - blockIdx.y, block)) return;
    const u32 head = blockIdx.x, width = p.head_dim;
    const u32 column = head * width, kv_column = head / (p.heads / p.kv_heads) * width;
    if (block.end == 0) {
        clear_outputs<THREADS>(p, block.row, minimum(block.rows, M), head);
        return;
    }
    auto* shared = dynamic_shared<typename Engine::Element>();
    const Tile q{shared};
    const Stream<Engine> stream{shared + M * Engine::PITCH};
    const auto load = [&](u32 tile, u32 stage) {
        const u32 row = block.other_row + tile * N, rows = block.other_rows - tile * N;
        Engine::template load<N>(p, stream.tile(stage, 0), p.k, row, rows, kv_column);
        Engine::template load<N>(p, stream.tile(stage, 1), p.v, row, rows, kv_column);
        cp_async_commit();
    };

    u32 tile = block.end - 1;
    Engine::template load<M>(p, q, p.q, block.row, block.rows, column);
    cp_async_commit();
    load(tile, 0);
    typename Engine::Sums sums;
    clear(sums);
    Softmax<Engine> softmax;
    const auto queries = [&] {
        if constexpr (Engine::IN_REGISTERS) {
            cp_async_wait<1>();
            __syncthreads();  // the queries are there
            return Engine::fragments(q);
        } else {
            return q;
        }
    }();
    const f32 factor = score_factor(p);
    for (u32 stage = 0;; ++stage, --tile) {
        cp_async_wait<0>();
        __syncthreads();  // this tile is there, nobody reads the one before it
        if (tile > block.begin) load(tile - 1, stage + 1);
        typename Engine::Scores scores;
        clear(scores);
        Engine::multiply_transposed(scores, queries, stream.tile(stage, 0));
        cap_scores<Engine>(p, scores);
        mask<Engine, false>(p, scores, block.position, tile * N);
        softmax.scale(sums, softmax.add(scores, factor));
        Engine::multiply(sums, scores, stream.tile(stage, 1));
        if (tile == block.begin) break;
    }

    softmax.finish(p, sums, block, head);
    Engine::store(p, sums, q, p.out, block.row, block.rows, column);
}
