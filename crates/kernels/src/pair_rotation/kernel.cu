// Pairs of columns, or of rows, rotated and scaled, and the gradients of their angles.
#include "columns.cuh"
#include "rows.cuh"

constexpr u32 PER_PAIR = 0, PER_COLUMN = 1;

struct PairRotation {
    // What is rotated; or the gradient of what came out, and what went in.
    Matrix y, x;
    const f32 *theta, *alpha;
    // [2, n]: c and s, or sums of the gradient times the own value and the other of the pair.
    f32* coefficients;
    f32 *d_theta, *d_alpha;
    u32 rows, cols;
    // Columns, or rows, that are paired; half of a group; and angles.
    u32 n, half, angles;
    u32 per, transposed;
    u32 team_threads;
};

// The column in the first half, of a pair by its number.
DEVICE u32 first_of(u32 half, u32 pair) { return pair / half * 2 * half + pair % half; }

DEVICE bool in_first_half(u32 half, u32 i) { return i % (2 * half) < half; }

// Which angles make c and s of column i.
DEVICE u32 angle_of_c(const PairRotation& p, u32 i) {
    const u32 group = 2 * p.half, of = i / group, within = i % group;
    if (p.per == PER_PAIR) return of * p.half + within % p.half;
    return p.per == PER_COLUMN ? i : 2 * of * group + within;
}
DEVICE u32 angle_of_s(const PairRotation& p, u32 i) {
    return angle_of_c(p, i) + (p.per == PER_PAIR || p.per == PER_COLUMN ? 0 : 2 * p.half);
}

DEVICE void coefficients(const PairRotation& p) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.n) return;
    const u32 c = angle_of_c(p, i), s = angle_of_s(p, i);
    p.coefficients[i] = p.alpha[c] * cosf(p.theta[c]);
    const f32 sine = p.alpha[s] * sinf(p.theta[s]);
    p.coefficients[p.n + i] = in_first_half(p.half, i) ? -sine : sine;
}

// The coefficients of a pair.
struct Turn {
    f32 c[2], s[2];

    DEVICE Turn(const PairRotation& p, u32 first) {
        const u32 of[2] = {first, first + p.half};
#pragma unroll
        for (u32 e = 0; e < 2; e++) {
            c[e] = p.coefficients[of[e]];
            s[e] = p.coefficients[p.n + of[p.transposed ? 1 - e : e]];
        }
    }

    DEVICE void apply(const Matrix& y, u32 row_a, u32 column_a, u32 row_b, u32 column_b) const {
        const f32 a = Any::load(y, row_a, column_a).value, b = Any::load(y, row_b, column_b).value;
        Any::store(y, row_a, column_a, {c[0] * a + s[0] * b});
        Any::store(y, row_b, column_b, {c[1] * b + s[1] * a});
    }
};

// A thread has one pair, in several rows.
DEVICE void rotate_columns(const PairRotation& p) {
    const u32 pair = blockIdx.x * blockDim.x + threadIdx.x;
    if (pair >= p.n / 2) return;
    const u32 first = first_of(p.half, pair);
    const Turn turn(p, first);
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        turn.apply(p.y, row, first, row, first + p.half);
    }
}

// A thread has one column, in several pairs of rows.
DEVICE void rotate_rows(const PairRotation& p) {
    const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.cols) return;
    for (u32 pair = blockIdx.y; pair < p.n / 2; pair += gridDim.y) {
        const u32 first = first_of(p.half, pair);
        Turn(p, first).apply(p.y, first, column, first + p.half, column);
    }
}

DEVICE u32 other_of(u32 half, u32 i) { return in_first_half(half, i) ? i + half : i - half; }

// blockIdx.y: of the own value, or the other of the pair.
DEVICE void column_sums(const PairRotation& p) {
    const bool own = blockIdx.y == 0;
    add_column_sums(p.rows, p.n, p.coefficients + (own ? 0 : p.n), [&](u32 row, u32 column) {
        const u32 of = own ? column : other_of(p.half, column);
        return Any::load(p.y, row, column).value * Any::load(p.x, row, of).value;
    });
}

// A team of threads owns a sum.
DEVICE void row_sums(const PairRotation& p) {
    const RowTeam team(p.team_threads);
    if (team.row >= 2 * p.n) return;
    const u32 row = team.row % p.n;
    const u32 of = team.row < p.n ? row : other_of(p.half, row);
    f32 sum = 0.0f;
    for (u32 column = team.lane; column < p.cols; column += team.threads) {
        sum += Any::load(p.y, row, column).value * Any::load(p.x, of, column).value;
    }
    sum = team.sum(sum);
    if (team.lane == 0) p.coefficients[team.row] = sum;
}

// A thread has one angle, which is in the coefficients of a column, or of both of a pair.
DEVICE void angle_gradients(const PairRotation& p) {
    const u32 angle = blockIdx.x * blockDim.x + threadIdx.x;
    if (angle >= p.angles) return;
    f32 d_c = 0.0f, d_s = 0.0f;
    const auto add_s = [&](u32 i) {
        const f32 sum = p.coefficients[p.n + i];
        d_s += in_first_half(p.half, i) ? -sum : sum;
    };
    if (p.per == PER_PAIR) {
        const u32 first = first_of(p.half, angle);
        d_c = p.coefficients[first] + p.coefficients[first + p.half];
        add_s(first);
        add_s(first + p.half);
    } else if (p.per == PER_COLUMN) {
        d_c = p.coefficients[angle];
        add_s(angle);
    } else {
        const u32 group = 2 * p.half, i = angle / (2 * group) * group + angle % group;
        if (angle % (2 * group) < group) {
            d_c = p.coefficients[i];
        } else {
            add_s(i);
        }
    }
    const f32 cosine = cosf(p.theta[angle]), sine = sinf(p.theta[angle]);
    p.d_theta[angle] += p.alpha[angle] * (d_s * cosine - d_c * sine);
    p.d_alpha[angle] += d_c * cosine + d_s * sine;
}

KERNEL(pair_rotation_coefficients, 256, PairRotation, coefficients)
KERNEL(pair_rotation_columns, 256, PairRotation, rotate_columns)
KERNEL(pair_rotation_rows, 256, PairRotation, rotate_rows)
KERNEL(pair_rotation_column_sums, 1024, PairRotation, column_sums)
KERNEL(pair_rotation_row_sums, 1024, PairRotation, row_sums)
KERNEL(pair_rotation_angle_gradients, 256, PairRotation, angle_gradients)
