// libcublasLt.so.13: matrix products of f32 and bf16, column-major, summed in f32.
//
// It offers three algorithms that differ in the order of summation, so that choosing, recording and
// replaying one shows in the bits.
#include "driver.h"
#include "gemm.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

#define API extern "C" __attribute__((visibility("default")))

namespace {

using ferrotune_host::Matrix;
using ferrotune_host::Product;
using ferrotune_host::Type;

enum Code : int {
    SUCCESS = 0,
    INVALID_VALUE = 7,
    EXECUTION_FAILED = 13,
    NOT_SUPPORTED = 15,
};

constexpr int COMPUTE_32F = 68;
constexpr int ALGORITHMS = 3;
constexpr uint64_t MAGIC = 0x74736f6865727266;

struct Handle {};
struct Operation {
    bool transposed[2] = {false, false}; // A, B
};
struct Layout {
    Type type;
    uint64_t rows, columns;
    int64_t pitch;
};
struct Preference {
    uint64_t workspace = 0;
    uint32_t alignment[4] = {256, 256, 256, 256}; // of A, B, C, D
};
// cublasLtMatmulAlgo_t
struct Algorithm {
    uint64_t magic, splits, alignment[2], unused[4];
};
// cublasLtMatmulHeuristicResult_t
struct Result {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Algorithm) == 64 && offsetof(Result, state) == 72 && sizeof(Result) == 96,
              "the layout of the public header");

size_t bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }

bool legal(const Layout& layout) {
    return (layout.type == Type::f32 || layout.type == Type::bf16) && layout.rows > 0 &&
           layout.columns > 0 && layout.pitch >= static_cast<int64_t>(layout.rows);
}

int check(const Operation& op, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    const uint64_t m = op.transposed[0] ? a.columns : a.rows;
    const uint64_t k = op.transposed[0] ? a.rows : a.columns;
    const uint64_t k_of_b = op.transposed[1] ? b.columns : b.rows;
    const uint64_t n = op.transposed[1] ? b.rows : b.columns;
    if (!legal(a) || !legal(b) || !legal(c) || !legal(d) || k != k_of_b || d.rows != m ||
        d.columns != n || c.rows != m || c.columns != n) {
        return INVALID_VALUE;
    }
    const bool types = a.type == b.type && c.type == d.type &&
                       (d.type == Type::f32 || a.type == Type::bf16);
    return types ? SUCCESS : NOT_SUPPORTED;
}

Result offer(uint64_t splits, const uint32_t (&alignment)[4]) {
    Result result = {};
    result.algorithm.magic = MAGIC;
    result.algorithm.splits = splits;
    memcpy(result.algorithm.alignment, alignment, sizeof(alignment));
    result.waves = 1.0f;
    return result;
}

// Whether a matrix lies in one allocation of the device.
bool holds(void* stream, const void* start, const Layout& layout) {
    const size_t elements = static_cast<size_t>(layout.pitch) * (layout.columns - 1) + layout.rows;
    return ferrotune_host::holds(stream, start, elements * bytes_of(layout.type));
}

bool aligned(const Algorithm& algorithm, const void* const (&matrices)[4]) {
    uint32_t alignment[4];
    memcpy(alignment, algorithm.alignment, sizeof(alignment));
    for (int i = 0; i < 4; i++) {
        if (reinterpret_cast<uintptr_t>(matrices[i]) % alignment[i] != 0) {
            return false;
        }
    }
    return true;
}

// A driver code in the words of this library.
int translate(int driver_code) {
    return driver_code == 0 ? SUCCESS : EXECUTION_FAILED;
}

template <typename T>
int create(T** made, T value) {
    *made = new T(value);
    return SUCCESS;
}

template <typename T>
int destroy(T* made) {
    delete made;
    return SUCCESS;
}

} // namespace

API int cublasLtCreate(Handle** handle) { return create(handle, Handle{}); }
API int cublasLtDestroy(Handle* handle) { return destroy(handle); }
API size_t cublasLtGetVersion() { return FERROTUNE_HOST_VERSION; }

API const char* cublasLtGetStatusString(int code) {
    switch (code) {
    case SUCCESS:
        return "CUBLAS_STATUS_SUCCESS";
    case INVALID_VALUE:
        return "CUBLAS_STATUS_INVALID_VALUE";
    case EXECUTION_FAILED:
        return "CUBLAS_STATUS_EXECUTION_FAILED";
    case NOT_SUPPORTED:
        return "CUBLAS_STATUS_NOT_SUPPORTED";
    default:
        return "CUBLAS_STATUS unknown";
    }
}

API int cublasLtMatmulDescCreate(Operation** op, int compute, int scale_type) {
    if (compute != COMPUTE_32F || scale_type != static_cast<int>(Type::f32)) {
        return NOT_SUPPORTED;
    }
    return create(op, Operation{});
}
API int cublasLtMatmulDescDestroy(Operation* op) { return destroy(op); }

API int cublasLtMatmulDescSetAttribute(Operation* op, int attribute, const void* value, size_t bytes) {
    int32_t transposed;
    if (bytes != sizeof(transposed) || (attribute != 3 && attribute != 4)) {
        return INVALID_VALUE;
    }
    memcpy(&transposed, value, bytes);
    if (transposed != 0 && transposed != 1) {
        return INVALID_VALUE;
    }
    op->transposed[attribute - 3] = transposed == 1;
    return SUCCESS;
}

API int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns,
                                   int64_t pitch) {
    return create(layout, Layout{static_cast<Type>(type), rows, columns, pitch});
}
API int cublasLtMatrixLayoutDestroy(Layout* layout) { return destroy(layout); }

API int cublasLtMatmulPreferenceCreate(Preference** preference) {
    return create(preference, Preference{});
}
API int cublasLtMatmulPreferenceDestroy(Preference* preference) { return destroy(preference); }

// Attributes: 1 workspace bytes, 3 mask of reduction schemes, 5 to 8 alignments of A, B, C, D.
API int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value,
                                             size_t bytes) {
    if (attribute == 1 && bytes == sizeof(preference->workspace)) {
        memcpy(&preference->workspace, value, bytes);
        return SUCCESS;
    }
    if (attribute == 3 && bytes == sizeof(uint32_t)) {
        return SUCCESS; // every sum here is f32 in a fixed order
    }
    if (attribute >= 5 && attribute <= 8 && bytes == sizeof(uint32_t)) {
        memcpy(&preference->alignment[attribute - 5], value, bytes);
        return SUCCESS;
    }
    return INVALID_VALUE;
}

API int cublasLtMatmulAlgoGetHeuristic(Handle*, Operation* op, Layout* a, Layout* b, Layout* c,
                                       Layout* d, Preference* preference, int requested,
                                       Result* results, int* returned) {
    *returned = 0;
    if (const int code = check(*op, *a, *b, *c, *d)) {
        return code;
    }
    while (*returned < requested && *returned < ALGORITHMS) {
        results[*returned] = offer(static_cast<uint64_t>(*returned) + 1, preference->alignment);
        (*returned)++;
    }
    return SUCCESS;
}

API int cublasLtMatmulAlgoCheck(Handle*, Operation* op, Layout* a, Layout* b, Layout* c, Layout* d,
                                const Algorithm* algorithm, Result* result) {
    if (const int code = check(*op, *a, *b, *c, *d)) {
        return code;
    }
    if (algorithm->magic != MAGIC || algorithm->splits < 1 || algorithm->splits > ALGORITHMS) {
        return NOT_SUPPORTED;
    }
    *result = {};
    result->algorithm = *algorithm;
    return SUCCESS;
}

API int cublasLtMatmul(Handle* handle, Operation* op, const float* alpha, const void* a,
                       Layout* a_layout, const void* b, Layout* b_layout, const float* beta,
                       const void* c, Layout* c_layout, void* d, Layout* d_layout,
                       const Algorithm* algorithm, void*, size_t, void* stream) {
    Result result;
    if (const int code = cublasLtMatmulAlgoCheck(handle, op, a_layout, b_layout, c_layout, d_layout,
                                                 algorithm, &result)) {
        return code;
    }
    if (!aligned(*algorithm, {a, b, c, d})) {
        return NOT_SUPPORTED;
    }
    if (!holds(stream, a, *a_layout) || !holds(stream, b, *b_layout) ||
        !holds(stream, c, *c_layout) || !holds(stream, d, *d_layout)) {
        return EXECUTION_FAILED;
    }
    Product product;
    product.m = static_cast<int64_t>(d_layout->rows);
    product.n = static_cast<int64_t>(d_layout->columns);
    product.k = static_cast<int64_t>(op->transposed[0] ? a_layout->rows : a_layout->columns);
    product.alpha = *alpha;
    product.beta = *beta;
    product.a = Matrix{a, a_layout->type, a_layout->pitch, op->transposed[0]};
    product.b = Matrix{b, b_layout->type, b_layout->pitch, op->transposed[1]};
    product.c = Matrix{c, c_layout->type, c_layout->pitch, false};
    product.d = d;
    product.d_type = d_layout->type;
    product.d_pitch = d_layout->pitch;
    product.splits = static_cast<int>(algorithm->splits);
    return translate(ferrotune_host::issue(stream, "gemm", [product] {
        multiply(product);
        return 0;
    }));
}
