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

    // Replaces scores by 2^(factor score - max), and scales `sums` to a new maximum.
    DEVICE void add(typename Engine::Scores& scores, f32 factor, typename Engine::Sums& sums) {
        f32 shrink[Engine::ROWS];
        bool shrinks = false;
#pragma unroll
        for (u32 r = 0; r < Engine::ROWS; ++r) {
            f32 next = scores.at(r, 0);
#pragma unroll
            for (u32 i = 1; i < Engine::COLUMNS; ++i) next = fmaxf(next, scores.at(r, i));
            next = Engine::row_max(next) * factor;
            const bool grows = next > max[r] + SLACK;
            shrink[r] = grows ? fast_exp2(max[r] - next) : 1.0f;
            max[r] = grows ? next : max[r];
            shrinks |= grows;
            // A row that has seen no key yet: every power is 0, not NaN.
            const f32 base = max[r] == -infinity() ? 0.0f : max[r];
            sum[r] *= shrink[r];
#pragma unroll
            for (u32 i = 0; i < Engine::COLUMNS; i += 2) {
                scores.at(r, i) = fast_exp2(fmaf(scores.at(r, i), factor, -base));
                scores.at(r, i + 1) = fast_exp2(fmaf(scores.at(r, i + 1), factor, -base));
                sum[r] += scores.at(r, i) + scores.at(r, i + 1);
            }
        }
        if (!shrinks) return;
#pragma unroll
        for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
            for (u32 i = 0; i < Engine::WIDE; ++i) sums.at(r, i) *= shrink[r];
        }
    }
};

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
        const u32 rows = minimum(block.rows, M);
        for (u32 at = threadIdx.x; at < rows * width; at += THREADS) {
            Any::store(p.out, block.row + at / width, column + at % width, {0.0f});
        }
        for (u32 row = threadIdx.x; row < rows; row += THREADS) {
            p.lse[static_cast<u64>(block.row + row) * p.heads + head] = 0.0f;
        }
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
        softmax.add(scores, factor, sums);
        Engine::multiply(sums, scores, stream.tile(stage, 1));
        if (tile == block.begin) break;
    }

#pragma unroll
    for (u32 r = 0; r < Engine::ROWS; ++r) {
        const f32 sum = Engine::row_sum(softmax.sum[r]);
        const f32 norm = 1.0f / sum;
#pragma unroll
        for (u32 i = 0; i < Engine::WIDE; ++i) sums.at(r, i) *= norm;
        const u32 row = Engine::row(r);
        if (Engine::is_leader() && row < block.rows) {
            p.lse[static_cast<u64>(block.row + row) * p.heads + head] = softmax.max[r] * LN2 + logf(sum);
        }
    }
    Engine::store(p, sums, q, p.out, block.row, block.rows, column);
}
