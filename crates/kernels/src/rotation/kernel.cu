// Rotations made of skew-symmetric matrices: a block of threads has one, between barriers in memory of its own.
#include "reduce.cuh"

constexpr u32 MOST_TERMS = 32;

struct Rotation {
    const f32* parameters;
    // [blocks * n, n]: the rotations, or their gradient.
    f32* rotations;
    f32* d_parameters;
    // Four matrices for each block, and two rows.
    f64* scratch;
    u32 n, each;
    u32 square;  // whether parameters are whole matrices
    u32 terms;   // of a series; 0: Cayley
    f64 factors[MOST_TERMS];
};

// Parameter of the element above the diagonal.
DEVICE u32 place(u32 n, u32 i, u32 j) { return i * n - i * (i + 1) / 2 + j - i - 1; }

struct Own {
    const Rotation& p;
    u32 n, elements;
    const f32* parameters;
    f32* rotation;
    f64* scratch;

    DEVICE explicit Own(const Rotation& p)
        : p(p),
          n(p.n),
          elements(p.n * p.n),
          parameters(p.parameters + static_cast<u64>(blockIdx.x) * p.each),
          rotation(p.rotations + static_cast<u64>(blockIdx.x) * elements),
          scratch(p.scratch + static_cast<u64>(blockIdx.x) * (4 * elements + 2 * p.n)) {}

    DEVICE f64* matrix(u32 number) const { return scratch + number * elements; }

    DEVICE f64 skew(u32 i, u32 j) const {
        if (p.square) {
            return 0.5 * static_cast<f64>(parameters[i * n + j] - parameters[j * n + i]);
        }
        if (i == j) return 0.0;
        return i < j ? static_cast<f64>(parameters[place(n, i, j)]) : -static_cast<f64>(parameters[place(n, j, i)]);
    }
};

template <typename Body>
DEVICE void each_element(const Own& own, const Body& body) {
    for (u32 at = threadIdx.x; at < own.elements; at += blockDim.x) body(at, at / own.n, at % own.n);
    __syncthreads();
}

// sum over k of a(i, k) b(k, j)
template <typename A, typename B>
DEVICE f64 dot(u32 n, const A& a, const B& b) {
    f64 sum = 0.0;
    for (u32 k = 0; k < n; ++k) sum += a(k) * b(k);
    return sum;
}

// The first matrix becomes (I + S)^-1, by Gauss and Jordan: pivots are at least 1.
DEVICE void invert(const Own& own) {
    const u32 n = own.n;
    f64* const m = own.matrix(0);
    f64* const row = own.matrix(4);
    f64* const column = row + n;
    each_element(own, [&](u32 at, u32 i, u32 j) { m[at] = own.skew(i, j) + (i == j ? 1.0 : 0.0); });
    for (u32 c = 0; c < n; ++c) {
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
            column[i] = m[i * n + c];
            row[i] = (i == c ? 1.0 : m[c * n + i]) / m[c * n + c];
        }
        __syncthreads();
        each_element(own, [&](u32 at, u32 i, u32 j) {
            m[at] = i == c ? row[j] : (j == c ? 0.0 : m[at]) - column[i] * row[j];
        });
    }
}

DEVICE void forward(const Rotation& p) {
    const Own own(p);
    const u32 n = own.n;
    if (p.terms == 0) {
        invert(own);
        const f64* inverse = own.matrix(0);
        each_element(own, [&](u32 at, u32 i, u32 j) {
            own.rotation[at] = static_cast<f32>(2.0 * inverse[at] - (i == j ? 1.0 : 0.0));
        });
        return;
    }
    // Of the last term first: T_k = f_k S + S T_k+1, and the rotation is I + T_1.
    each_element(own, [&](u32 at, u32 i, u32 j) { own.matrix(0)[at] = p.factors[p.terms - 1] * own.skew(i, j); });
    u32 from = 0;
    for (u32 k = p.terms - 1; k > 0; --k, from ^= 1) {
        const f64* t = own.matrix(from);
        f64* next = own.matrix(from ^ 1);
        each_element(own, [&](u32 at, u32 i, u32 j) {
            const auto s = [&](u32 k) { return own.skew(i, k); };
            next[at] = p.factors[k - 1] * own.skew(i, j) + dot(n, s, [&](u32 k) { return t[k * n + j]; });
        });
    }
    const f64* t = own.matrix(from);
    each_element(own, [&](u32 at, u32 i, u32 j) {
        own.rotation[at] = static_cast<f32>(t[at] + (i == j ? 1.0 : 0.0));
    });
}

// Adds the gradient of S, a matrix of independent elements, to that of the parameters.
DEVICE void add_to_parameters(const Own& own, const f64* d) {
    const u32 n = own.n;
    f32* to = own.p.d_parameters + static_cast<u64>(blockIdx.x) * own.p.each;
    each_element(own, [&](u32 at, u32 i, u32 j) {
        const f64 pair = d[at] - d[j * n + i];
        if (own.p.square) {
            to[at] += static_cast<f32>(0.5 * pair);
        } else if (i < j) {
            to[place(n, i, j)] += static_cast<f32>(pair);
        }
    });
}

DEVICE void gradient(const Rotation& p) {
    const Own own(p);
    const u32 n = own.n;
    const f32* d = own.rotation;
    f64* const total = own.matrix(3);
    if (p.terms == 0) {
        // -2 (I + S)^-T d (I + S)^-T
        invert(own);
        const f64* inverse = own.matrix(0);
        f64* left = own.matrix(1);
        each_element(own, [&](u32 at, u32 i, u32 j) {
            left[at] = dot(n, [&](u32 k) { return inverse[k * n + i]; }, [&](u32 k) { return static_cast<f64>(d[k * n + j]); });
        });
        each_element(own, [&](u32 at, u32 i, u32 j) {
            total[at] = -2.0 * dot(n, [&](u32 k) { return left[i * n + k]; }, [&](u32 k) { return inverse[j * n + k]; });
        });
        add_to_parameters(own, total);
        return;
    }
    // By Horner's rule on G_k+1 = S^T G_k + d (S^T)^k, G_1 = d: `left` is d (S^T)^k, `current` G_k. Both change
    // places with a third matrix.
    u32 left = 0, current = 1, spare = 2;
    each_element(own, [&](u32 at, u32, u32) {
        own.matrix(left)[at] = own.matrix(current)[at] = d[at];
        total[at] = p.factors[0] * d[at];
    });
    for (u32 k = 1; k < p.terms; ++k) {
        // (x S^T)_ij = sum x_ik S_jk
        const f64* before = own.matrix(left);
        f64* after = own.matrix(spare);
        each_element(own, [&](u32 at, u32 i, u32 j) {
            after[at] = dot(n, [&](u32 k) { return before[i * n + k]; }, [&](u32 k) { return own.skew(j, k); });
        });
        const u32 used = left;
        left = spare;
        // (S^T G)_ij = sum S_ki G_kj
        const f64* g = own.matrix(current);
        const f64* beside = own.matrix(left);
        f64* next = own.matrix(used);
        each_element(own, [&](u32 at, u32 i, u32 j) {
            next[at] = beside[at] + dot(n, [&](u32 k) { return own.skew(k, i); }, [&](u32 k) { return g[k * n + j]; });
            total[at] += p.factors[k] * next[at];
        });
        spare = current;
        current = used;
    }
    add_to_parameters(own, total);
}

struct Shorten {
    f32* vectors;
    f64 limit;
    u32 cols, unused;
};

// A block of threads has a row.
DEVICE void shorten(const Shorten& p) {
    f32* row = p.vectors + static_cast<u64>(blockIdx.x) * p.cols;
    f64 squares = 0.0;
    for (u32 i = threadIdx.x; i < p.cols; i += blockDim.x) {
        const f64 value = row[i];
        squares += value * value;
    }
    const f64 norm = sqrt(block_sum(squares));
    if (!(norm > p.limit)) return;
    const f32 factor = static_cast<f32>(p.limit / norm);
    for (u32 i = threadIdx.x; i < p.cols; i += blockDim.x) row[i] *= factor;
}

KERNEL(rotation_forward, 256, Rotation, forward)
KERNEL(rotation_gradient, 256, Rotation, gradient)
KERNEL(rotation_shorten, 256, Shorten, shorten)
