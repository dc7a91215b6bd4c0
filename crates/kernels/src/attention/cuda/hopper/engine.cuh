// Tiles and products of Hopper's tensor cores: whole tiles are read where they lie in shared memory, and a
// product runs on while its threads do something else.
#include "wgmma.cuh"

// TILE_ROWS rows of WIDTH elements, in blocks of 64 columns, as wgmma_operand has them.
template <u32 TILE_ROWS>
struct SwizzledTile {
    static constexpr u32 COLUMNS = 64;
    bf16* data;

    DEVICE bf16* chunk(u32 row, u32 index) const {
        return data + (index / 8 * TILE_ROWS + row) * COLUMNS + (index % 8 ^ row % 8) * CHUNK;
    }
    // Sixteen columns from 16 k on, over which is summed, of the rows from `row`, a multiple of 8.
    DEVICE u64 summed_columns(u32 row, u32 k) const {
        return wgmma_operand(data + (k / 4 * TILE_ROWS + row) * COLUMNS + k % 4 * 16, 16, 8 * 128);
    }
    // Sixteen rows from 16 k on, over which is summed, of all columns.
    DEVICE u64 summed_rows(u32 k) const { return wgmma_operand(data + k * 16 * COLUMNS, TILE_ROWS * 128, 8 * 128); }
};

// Where dynamic shared memory reaches a multiple of 1024 bytes. A launch asks for 1024 more than its tiles are.
DEVICE bf16* swizzled_shared() {
    u8* const start = dynamic_shared<u8>();
    return reinterpret_cast<bf16*>(start + (0u - shared_address(start)) % 1024u);
}

// GROUPS warpgroups, each with 64 of the rows of a tile, against tiles of N rows that all of them read. What
// a thread holds is as in Mma, but for which rows.
template <u32 GROUPS, u32 N>
struct Wgmma : Mma<1, N> {
    using Base = Mma<1, N>;
    using typename Base::Scores;
    using typename Base::Sums;
    using Own = SwizzledTile<64 * GROUPS>;
    using Streamed = SwizzledTile<N>;
    static constexpr u32 BLOCK_ROWS = 64 * GROUPS, ALL_THREADS = 128 * GROUPS;
    // Elements of a tile.
    static constexpr u32 OWN = BLOCK_ROWS * WIDTH, STREAMED = N * WIDTH;

    // Scores, rounded to bf16: the left operand of a product over the N rows of a tile.
    struct Weights {
        u32 k[N / 16][4];
    };

    static DEVICE u32 group() { return threadIdx.x / 128; }
    static DEVICE u32 warp_row() { return threadIdx.x / 32 * 16; }
    static DEVICE u32 row(u32 r) { return warp_row() + r * 8 + threadIdx.x % 32 / 4; }

    // Begins scores = a[this group's rows] b^T.
    static DEVICE void begin_transposed(Scores& scores, Own a, Streamed b) {
        wgmma_shared<true>(scores.c[0], a.summed_columns(group() * 64, 0), b.summed_columns(0, 0));
#pragma unroll
        for (u32 k = 1; k < WIDTH / 16; ++k) {
            wgmma_shared<false>(scores.c[0], a.summed_columns(group() * 64, k), b.summed_columns(0, k));
        }
        wgmma_commit();
    }

    // Begins sums += weights b.
    static DEVICE void begin(Sums& sums, const Weights& weights, Streamed b) {
#pragma unroll
        for (u32 k = 0; k < N / 16; ++k) wgmma_registers(sums.c[0], weights.k[k], b.summed_rows(k));
        wgmma_commit();
    }

    static DEVICE Weights rounded(const Scores& scores) {
        Weights weights;
#pragma unroll
        for (u32 k = 0; k < N / 16; ++k) {
#pragma unroll
            for (u32 part = 0; part < 4; ++part) {
                const f32* pair = &scores.c[0][2 * k + part / 2][part % 2 * 2];
                weights.k[k][part] = pack_bf16x2(pair[0], pair[1]);
            }
        }
        return weights;
    }

    // As store_rows, through this group's rows of a tile that no product under way reads.
    static DEVICE void store(const Attention& p, Sums& sums, Own tile, const Matrix& m, u32 row, u32 rows, u32 column) {
        team_barrier(group(), 128);  // the other warps have waited for their products too
        store_rows<Wgmma>(p, sums, warp_row(), tile, m, row, rows, column);
    }
};
