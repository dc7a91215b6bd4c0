// Tiles of f32 and their products without tensor cores, exact to f32. Each matrix is bf16 or f32.

constexpr u32 ROW_THREADS = 8;

struct F32Tile {
    f32* data;

    // The odd pitch puts one column of consecutive rows into different banks.
    DEVICE f32& at(u32 row, u32 column) const { return data[row * (WIDTH + 1) + column]; }
};

template <u32 N>
struct FmaFragment {
    f32 c[N / ROW_THREADS];

    DEVICE f32& at(u32, u32 i) { return c[i]; }
};

template <u32 N>
DEVICE void clear(FmaFragment<N>& fragment) {
#pragma unroll
    for (u32 i = 0; i < N / ROW_THREADS; ++i) fragment.c[i] = 0.0f;
}

// Threads with one row each of 16, shared by 8 threads, against tiles of 16 rows.
struct Fma {
    using Element = f32;
    using Tile = F32Tile;
    static constexpr u32 BLOCK_ROWS = THREADS / ROW_THREADS;
    static constexpr u32 BLOCK_COLUMNS = 16;
    static constexpr u32 ROWS = 1, COLUMNS = BLOCK_COLUMNS / ROW_THREADS, WIDE = WIDTH / ROW_THREADS;
    static constexpr u32 PITCH = WIDTH + 1;
    static constexpr bool IN_REGISTERS = false;
    using Scores = FmaFragment<BLOCK_COLUMNS>;
    using Sums = FmaFragment<WIDTH>;

    static DEVICE u32 row(u32) { return threadIdx.x / ROW_THREADS; }
    static DEVICE u32 column(u32 i) { return i * ROW_THREADS + threadIdx.x % ROW_THREADS; }
    static DEVICE bool is_leader() { return threadIdx.x % ROW_THREADS == 0; }
    static DEVICE f32 row_max(f32 value) {
        for (u32 lanes = 1; lanes < ROW_THREADS; lanes *= 2) value = fmaxf(value, shuffle_xor(value, lanes));
        return value;
    }
    static DEVICE f32 row_sum(f32 value) {
        for (u32 lanes = 1; lanes < ROW_THREADS; lanes *= 2) value += shuffle_xor(value, lanes);
        return value;
    }
    static DEVICE f32 tanh(f32 x) { return tanhf(x); }

    template <u32 TILE_ROWS>
    static DEVICE void load(const Attention& p, Tile tile, const Matrix& m, u32 row, u32 rows, u32 column) {
        for (u32 at = threadIdx.x; at < TILE_ROWS * WIDTH; at += THREADS) {
            const u32 r = at / WIDTH, c = at % WIDTH;
            const bool inside = r < rows && c < p.head_dim;
            tile.at(r, c) = inside ? Any::load(m, row + r, column + c).value : 0.0f;
        }
    }

    static DEVICE void multiply_transposed(Scores& scores, Tile a, Tile b) {
#pragma unroll 4
        for (u32 k = 0; k < WIDTH; ++k) {
            const f32 left = a.at(row(0), k);
#pragma unroll
            for (u32 i = 0; i < COLUMNS; ++i) scores.c[i] = fmaf(left, b.at(column(i), k), scores.c[i]);
        }
    }

    static DEVICE void multiply(Sums& sums, const Scores& weights, Tile b) {
#pragma unroll
        for (u32 start = 0; start < COLUMNS; ++start) {
#pragma unroll 2
            for (u32 k = 0; k < ROW_THREADS; ++k) {
                const u32 owner = threadIdx.x % WARP / ROW_THREADS * ROW_THREADS + k;
                const f32 weight = shuffle_idx(weights.c[start], owner);
#pragma unroll
                for (u32 i = 0; i < WIDE; ++i) {
                    sums.c[i] = fmaf(weight, b.at(start * ROW_THREADS + k, column(i)), sums.c[i]);
                }
            }
        }
    }

    static DEVICE void store(const Attention& p, Sums& sums, Tile, const Matrix& m, u32 row, u32 rows, u32 column) {
        if (Fma::row(0) >= rows) return;
#pragma unroll
        for (u32 i = 0; i < WIDE; ++i) {
            const u32 c = Fma::column(i);
            if (c < p.head_dim) Any::store(m, row + Fma::row(0), column + c, {sums.c[i]});
        }
    }
};
