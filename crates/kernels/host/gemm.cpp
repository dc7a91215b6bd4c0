#include "gemm.h"

#include <algorithm>
#include <cstring>
#include <vector>

// The build may run on another CPU than the tests: the wide version is chosen when it is called.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("arch=haswell", "default")))
#else
#define WIDE
#endif

namespace ferrotune_host {
namespace {

constexpr int64_t ROWS = 32, COLUMNS = 4; // of D at once, in registers
constexpr int64_t DEPTH = 256;            // of k at once: the panel of A stays in cache, and sums stay exact

float widen(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

uint16_t round(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return static_cast<uint16_t>((bits >> 16) | 0x40);
    }
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// sums[j][i] += sum over k of a[k][i] * b[k][j], which is made by itself: a sum over a long k is one of short sums.
WIDE void tile(float* __restrict sums, const float* __restrict a, const float* __restrict b,
               int64_t depth) {
    float acc[COLUMNS][ROWS] = {};
    for (int64_t k = 0; k < depth; k++) {
        for (int64_t j = 0; j < COLUMNS; j++) {
            const float factor = b[k * COLUMNS + j];
            for (int64_t i = 0; i < ROWS; i++) {
                acc[j][i] += a[k * ROWS + i] * factor;
            }
        }
    }
    for (int64_t j = 0; j < COLUMNS; j++) {
        for (int64_t i = 0; i < ROWS; i++) {
            sums[j * ROWS + i] += acc[j][i];
        }
    }
}

// Panels of `width` rows (of A) or columns (of B), k by k, filled up with zeros.
std::vector<float> pack(const Matrix& matrix, bool rows, int64_t size, int64_t width, int64_t k_start,
                        int64_t k_end) {
    const int64_t panels = (size + width - 1) / width, depth = k_end - k_start;
    std::vector<float> packed(static_cast<size_t>(panels * width * depth));
    // Inner loop along what is adjacent in memory.
    const bool k_adjacent = rows == matrix.transposed;
    const auto put = [&](int64_t i, int64_t k) {
        packed[static_cast<size_t>((i / width * depth + k) * width + i % width)] =
            rows ? matrix.at(i, k_start + k) : matrix.at(k_start + k, i);
    };
    if (k_adjacent) {
        for (int64_t i = 0; i < size; i++) {
            for (int64_t k = 0; k < depth; k++) {
                put(i, k);
            }
        }
    } else {
        for (int64_t k = 0; k < depth; k++) {
            for (int64_t i = 0; i < size; i++) {
                put(i, k);
            }
        }
    }
    return packed;
}

// Adds the products over one part of k to `sums`, tile by tile.
void accumulate(const Product& p, int64_t k_start, int64_t k_end, std::vector<float>& sums) {
    const int64_t row_tiles = (p.m + ROWS - 1) / ROWS, column_tiles = (p.n + COLUMNS - 1) / COLUMNS;
    for (int64_t start = k_start; start < k_end; start += DEPTH) {
        const int64_t end = std::min(start + DEPTH, k_end), depth = end - start;
        const auto a = pack(p.a, true, p.m, ROWS, start, end);
        const auto b = pack(p.b, false, p.n, COLUMNS, start, end);
        for (int64_t j = 0; j < column_tiles; j++) {
            for (int64_t i = 0; i < row_tiles; i++) {
                tile(&sums[static_cast<size_t>((j * row_tiles + i) * ROWS * COLUMNS)],
                     &a[static_cast<size_t>(i * ROWS * depth)],
                     &b[static_cast<size_t>(j * COLUMNS * depth)], depth);
            }
        }
    }
}

} // namespace

float Matrix::at(int64_t row, int64_t column) const {
    const int64_t index = transposed ? row * pitch + column : column * pitch + row;
    return type == Type::f32 ? static_cast<const float*>(start)[index]
                             : widen(static_cast<const uint16_t*>(start)[index]);
}

void multiply(const Product& p) {
    const int64_t row_tiles = (p.m + ROWS - 1) / ROWS, column_tiles = (p.n + COLUMNS - 1) / COLUMNS;
    const auto size = static_cast<size_t>(row_tiles * column_tiles * ROWS * COLUMNS);
    std::vector<float> sums(size);
    for (int part = 0; part < p.splits; part++) {
        std::vector<float> partial(size);
        accumulate(p, p.k * part / p.splits, p.k * (part + 1) / p.splits, partial);
        for (size_t i = 0; i < size; i++) {
            sums[i] = part == 0 ? partial[i] : sums[i] + partial[i];
        }
    }
    for (int64_t column = 0; column < p.n; column++) {
        for (int64_t row = 0; row < p.m; row++) {
            const int64_t in_tile = column % COLUMNS * ROWS + row % ROWS;
            const int64_t which = column / COLUMNS * row_tiles + row / ROWS;
            float value = p.alpha * sums[static_cast<size_t>(which * ROWS * COLUMNS + in_tile)];
            if (p.beta != 0.0f) {
                value += p.beta * p.c.at(row, column);
            }
            const int64_t index = column * p.d_pitch + row;
            if (p.d_type == Type::f32) {
                static_cast<float*>(p.d)[index] = value;
            } else {
                static_cast<uint16_t*>(p.d)[index] = round(value);
            }
        }
    }
}

} // namespace ferrotune_host
