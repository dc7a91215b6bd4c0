// The backward pass on Hopper, as in backward.cuh. The product of a tile's dS is under way while the next
// tile's scores are made.

template <typename Loads>
DEVICE void backward_q_async(const typename Loads::Params& params) {
    using Engine = typename Loads::Engine;
    constexpr u32 M = Engine::BLOCK_ROWS, N = Engine::BLOCK_COLUMNS, ROWS = Engine::ROWS;
    using Own = typename Engine::Own;
    using Streamed = typename Engine::Streamed;
    SHARED Block block;
    const Loads loads(params);
    const Attention& p = loads.p;
    if (!find_queries(p, p.sequences, M, N, gridDim.y - 1 - blockIdx.y, block)) return;
    const u32 head = blockIdx.x, kv_head = head / (p.heads / p.kv_heads);
    bf16* const shared = swizzled_shared();
    const Own q{shared}, d_out{shared + Engine::OWN};
    bf16* const streamed = shared + 2 * Engine::OWN;
    // Three tiles of keys, for one is still read by the product of the step before; two of values.
    const auto keys = [&](u32 step) { return Streamed{streamed + step % 3 * Engine::STREAMED}; };
    const auto values = [&](u32 step) { return Streamed{streamed + (3 + step % 2) * Engine::STREAMED}; };
    const u32 steps = block.end - block.begin;
    const auto load = [&](u32 step) {
        const u32 first = (block.begin + step) * N;
        const u32 row = block.other_row + first, rows = block.other_rows - first;
        loads.begin(keys(step), loads.from.k, row, rows, kv_head);
        loads.begin(values(step), loads.from.v, row, rows, kv_head);
        loads.commit();
    };

    loads.begin(q, loads.from.q, block.row, block.rows, head);
    loads.begin(d_out, loads.from.d_out, block.row, block.rows, head);
    load(0);
    f32 lse[ROWS], delta[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) {
        const u32 row = Engine::row(r);
        const u64 at = static_cast<u64>(block.row + row) * p.heads + head;
        lse[r] = row < block.rows ? p.lse[at] * LOG2E : infinity();
        delta[r] = row < block.rows ? p.delta[at] : 0.0f;
    }
    const f32 factor = score_factor(p);
    typename Engine::Sums sums;
    clear(sums);
    typename Engine::Weights weights;
    for (u32 step = 0; step < steps; ++step) {
        loads.wait(step);
        const u32 rows = block.other_rows - (block.begin + step) * N;
        loads.clear_rest(keys(step), rows);
        loads.clear_rest(values(step), rows);
        __syncthreads();  // this tile is there, nobody reads the one before the last
        typename Engine::Scores scores, d_scores;
        wgmma_fence();
        Engine::begin_transposed(scores, q, keys(step));
        Engine::begin_transposed(d_scores, d_out, values(step));
        // Behind the first products, so that they are under way meanwhile.
        if (step + 1 < steps) load(step + 1);
        if (step > 0) {
            Engine::begin(sums, weights, keys(step - 1));
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        wgmma_settle(scores.c[0]);
        wgmma_settle(d_scores.c[0]);
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
#pragma unroll
            for (u32 i = 0; i < Engine::COLUMNS; ++i) d_scores.at(r, i) -= delta[r];
        }
        cap_scores<Engine>(p, scores, d_scores);
        mask<Engine, false>(p, scores, block.position, (block.begin + step) * N);
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
#pragma unroll
            for (u32 i = 0; i < Engine::COLUMNS; ++i) {
                d_scores.at(r, i) *= fast_exp2(fmaf(scores.at(r, i), factor, -lse[r]));
            }
        }
        wgmma_hold(p.never);
        wgmma_wait<0>();  // the product with `weights`
        weights = Engine::rounded(d_scores);
    }
    wgmma_fence();
    Engine::begin(sums, weights, keys(steps - 1));
    wgmma_wait<0>();
    wgmma_settle(sums.c[0]);
    scale_sums<Engine>(sums, p.scale);
    Engine::store(p, sums, q, p.d_qkv, block.row, block.rows, head * p.head_dim);
}

// All groups of the block read the same tiles of queries, each against its own 64 keys.
template <typename Loads>
DEVICE void backward_kv_async(const typename Loads::Params& params) {
    using Engine = typename Loads::Engine;
    constexpr u32 M = Engine::BLOCK_ROWS, N = Engine::BLOCK_COLUMNS;
    using Own = typename Engine::Own;
    using Streamed = typename Engine::Streamed;
    SHARED Block block;
    const Loads loads(params);
    const Attention& p = loads.p;
    if (!find_keys(p, M, N, blockIdx.y, block)) return;
    const u32 group = p.heads / p.kv_heads;
    const u32 tiles = block.end - block.begin, steps = group * tiles;
    bf16* const shared = swizzled_shared();
    const Own k{shared}, v{shared + Engine::OWN};
    bf16* const streamed = shared + 2 * Engine::OWN;
    // Three of each, for one is still read by the products of the step before.
    const auto queries = [&](u32 step) { return Streamed{streamed + step % 3 * 2 * Engine::STREAMED}; };
    const auto d_outs = [&](u32 step) { return Streamed{streamed + (step % 3 * 2 + 1) * Engine::STREAMED}; };
    const auto head = [&](u32 step) { return blockIdx.x * group + step / tiles; };
    const auto first_query = [&](u32 step) { return (block.begin + step % tiles) * N; };
    const auto load = [&](u32 step) {
        const u32 first = first_query(step), row = block.other_row + first, rows = block.other_rows - first;
        loads.begin(queries(step), loads.from.q, row, rows, head(step));
        loads.begin(d_outs(step), loads.from.d_out, row, rows, head(step));
        loads.commit();
    };
    // lse and delta of a tile of queries, and of the one after it. Thread i of the first N has lse of query
    // i, of the next N delta.
    SHARED f32 statistics[2][2 * N];
    const u32 thread = threadIdx.x;
    static_assert(2 * N <= Engine::ALL_THREADS, "a thread for each statistic");
    const auto statistic = [&](u32 step) {
        const u32 query = first_query(step) + thread % N;
        const bool is_lse = thread < N;
        if (query >= block.other_rows) return is_lse ? infinity() : 0.0f;
        const u64 at = static_cast<u64>(block.other_row + query) * p.heads + head(step);
        return is_lse ? p.lse[at] * LOG2E : p.delta[at];
    };

    loads.begin(k, loads.from.k, block.row, block.rows, blockIdx.x);
    loads.begin(v, loads.from.v, block.row, block.rows, blockIdx.x);
    typename Engine::Sums d_k, d_v;
    clear(d_k);
    clear(d_v);
    load(0);  // there is one: a key's own query sees it
    if (thread < 2 * N) statistics[0][thread] = statistic(0);
    const f32 factor = score_factor(p);
    for (u32 step = 0;; ++step) {
        const bool more = step + 1 < steps;
        loads.wait(step);
        loads.clear_rest(queries(step), block.other_rows - first_query(step));
        loads.clear_rest(d_outs(step), block.other_rows - first_query(step));
        __syncthreads();  // this tile is there, nobody reads the one before the last
        if (more) load(step + 1);
        const f32 next_statistic = more && thread < 2 * N ? statistic(step + 1) : 0.0f;
        const f32* lse = statistics[step % 2];
        const f32* delta = lse + N;
        typename Engine::Scores scores, d_scores;
        wgmma_fence();
        Engine::begin_transposed(scores, k, queries(step));
        Engine::begin_transposed(d_scores, v, d_outs(step));
        wgmma_wait<0>();  // the sums of the step before as well
        wgmma_settle(scores.c[0]);
        wgmma_settle(d_scores.c[0]);
#pragma unroll
        for (u32 i = 0; i < Engine::COLUMNS; ++i) {
#pragma unroll
            for (u32 r = 0; r < Engine::ROWS; ++r) d_scores.at(r, i) -= delta[Engine::column(i)];
        }
        cap_scores<Engine>(p, scores, d_scores);
        mask<Engine, true>(p, scores, block.position, first_query(step));
#pragma unroll
        for (u32 i = 0; i < Engine::COLUMNS; ++i) {
#pragma unroll
            for (u32 r = 0; r < Engine::ROWS; ++r) {
                scores.at(r, i) = fast_exp2(fmaf(scores.at(r, i), factor, -lse[Engine::column(i)]));
                d_scores.at(r, i) *= scores.at(r, i);
            }
        }
        const typename Engine::Weights weights = Engine::rounded(scores), d_weights = Engine::rounded(d_scores);
        wgmma_fence();
        Engine::begin(d_v, weights, d_outs(step));
        Engine::begin(d_k, d_weights, queries(step));
        if (!more) break;
        if (thread < 2 * N) statistics[(step + 1) % 2][thread] = next_statistic;
    }
    wgmma_wait<0>();
    wgmma_settle(d_k.c[0]);
    wgmma_settle(d_v.c[0]);
    const u32 k_column = (p.heads + blockIdx.x) * p.head_dim, v_column = k_column + p.kv_heads * p.head_dim;
    scale_sums<Engine>(d_k, p.scale);
    Engine::store(p, d_k, k, p.d_qkv, block.row, block.rows, k_column);
    Engine::store(p, d_v, v, p.d_qkv, block.row, block.rows, v_column);
}
