// Rows of matrices, read in groups of consecutive elements.
//
// A kernel body is written once against an access: Packed<T> moves 16 bytes at a time and needs one
// dtype and aligned rows, Any takes each element by itself, of whichever dtype its matrix has.
#pragma once
#include "types.cuh"

#include "reduce.cuh"

// As the host describes it: `Matrix` of cuda/rows.rs.
struct Matrix {
    void* data;
    u64 pitch;
    u32 is_bf16;
    u32 unused;
};

template <typename T>
DEVICE T* row_of(const Matrix& m, u32 row) {
    return static_cast<T*>(m.data) + row * m.pitch;
}

template <typename T>
struct Packed {
    static constexpr u32 LEN = 16 / sizeof(T);
    // Approximate functions cover what rounding to bf16 leaves.
    static constexpr bool FAST_MATH = sizeof(T) == 2;
    using Group = Vec16<T>;

    static DEVICE Group load(const Matrix& m, u32 row, u32 group) {
        return load_16(row_of<const T>(m, row) + group * LEN);
    }
    // Of a matrix that the kernel does not write, for data that is read once.
    static DEVICE Group load_once(const Matrix& m, u32 row, u32 group) {
        return load_nc_16(row_of<const T>(m, row) + group * LEN);
    }
    static DEVICE void store(const Matrix& m, u32 row, u32 group, const Group& values) {
        store_16(row_of<T>(m, row) + group * LEN, values);
    }
    static DEVICE f32 get(const Group& values, u32 e) { return to_f32(values[e]); }
    static DEVICE void set(const Matrix&, Group& values, u32 e, f32 v) { values[e] = from_f32<T>(v); }

    static DEVICE void load_vector(const f32* vector, u32 group, f32 (&to)[LEN]) {
#pragma unroll
        for (u32 part = 0; part < LEN; part += 4) {
            const Vec16<f32> values = load_16(vector + group * LEN + part);
#pragma unroll
            for (u32 e = 0; e < 4; e++) to[part + e] = values[e];
        }
    }
    static DEVICE void store_vector(f32* vector, u32 group, const f32 (&from)[LEN]) {
#pragma unroll
        for (u32 part = 0; part < LEN; part += 4) {
            Vec16<f32> values;
#pragma unroll
            for (u32 e = 0; e < 4; e++) values[e] = from[part + e];
            store_16(vector + group * LEN + part, values);
        }
    }
};

struct Any {
    static constexpr u32 LEN = 1;
    static constexpr bool FAST_MATH = false;
    struct Group {
        f32 value;
    };

    static DEVICE Group load(const Matrix& m, u32 row, u32 group) {
        if (m.is_bf16) return {to_f32(row_of<const bf16>(m, row)[group])};
        return {row_of<const f32>(m, row)[group]};
    }
    static DEVICE Group load_once(const Matrix& m, u32 row, u32 group) { return load(m, row, group); }
    static DEVICE void store(const Matrix& m, u32 row, u32 group, const Group& values) {
        if (m.is_bf16) {
            row_of<bf16>(m, row)[group] = from_f32<bf16>(values.value);
        } else {
            row_of<f32>(m, row)[group] = values.value;
        }
    }
    static DEVICE f32 get(const Group& values, u32) { return values.value; }
    // Rounds as store() does, so that get() gives what the matrix will hold.
    static DEVICE void set(const Matrix& m, Group& values, u32, f32 v) {
        values.value = m.is_bf16 ? to_f32(from_f32<bf16>(v)) : v;
    }
    static DEVICE void load_vector(const f32* vector, u32 group, f32 (&to)[LEN]) { to[0] = vector[group]; }
    static DEVICE void store_vector(f32* vector, u32 group, const f32 (&from)[LEN]) { vector[group] = from[0]; }
};

// Single elements of one dtype.
template <typename T>
DEVICE f32 load_element(const Matrix& m, u32 row, u32 column) {
    return to_f32(row_of<const T>(m, row)[column]);
}

// The threads that share a row: a warp each if `threads` is 32, else the whole block.
struct RowTeam {
    u32 row, lane, threads;

    DEVICE explicit RowTeam(u32 team_threads) : threads(team_threads) {
        const bool warps = team_threads == 32;
        lane = warps ? threadIdx.x % 32 : threadIdx.x;
        row = warps ? blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32 : blockIdx.x;
    }

    // The sum over the team, in every thread; a fixed order.
    DEVICE f32 sum(f32 v) const { return threads == 32 ? warp_sum(v) : block_sum(v); }
};
