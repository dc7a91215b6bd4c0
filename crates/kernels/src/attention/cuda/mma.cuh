// Tiles of bf16 and their products on tensor cores. All matrices are bf16.

constexpr u32 CHUNK = 8;  // elements of 16 bytes, what ldmatrix and cp.async move
constexpr u32 CHUNKS = WIDTH / CHUNK;

// Rows of WIDTH elements in shared memory. Chunks change places within a row so that the same chunk
// of 8 consecutive rows lies in 8 different groups of banks.
struct Bf16Tile {
    bf16* data;

    DEVICE bf16* chunk(u32 row, u32 index) const {
        const u32 swizzle = WIDTH % 64 == 0 ? row % 8 : row / 2 % 4;
        return data + row * WIDTH + (index ^ swizzle) * CHUNK;
    }
};

// What a warp holds of M * 16 rows of N f32 values: the accumulators of mma.m16n8k16.
template <u32 M, u32 N>
struct MmaFragment {
    f32 c[M][N / 8][4];

    // Row r of this thread's 2 * M, column i of its N / 4.
    DEVICE f32& at(u32 r, u32 i) { return c[r / 2][i / 2][r % 2 * 2 + i % 2]; }
};

template <u32 M, u32 N>
DEVICE void clear(MmaFragment<M, N>& fragment) {
#pragma unroll
    for (u32 m = 0; m < M; ++m) {
#pragma unroll
        for (u32 n = 0; n < N / 8; ++n) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) fragment.c[m][n][i] = 0.0f;
        }
    }
}

// Writes the sums of a warp, whose rows start at `first` of the tile's, as rows of `m` from `row`, at most
// `rows`, at the columns from `column`. They go through these rows of `tile`, which nobody else may read.
template <typename Engine, typename Tile>
DEVICE void store_rows(const Attention& p, typename Engine::Sums& sums, u32 first, Tile tile, const Matrix& m, u32 row,
                       u32 rows, u32 column) {
    __syncwarp();
#pragma unroll
    for (u32 r = 0; r < Engine::ROWS; ++r) {
#pragma unroll
        for (u32 n = 0; n < CHUNKS; ++n) {
            u32* pairs = reinterpret_cast<u32*>(tile.chunk(Engine::row(r), n));
            pairs[threadIdx.x % 4] = pack_bf16x2(sums.at(r, 2 * n), sums.at(r, 2 * n + 1));
        }
    }
    __syncwarp();
    bf16* to = row_of<bf16>(m, row) + column;
    const u32 width = p.head_dim;
    for (u32 at = threadIdx.x % 32; at < 8 * Engine::ROWS * CHUNKS; at += 32) {
        const u32 r = first + at / CHUNKS, c = at % CHUNKS;
        if (r >= rows || c * CHUNK >= width) continue;
        const bf16* chunk = tile.chunk(r, c);
        bf16* target = to + r * m.pitch + c * CHUNK;
        if (p.packed) {
            move_16(target, chunk);
        } else {
            const u32 count = minimum(CHUNK, width - c * CHUNK);
            for (u32 i = 0; i < count; ++i) target[i] = chunk[i];
        }
    }
}

// A team of four warps, each with M * 16 of the rows of a tile, against tiles of N rows.
template <u32 M, u32 N>
struct Mma {
    using Element = bf16;
    using Tile = Bf16Tile;
    using Scores = MmaFragment<M, N>;
    using Sums = MmaFragment<M, WIDTH>;
    static constexpr u32 BLOCK_ROWS = THREADS / 32 * 16 * M;
    static constexpr u32 BLOCK_COLUMNS = N;
    static constexpr u32 ROWS = 2 * M, COLUMNS = N / 4, WIDE = WIDTH / 4;
    static constexpr u32 PITCH = WIDTH;

    // The left operand of products with many tiles: in registers where there are enough.
    struct Fragments {
        u32 k[CHUNKS / 2][M][4];
    };
    static constexpr bool IN_REGISTERS = WIDTH <= 64;

    // First row of this warp.
    static DEVICE u32 warp_row() { return team_thread() / 32 * 16 * M; }
    static DEVICE u32 row(u32 r) { return warp_row() + r / 2 * 16 + r % 2 * 8 + threadIdx.x % 32 / 4; }
    static DEVICE u32 column(u32 i) { return i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2; }
    // One thread of those that share a row.
    static DEVICE bool is_leader() { return threadIdx.x % 4 == 0; }
    static DEVICE f32 row_max(f32 value) {
        value = fmaxf(value, shuffle_xor(value, 1));
        return fmaxf(value, shuffle_xor(value, 2));
    }
    static DEVICE f32 row_sum(f32 value) {
        value += shuffle_xor(value, 1);
        return value + shuffle_xor(value, 2);
    }
    // Exact to some 1e-7 of one: softcap multiplies the error, and tanh.approx has 5e-4.
    static DEVICE f32 tanh(f32 x) { return 1.0f - 2.0f * fast_rcp(1.0f + fast_exp2(2.0f * LOG2E * x)); }

    // Fills TILE_ROWS rows of a tile with the rows of `m` from `row`, at most `rows`, and its columns
    // from `column`; zeros elsewhere. Ends with the next cp_async_wait.
    template <u32 TILE_ROWS>
    static DEVICE void load(const Attention& p, Tile tile, const Matrix& m, u32 row, u32 rows, u32 column) {
        const bf16* from = row_of<const bf16>(m, row) + column;
        const u32 width = p.head_dim;
        if (p.packed) {
#pragma unroll 2
            for (u32 start = 0; start < TILE_ROWS * CHUNKS; start += THREADS) {
                const u32 r = (start + team_thread()) / CHUNKS, c = (start + team_thread()) % CHUNKS;
                const bool inside = r < rows && c * CHUNK < width;
                cp_async_16(tile.chunk(r, c), inside ? from + r * m.pitch + c * CHUNK : from, inside ? 16 : 0);
            }
        } else {
#pragma unroll 1
            for (u32 at = team_thread(); at < TILE_ROWS * WIDTH; at += THREADS) {
                const u32 r = at / WIDTH, c = at % WIDTH;
                const bool inside = r < rows && c < width;
                tile.chunk(r, c / CHUNK)[c % CHUNK] = inside ? from[r * m.pitch + c] : from_f32<bf16>(0.0f);
            }
        }
    }

    // This warp's rows of columns 8 k to 8 k + 15 of the left operand.
    static DEVICE void left_of(u32 (&left)[M][4], Tile a, u32 k) {
        const u32 lane = threadIdx.x % 32;
#pragma unroll
        for (u32 m = 0; m < M; ++m) ldmatrix_x4(left[m], a.chunk(warp_row() + m * 16 + lane % 16, k + lane / 16));
    }
    static DEVICE void left_of(u32 (&left)[M][4], const Fragments& a, u32 k) {
#pragma unroll
        for (u32 m = 0; m < M; ++m) {
#pragma unroll
            for (u32 part = 0; part < 4; ++part) left[m][part] = a.k[k / 2][m][part];
        }
    }
    static DEVICE Fragments fragments(Tile a) {
        Fragments all;
#pragma unroll
        for (u32 k = 0; k < CHUNKS; k += 2) left_of(all.k[k / 2], a, k);
        return all;
    }

    // scores += a[this warp's rows] b^T.
    template <typename Left>
    static DEVICE void multiply_transposed(Scores& scores, const Left& a, Tile b) {
        const u32 lane = threadIdx.x % 32;
        const u32 b_row = lane / 16 * 8 + lane % 8, b_chunk = lane / 8 % 2;
#pragma unroll
        for (u32 k = 0; k < CHUNKS; k += 2) {
            u32 left[M][4];
            left_of(left, a, k);
#pragma unroll
            for (u32 n = 0; n < N / 8; n += 2) {
                u32 right[4];
                ldmatrix_x4(right, b.chunk(b_row + n * 8, k + b_chunk));
                const u32 low[2] = {right[0], right[1]}, high[2] = {right[2], right[3]};
#pragma unroll
                for (u32 m = 0; m < M; ++m) {
                    mma_m16n8k16_bf16(scores.c[m][n], left[m], low, scores.c[m][n]);
                    mma_m16n8k16_bf16(scores.c[m][n + 1], left[m], high, scores.c[m][n + 1]);
                }
            }
        }
    }

    // sums += weights b, the weights rounded to bf16.
    static DEVICE void multiply(Sums& sums, const Scores& weights, Tile b) {
        const u32 lane = threadIdx.x % 32;
#pragma unroll
        for (u32 k = 0; k < N / 8; k += 2) {
            u32 left[M][4];
#pragma unroll
            for (u32 m = 0; m < M; ++m) {
#pragma unroll
                for (u32 part = 0; part < 4; ++part) {
                    const f32* pair = &weights.c[m][k + part / 2][part % 2 * 2];
                    left[m][part] = pack_bf16x2(pair[0], pair[1]);
                }
            }
#pragma unroll
            for (u32 n = 0; n < CHUNKS; n += 2) {
                u32 right[4];
                ldmatrix_x4_trans(right, b.chunk(k * 8 + lane % 16, n + lane / 16));
                const u32 low[2] = {right[0], right[1]}, high[2] = {right[2], right[3]};
#pragma unroll
                for (u32 m = 0; m < M; ++m) {
                    mma_m16n8k16_bf16(sums.c[m][n], left[m], low, sums.c[m][n]);
                    mma_m16n8k16_bf16(sums.c[m][n + 1], left[m], high, sums.c[m][n + 1]);
                }
            }
        }
    }

    static DEVICE void store(const Attention& p, Sums& sums, Tile tile, const Matrix& m, u32 row, u32 rows, u32 column) {
        store_rows<Mma>(p, sums, warp_row(), tile, m, row, rows, column);
    }
};
