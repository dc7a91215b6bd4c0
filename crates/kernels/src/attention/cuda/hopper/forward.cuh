// The forward pass on Hopper: while the exponentials of one tile are computed, the product of the tile
// before it with its values is under way.

// One tile of keys and one of values, of two each.
template <typename Engine>
struct KeysAndValues {
    bf16* shared;

    DEVICE typename Engine::Streamed keys(u32 step) const { return {shared + step % 2 * Engine::STREAMED}; }
    DEVICE typename Engine::Streamed values(u32 step) const { return {shared + (2 + step % 2) * Engine::STREAMED}; }
};

template <typename Loads>
DEVICE void forward_async(const typename Loads::Params& params) {
    using Engine = typename Loads::Engine;
    constexpr u32 M = Engine::BLOCK_ROWS, N = Engine::BLOCK_COLUMNS;
    SHARED Block block;
    const Loads loads(params);
    const Attention& p = loads.p;
    // Later queries see more keys: their blocks start first.
    if (!find_queries(p, p.sequences + 1, M, N, gridDim.y - 1 - blockIdx.y, block)) return;
    const u32 head = blockIdx.x, kv_head = head / (p.heads / p.kv_heads);
    if (block.end == 0) {
        clear_outputs<Engine::ALL_THREADS>(p, block.row, minimum(block.rows, M), head);
        return;
    }
    bf16* const shared = swizzled_shared();
    const typename Engine::Own q{shared};
    const KeysAndValues<Engine> tiles{shared + Engine::OWN};
    const u32 steps = block.end - block.begin;
    // From the last tile to the first.
    const auto first_key = [&](u32 step) { return (block.end - 1 - step) * N; };
    const auto load = [&](typename Engine::Streamed tile, const typename Loads::Source& matrix, u32 step) {
        const u32 first = first_key(step);
        loads.begin(tile, matrix, block.other_row + first, block.other_rows - first, kv_head);
    };
    // Waits for the keys of `step` and the values of the one before it, when nobody reads older ones. Those of
    // other keys than the sequence's have the weight 0, but 0 times NaN is NaN.
    const auto wait = [&](u32 step) {
        loads.wait(step);
        if (step > 0) loads.clear_rest(tiles.values(step - 1), block.other_rows - first_key(step - 1));
        __syncthreads();
    };

    loads.begin(q, loads.from.q, block.row, block.rows, head);
    load(tiles.keys(0), loads.from.k, 0);
    loads.commit();
    const f32 factor = score_factor(p);
    typename Engine::Sums sums;
    clear(sums);
    Softmax<Engine> softmax;
    typename Engine::Weights weights;
    for (u32 step = 0; step < steps; ++step) {
        wait(step);
        typename Engine::Scores scores;
        wgmma_fence();
        Engine::begin_transposed(scores, q, tiles.keys(step));
        // Behind the first product, so that it is under way meanwhile.
        load(tiles.values(step), loads.from.v, step);
        if (step + 1 < steps) load(tiles.keys(step + 1), loads.from.k, step + 1);
        loads.commit();
        if (step > 0) {
            Engine::begin(sums, weights, tiles.values(step - 1));
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        wgmma_settle(scores.c[0]);
        cap_scores<Engine>(p, scores);
        mask<Engine, false>(p, scores, block.position, first_key(step));
        const auto shrink = softmax.add(scores, factor);
        wgmma_hold(p.never);
        wgmma_wait<0>();
        wgmma_settle(sums.c[0]);
        softmax.scale(sums, shrink);
        weights = Engine::rounded(scores);
    }
    wait(steps);
    wgmma_fence();
    Engine::begin(sums, weights, tiles.values(steps - 1));
    wgmma_wait<0>();
    wgmma_settle(sums.c[0]);
    softmax.finish(p, sums, block, head);
    Engine::store(p, sums, q, p.out, block.row, block.rows, head * p.head_dim);
}
