// FlashAttention-2, forward: a block of queries of one head walks over tiles of keys with a running
// maximum and sum. While a tile's scores are made its values arrive; while its values are summed the
// next keys arrive.

// Scores in units of ln 2 from products of queries and keys.
template <typename Engine>
DEVICE void scale_scores(const Attention& p, typename Engine::Scores& scores) {
    const f32 scale = p.softcap != 0.0f ? p.scale / p.softcap : p.scale * LOG2E;
#pragma unroll
    for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
        for (u32 i = 0; i < Engine::COLUMNS; ++i) scores.at(r, i) *= scale;
    }
    if (p.softcap == 0.0f) return;
#pragma unroll
    for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
        for (u32 i = 0; i < Engine::COLUMNS; ++i) scores.at(r, i) = p.softcap * LOG2E * Engine::tanh(scores.at(r, i));
    }
}

// Running softmax of the rows of a thread.
template <typename Engine>
struct Softmax {
    f32 max[Engine::ROWS];
    f32 sum[Engine::ROWS];  // this thread's columns

    DEVICE Softmax() {
#pragma unroll
        for (u32 r = 0; r < Engine::ROWS; ++r) max[r] = -infinity(), sum[r] = 0.0f;
    }

    // Replaces scores by 2^(score - max), and scales `sums` to a new maximum.
    DEVICE void add(typename Engine::Scores& scores, typename Engine::Sums& sums) {
#pragma unroll
        for (u32 r = 0; r < Engine::ROWS; ++r) {
            f32 next = max[r];
#pragma unroll
            for (u32 i = 0; i < Engine::COLUMNS; ++i) next = fmaxf(next, scores.at(r, i));
            next = Engine::row_max(next);
            // A row that has seen no key yet: every power is 0, not NaN.
            const f32 base = next == -infinity() ? 0.0f : next;
            const f32 shrink = fast_exp2(max[r] - base);
            max[r] = next;
            sum[r] *= shrink;
#pragma unroll
            for (u32 i = 0; i < Engine::COLUMNS; i += 2) {
                scores.at(r, i) = fast_exp2(scores.at(r, i) - base);
                scores.at(r, i + 1) = fast_exp2(scores.at(r, i + 1) - base);
                sum[r] += scores.at(r, i) + scores.at(r, i + 1);
            }
#pragma unroll
            for (u32 i = 0; i < Engine::WIDE; ++i) sums.at(r, i) *= shrink;
        }
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
    const Tile q{shared}, k{shared + M * Engine::PITCH}, v{shared + (M + N) * Engine::PITCH};
    const auto load = [&](Tile tile, const Matrix& m, u32 index) {
        const u32 row = block.other_row + index * N, rows = block.other_rows - index * N;
        Engine::template load<N>(p, tile, m, row, rows, kv_column);
    };

    u32 tile = block.end - 1;
    Engine::template load<M>(p, q, p.q, block.row, block.rows, column);
    load(k, p.k, tile);
    cp_async_commit();
    typename Engine::Sums sums;
    clear(sums);
    Softmax<Engine> softmax;
    for (;; --tile) {
        cp_async_wait<0>();
        __syncthreads();  // the keys are there, nobody reads the last values any more
        load(v, p.v, tile);
        cp_async_commit();
        typename Engine::Scores scores;
        clear(scores);
        Engine::multiply_transposed(scores, q, k);
        __syncthreads();  // nobody reads the keys any more
        if (tile > block.begin) load(k, p.k, tile - 1);
        cp_async_commit();
        scale_scores<Engine>(p, scores);
        mask<Engine, false>(p, scores, block.position, tile * N);
        softmax.add(scores, sums);
        cp_async_wait<1>();
        __syncthreads();  // the values are there; the next keys may be under way
        Engine::multiply(sums, scores, v);
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
