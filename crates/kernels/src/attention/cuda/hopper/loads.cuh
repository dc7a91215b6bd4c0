// How tiles come to shared memory. Both ways have loads that are numbered from 0 as a block commits them, each of
// all tiles begun since the one before it. A load is waited for before the next one is begun. Tiles are zero
// in the columns beyond the head; where the sequence ends within a tile, clear_rest makes its other rows zero.
#include "tma.cuh"

// Threads copy 16 bytes at a time, or elements where rows are not aligned.
template <typename ENGINE>
struct Copies {
    using Engine = ENGINE;
    using Params = Attention;
    using Source = Matrix;
    const Attention& p;
    const Attention& from;  // what has the matrices

    DEVICE explicit Copies(const Attention& params) : p(params), from(params) {}

    // As Mma::load, of a head, by all groups. They go down by a multiple of 8 rows, so a thread keeps its columns
    // and its place in the swizzle, and addresses are sums of constants.
    template <u32 TILE_ROWS>
    DEVICE void begin(SwizzledTile<TILE_ROWS> tile, const Matrix& m, u32 row, u32 rows, u32 head) const {
        constexpr u32 STEP = Engine::ALL_THREADS / CHUNKS;
        static_assert(STEP % 8 == 0, "the swizzle repeats");
        const bf16* const start = row_of<const bf16>(m, row) + head * p.head_dim;
        if (!p.packed) {
#pragma unroll 1
            for (u32 at = threadIdx.x; at < TILE_ROWS * WIDTH; at += Engine::ALL_THREADS) {
                const u32 r = at / WIDTH, c = at % WIDTH;
                const bool inside = r < rows && c < p.head_dim;
                tile.chunk(r, c / CHUNK)[c % CHUNK] = inside ? start[r * m.pitch + c] : from_f32<bf16>(0.0f);
            }
            return;
        }
        const u32 first = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS;
        const u32 valid = c * CHUNK < p.head_dim ? rows : 0;
        const bf16* from = start + first * m.pitch + c * CHUNK;
        bf16* const to = tile.chunk(first, c);
#pragma unroll
        for (u32 r = 0; r < TILE_ROWS; r += STEP, from += STEP * m.pitch) {
            if (TILE_ROWS % STEP != 0 && r + first >= TILE_ROWS) break;
            const bool inside = r + first < valid;
            cp_async_16(to + r * SwizzledTile<TILE_ROWS>::COLUMNS, inside ? from : start, inside ? 16 : 0);
        }
    }
    DEVICE void commit() const { cp_async_commit(); }
    // What this thread has loaded is there for products behind a barrier of the block.
    DEVICE void wait(u32) const {
        cp_async_wait<0>();
        fence_async_shared();
    }
    template <u32 TILE_ROWS>
    DEVICE void clear_rest(SwizzledTile<TILE_ROWS>, u32) const {}
};

// Arguments and the matrices that are read, each as a tensor [row, head, column], with a box of 64 columns of a
// head and as many rows as its tiles have.
struct MappedAttention {
    Attention p;
    struct {
        TensorMap q, k, v, d_out;
    } from;
};

// One thread has the copy engine bring boxes.
template <typename ENGINE>
struct Boxes {
    using Engine = ENGINE;
    using Params = MappedAttention;
    using Source = TensorMap;
    const Attention& p;
    const decltype(Params::from)& from;
    u64* barrier;  // a phase for each load

    // The block has a barrier before anybody waits.
    DEVICE explicit Boxes(const Params& params) : p(params.p), from(params.from) {
        SHARED u64 shared;
        barrier = &shared;
        if (threadIdx.x == 0) {
            mbarrier_init(barrier, 1);
            fence_async_shared();
        }
    }

    template <u32 TILE_ROWS>
    DEVICE void begin(SwizzledTile<TILE_ROWS> tile, const TensorMap& map, u32 row, u32, u32 head) const {
        constexpr u32 COLUMNS = SwizzledTile<TILE_ROWS>::COLUMNS;
        if (threadIdx.x != 0) return;
        mbarrier_expect(barrier, TILE_ROWS * WIDTH * sizeof(bf16));
#pragma unroll
        for (u32 c = 0; c < WIDTH; c += COLUMNS) load_box(tile.data + TILE_ROWS * c, map, c, head, row, barrier);
    }
    DEVICE void commit() const {
        if (threadIdx.x == 0) mbarrier_arrive(barrier);
    }
    DEVICE void wait(u32 load) const { mbarrier_wait(barrier, load % 2); }
    // A box goes on with the next sequence. Behind the wait for it and before a barrier of the block.
    template <u32 TILE_ROWS>
    DEVICE void clear_rest(SwizzledTile<TILE_ROWS> tile, u32 rows) const {
        if (rows >= TILE_ROWS) return;
#pragma unroll 1
        for (u32 at = rows * CHUNKS + threadIdx.x; at < TILE_ROWS * CHUNKS; at += Engine::ALL_THREADS) {
            clear_shared_16(tile.chunk(at / CHUNKS, at % CHUNKS));
        }
        fence_async_shared();
    }
};
