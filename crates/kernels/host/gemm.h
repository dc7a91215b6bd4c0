// A matrix product on the CPU, column-major: D = alpha op(A) op(B) + beta C.
#pragma once

#include <cstdint>

namespace ferrotune_host {

enum class Type : int { f32 = 0, bf16 = 14 }; // as cudaDataType

struct Matrix {
    const void* start;
    Type type;
    int64_t pitch;   // elements between columns
    bool transposed; // op

    float at(int64_t row, int64_t column) const;
};

struct Product {
    int64_t m, n, k;
    float alpha, beta;
    Matrix a, b, c; // c is not read if beta = 0
    void* d;
    Type d_type;
    int64_t d_pitch;
    int splits; // parts of k that are summed apart, then added in order
};

void multiply(const Product& product);

} // namespace ferrotune_host
