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

// As in the forward pass; `slopes` times d score / d product, short of the factor `scale`.
template <typename Engine>
DEVICE void cap_scores(const Attention& p, typename Engine::Scores& scores, typename Engine::Scores& slopes) {
    if (p.softcap == 0.0f) return;
    cap_scores<Engine>(p, scores);
#pragma unroll
    for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
        for (u32 i = 0; i < Engine::COLUMNS; ++i) slopes.at(r, i) *= 1.0f - scores.at(r, i) * scores.at(r, i);
    }
}

// The pair of tiles that a block keeps, and the STAGES pairs that stream past each of its teams.
template <typename Engine, u32 STAGES>
struct Tiles {
    typename Engine::Element* shared;
    u32 team;

    DEVICE typename Engine::Tile own(u32 which) const {
        return {shared + which * Engine::BLOCK_ROWS * Engine::PITCH};
    }
    DEVICE typename Engine::Tile streamed(u32 stage, u32 which) const {
        const u32 tiles = (team * STAGES + stage % STAGES) * 2 + which;
        const u32 rows = 2 * Engine::BLOCK_ROWS + tiles * Engine::BLOCK_COLUMNS;
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
    const Tiles<Engine, STAGES> tiles{dynamic_shared<typename Engine::Element>(), 0};
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
    const f32 factor = score_factor(p);
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
        cap_scores<Engine>(p, scores, d_scores);
        mask<Engine, false>(p, scores, block.position, tile * N);
#pragma unroll
        for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
            for (u32 i = 0; i < Engine::COLUMNS; ++i) {
                d_scores.at(r, i) *= fast_exp2(fmaf(scores.at(r, i), factor, -lse[Engine::row(r)]));
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

// The sums of the threads of a team, through shared memory.
template <typename Engine>
DEVICE void put_sums(f32* shared, typename Engine::Sums& sums) {
#pragma unroll
    for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
        for (u32 i = 0; i < Engine::WIDE; ++i) shared[(r * Engine::WIDE + i) * THREADS + team_thread()] = sums.at(r, i);
    }
}

template <typename Engine>
DEVICE void add_sums(const f32* shared, typename Engine::Sums& sums) {
#pragma unroll
    for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
        for (u32 i = 0; i < Engine::WIDE; ++i) sums.at(r, i) += shared[(r * Engine::WIDE + i) * THREADS + team_thread()];
    }
}

// Adds the sums of two teams, in the place of tiles: d_k in the first team, d_v in the second.
template <typename Engine>
DEVICE void add_teams(u32 team, typename Engine::Sums& d_k, typename Engine::Sums& d_v) {
    f32* const first = dynamic_shared<f32>();
    f32* const second = first + Engine::ROWS * Engine::WIDE * THREADS;
    __syncthreads();  // nobody reads a tile any more
    if (team == 0) {
        put_sums<Engine>(first, d_v);
    } else {
        put_sums<Engine>(second, d_k);
    }
    __syncthreads();
    if (team == 0) {
        add_sums<Engine>(second, d_k);
    } else {
        add_sums<Engine>(first, d_v);
    }
    __syncthreads();  // nobody reads sums any more
}

// The steps, tiles of queries of every head of the group, go to the teams in turn: a block of early
// keys, which all queries see, is done in so much less time. One team waits for its own tiles only.
template <typename Engine, u32 STAGES, u32 TEAMS, bool WITH_K, bool WITH_V>
DEVICE void backward_kv(const Attention& p) {
    constexpr u32 M = Engine::BLOCK_ROWS, N = Engine::BLOCK_COLUMNS;
    static_assert(TEAMS == 1 || (TEAMS == 2 && STAGES == 2 && WITH_K && WITH_V), "as the code below");
    SHARED Block block;
    if (!find_keys(p, M, N, blockIdx.y, block)) return;
    const u32 team = TEAMS == 1 ? 0 : threadIdx.x / THREADS, thread = team_thread();
    const u32 group = p.heads / p.kv_heads, width = p.head_dim, column = blockIdx.x * width;
    const u32 end_head = (blockIdx.x + 1) * group;
    const Tiles<Engine, STAGES> tiles{dynamic_shared<typename Engine::Element>(), team};
    const auto sync = [&] {
        if constexpr (TEAMS == 1) {
            __syncthreads();
        } else {
            team_barrier(team, THREADS);
        }
    };
    const auto step_after = [&](Step step, u32 steps) {
        step.tile += steps;
        while (step.tile >= block.end) step.tile -= block.end - block.begin, ++step.head;
        return step;
    };
    const auto load = [&](Step step, u32 stage) {
        const u32 row = block.other_row + step.tile * N, rows = block.other_rows - step.tile * N;
        Engine::template load<N>(p, tiles.streamed(stage, 0), p.q, row, rows, step.head * width);
        Engine::template load<N>(p, tiles.streamed(stage, 1), p.d_out, row, rows, step.head * width);
        cp_async_commit();
    };
    // lse and delta of a tile of queries, and of the one after it.
    SHARED f32 all_statistics[TEAMS][2][2 * N];
    auto& statistics = all_statistics[team];
    // Thread i of the first N has lse of query i, of the next N delta.
    const auto statistic = [&](Step step) {
        const u32 query = step.tile * N + thread % N;
        const bool is_lse = thread < N;
        if (query >= block.other_rows) return is_lse ? infinity() : 0.0f;
        const u64 at = static_cast<u64>(block.other_row + query) * p.heads + step.head;
        return is_lse ? p.lse[at] * LOG2E : p.delta[at];
    };

    if (team == 0) Engine::template load<M>(p, tiles.own(0), p.k, block.row, block.rows, column);
    if (WITH_K && team == TEAMS - 1) Engine::template load<M>(p, tiles.own(1), p.v, block.row, block.rows, column);
    cp_async_commit();
    Step step = step_after({blockIdx.x * group, block.begin}, team);
    if (step.head < end_head) {
        load(step, 0);
        if (thread < 2 * N) statistics[0][thread] = statistic(step);
    }
    if constexpr (TEAMS > 1) {
        cp_async_wait<0>();
        __syncthreads();  // what both teams read is there
    }
    const f32 factor = score_factor(p);
    typename Engine::Sums d_k, d_v;
    clear(d_k);
    clear(d_v);
    for (u32 stage = 0; step.head < end_head; ++stage) {
        const Step next = step_after(step, TEAMS);
        const bool more = next.head < end_head;
        cp_async_wait<0>();
        sync();  // this tile is there, nobody reads the one before it
        if (STAGES == 2 && more) load(next, stage + 1);
        const f32 next_statistic = more && thread < 2 * N ? statistic(next) : 0.0f;
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
        cap_scores<Engine>(p, scores, d_scores);
        mask<Engine, true>(p, scores, block.position, step.tile * N);
#pragma unroll
        for (u32 i = 0; i < Engine::COLUMNS; ++i) {
#pragma unroll
            for (u32 r = 0; r < Engine::ROWS; ++r) {
                scores.at(r, i) = fast_exp2(fmaf(scores.at(r, i), factor, -lse[Engine::column(i)]));
                d_scores.at(r, i) *= scores.at(r, i);
            }
        }
        if (WITH_V) Engine::multiply(d_v, scores, tiles.streamed(stage, 1));
        if (WITH_K) Engine::multiply(d_k, d_scores, tiles.streamed(stage, 0));
        if (more && thread < 2 * N) statistics[(stage + 1) % 2][thread] = next_statistic;
        if (STAGES == 1 && more) {
            sync();  // nobody reads this tile any more
            load(next, 0);
        }
        step = next;
    }
    if constexpr (TEAMS > 1) add_teams<Engine>(team, d_k, d_v);
    const u32 k_column = p.heads * width + column, v_column = k_column + p.kv_heads * width;
    if (WITH_K && team == 0) {
        scale_sums<Engine>(d_k, p.scale);
        Engine::store(p, d_k, tiles.own(0), p.d_qkv, block.row, block.rows, k_column);
    }
    if (WITH_V && team == TEAMS - 1) Engine::store(p, d_v, tiles.own(1), p.d_qkv, block.row, block.rows, v_column);
}
