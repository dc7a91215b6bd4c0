// FlashAttention-2, backward, without atomic additions: one kernel sums dq of a block of queries over
// tiles of keys, one sums dk and dv of a block of keys over tiles of queries of every head that reads
// them. Both make P and dS again from `lse`. In the second, rows are keys: P^T and dS^T come out of
// one product as the left operand of the next, and never leave registers.

// Zeros in the columns of a head of q, and of k and v if there is one of that number, by 8 threads.
DEVICE void clear_gradients(const Attention& p, u32 row, u32 head, u32 lane) {
    const u32 q = head * p.head_dim, k = p.heads * p.head_dim + q, v = k + p.kv_heads * p.head_dim;
    for (u32 c = lane; c < p.head_dim; c += 8) {
        Any::store(p.d_qkv, row, q + c, {0.0f});
        if (head < p.kv_heads) {
            Any::store(p.d_qkv, row, k + c, {0.0f});
            Any::store(p.d_qkv, row, v + c, {0.0f});
        }
    }
}

// delta = rowsum(dout * out), 8 threads for each head of each row. Padding after the last sequence has no
// block in the kernels that follow: its gradients are cleared here.
DEVICE void backward_delta(const Attention& p) {
    const u32 lane = threadIdx.x % 8;
    const u64 at = static_cast<u64>(blockIdx.x) * (THREADS / 8) + threadIdx.x / 8;
    const u32 row = static_cast<u32>(at / p.heads);
    const u32 column = static_cast<u32>(at % p.heads) * p.head_dim;
    if (row < p.queries && row >= p.cu_q[p.sequences]) {
        clear_gradients(p, row, static_cast<u32>(at % p.heads), lane);
    }
    f32 sum = 0.0f;
    if (row < p.queries && p.packed) {
        const bf16* out = row_of<const bf16>(p.out, row) + column;
        const bf16* d_out = row_of<const bf16>(p.d_out, row) + column;
        for (u32 c = lane * 8; c < p.head_dim; c += 64) {
            const Vec16<bf16> a = load_nc_16(out + c), b = load_nc_16(d_out + c);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) sum = fmaf(to_f32(a[i]), to_f32(b[i]), sum);
        }
    } else if (row < p.queries) {
        for (u32 c = lane; c < p.head_dim; c += 8) {
            sum = fmaf(Any::load(p.out, row, column + c).value, Any::load(p.d_out, row, column + c).value, sum);
        }
    }
    for (u32 lanes = 1; lanes < 8; lanes *= 2) sum += shuffle_xor(sum, lanes);
    if (row < p.queries && lane == 0) p.delta[at] = sum;
}

// Scores in units of ln 2 from products of queries and keys, and `slopes` times d score / d product,
// short of the factor `scale`.
template <typename Engine>
DEVICE void scale_scores(const Attention& p, typename Engine::Scores& scores, typename Engine::Scores& slopes) {
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
        for (u32 i = 0; i < Engine::COLUMNS; ++i) {
            const f32 tanh = Engine::tanh(scores.at(r, i));
            scores.at(r, i) = p.softcap * LOG2E * tanh;
            slopes.at(r, i) *= 1.0f - tanh * tanh;
        }
    }
}

// The pair of tiles that a block keeps, and the STAGES pairs that stream past it.
template <typename Engine, u32 STAGES>
struct Tiles {
    typename Engine::Element* shared;

    DEVICE typename Engine::Tile own(u32 which) const {
        return {shared + which * Engine::BLOCK_ROWS * Engine::PITCH};
    }
    DEVICE typename Engine::Tile streamed(u32 stage, u32 which) const {
        const u32 rows = 2 * Engine::BLOCK_ROWS + (stage % STAGES * 2 + which) * Engine::BLOCK_COLUMNS;
        return {shared + rows * Engine::PITCH};
    }
};

template <typename Engine, u32 STAGES>
DEVICE void backward_q(const Attention& p) {
    constexpr u32 M = Engine::BLOCK_ROWS, N = Engine::BLOCK_COLUMNS;
    SHARED Block block;
    if (!find_queries(p, p.sequences, M, N, gridDim.y - 1 - blockIdx.y, block)) return;
    const u32 head = blockIdx.x, width = p.head_dim;
    const u32 column = head * width, kv_column = head / (p.heads / p.kv_heads) * width;
    const Tiles<Engine, STAGES> tiles{dynamic_shared<typename Engine::Element>()};
    const auto load = [&](u32 tile) {
        const u32 row = block.other_row + tile * N, rows = block.other_rows - tile * N;
        Engine::template load<N>(p, tiles.streamed(tile, 0), p.k, row, rows, kv_column);
        Engine::template load<N>(p, tiles.streamed(tile, 1), p.v, row, rows, kv_column);
        cp_async_commit();
    };

    Engine::template load<M>(p, tiles.own(0), p.q, block.row, block.rows, column);
    Engine::template load<M>(p, tiles.own(1), p.d_out, block.row, block.rows, column);
    load(block.begin);
    SHARED f32 lse[M];
    SHARED f32 delta[M];
    for (u32 row = threadIdx.x; row < M; row += THREADS) {
        const u64 at = static_cast<u64>(block.row + row) * p.heads + head;
        lse[row] = row < block.rows ? p.lse[at] * LOG2E : infinity();
        delta[row] = row < block.rows ? p.delta[at] : 0.0f;
    }
    typename Engine::Sums sums;
    clear(sums);
    for (u32 tile = block.begin; tile < block.end; ++tile) {
        cp_async_wait<0>();
        __syncthreads();  // this tile is there, nobody reads the one before it
        if (STAGES == 2 && tile + 1 < block.end) load(tile + 1);
        typename Engine::Scores scores, d_scores;
        clear(scores);
#pragma unroll
        for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
            for (u32 i = 0; i < Engine::COLUMNS; ++i) d_scores.at(r, i) = -delta[Engine::row(r)];
        }
        Engine::multiply_transposed(scores, tiles.own(0), tiles.streamed(tile, 0));
        Engine::multiply_transposed(d_scores, tiles.own(1), tiles.streamed(tile, 1));
        scale_scores<Engine>(p, scores, d_scores);
        mask<Engine, false>(p, scores, block.position, tile * N);
#pragma unroll
        for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
            for (u32 i = 0; i < Engine::COLUMNS; ++i) {
                d_scores.at(r, i) *= fast_exp2(scores.at(r, i) - lse[Engine::row(r)]);
            }
        }
        Engine::multiply(sums, d_scores, tiles.streamed(tile, 0));
        if (STAGES == 1 && tile + 1 < block.end) {
            __syncthreads();  // nobody reads this tile any more
            load(tile + 1);
        }
    }
    scale_sums<Engine>(sums, p.scale);
    Engine::store(p, sums, tiles.own(0), p.d_qkv, block.row, block.rows, column);
}

// A tile of queries of one head.
struct Step {
    u32 head, tile;
};

template <typename Engine, u32 STAGES, bool WITH_K, bool WITH_V>
DEVICE void backward_kv(const Attention& p) {
    constexpr u32 M = Engine::BLOCK_ROWS, N = Engine::BLOCK_COLUMNS;
    SHARED Block block;
    if (!find_keys(p, M, N, blockIdx.y, block)) return;
    const u32 group = p.heads / p.kv_heads, width = p.head_dim, column = blockIdx.x * width;
    const Tiles<Engine, STAGES> tiles{dynamic_shared<typename Engine::Element>()};
    const auto load = [&](Step step, u32 stage) {
        const u32 row = block.other_row + step.tile * N, rows = block.other_rows - step.tile * N;
        Engine::template load<N>(p, tiles.streamed(stage, 0), p.q, row, rows, step.head * width);
        Engine::template load<N>(p, tiles.streamed(stage, 1), p.d_out, row, rows, step.head * width);
        cp_async_commit();
    };
    // lse and delta of a tile of queries, and of the one after it.
    SHARED f32 statistics[2][2 * N];
    // Thread i of the first N has lse of query i, of the next N delta.
    const auto statistic = [&](Step step) {
        const u32 query = step.tile * N + threadIdx.x % N;
        const bool is_lse = threadIdx.x < N;
        if (query >= block.other_rows) return is_lse ? infinity() : 0.0f;
        const u64 at = static_cast<u64>(block.other_row + query) * p.heads + step.head;
        return is_lse ? p.lse[at] * LOG2E : p.delta[at];
    };

    Engine::template load<M>(p, tiles.own(0), p.k, block.row, block.rows, column);
    if (WITH_K) Engine::template load<M>(p, tiles.own(1), p.v, block.row, block.rows, column);
    Step step{blockIdx.x * group, block.begin};
    load(step, 0);
    if (threadIdx.x < 2 * N) statistics[0][threadIdx.x] = statistic(step);
    typename Engine::Sums d_k, d_v;
    clear(d_k);
    clear(d_v);
    for (u32 stage = 0;; ++stage) {
        Step next = step;
        if (++next.tile == block.end) next = {step.head + 1, block.begin};
        const bool more = next.head < (blockIdx.x + 1) * group;
        cp_async_wait<0>();
        __syncthreads();  // this tile is there, nobody reads the one before it
        if (STAGES == 2 && more) load(next, stage + 1);
        const f32 next_statistic = more && threadIdx.x < 2 * N ? statistic(next) : 0.0f;
        typename Engine::Scores scores, d_scores;
        clear(scores);
        const f32* lse = statistics[stage % 2];
        const f32* delta = lse + N;
#pragma unroll
        for (u32 i = 0; i < Engine::COLUMNS; ++i) {
#pragma unroll
            for (u32 r = 0; r < Engine::ROWS; ++r) d_scores.at(r, i) = -delta[Engine::column(i)];
        }
        Engine::multiply_transposed(scores, tiles.own(0), tiles.streamed(stage, 0));
        if (WITH_K) Engine::multiply_transposed(d_scores, tiles.own(1), tiles.streamed(stage, 1));
        scale_scores<Engine>(p, scores, d_scores);
        mask<Engine, true>(p, scores, block.position, step.tile * N);
#pragma unroll
        for (u32 i = 0; i < Engine::COLUMNS; ++i) {
#pragma unroll
            for (u32 r = 0; r < Engine::ROWS; ++r) {
                scores.at(r, i) = fast_exp2(scores.at(r, i) - lse[Engine::column(i)]);
                d_scores.at(r, i) *= scores.at(r, i);
            }
        }
        if (WITH_V) Engine::multiply(d_v, scores, tiles.streamed(stage, 1));
        if (WITH_K) Engine::multiply(d_k, d_scores, tiles.streamed(stage, 0));
        if (!more) break;
        if (threadIdx.x < 2 * N) statistics[(stage + 1) % 2][threadIdx.x] = next_statistic;
        if (STAGES == 1) {
            __syncthreads();  // nobody reads this tile any more
            load(next, 0);
        }
        step = next;
    }
    const u32 k_column = p.heads * width + column, v_column = k_column + p.kv_heads * width;
    if (WITH_K) {
        scale_sums<Engine>(d_k, p.scale);
        Engine::store(p, d_k, tiles.own(0), p.d_qkv, block.row, block.rows, k_column);
    }
    if (WITH_V) Engine::store(p, d_v, tiles.own(1), p.d_qkv, block.row, block.rows, v_column);
}
