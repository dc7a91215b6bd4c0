// Copies of groups of elements that may change the dtype.
#pragma once
#include "rows.cuh"

// Eight elements at a time, in 16-byte accesses.
template <typename S, typename D>
struct Copy {
    static constexpr u32 LEN = 8;

    static DEVICE void copy(const Matrix& from, u32 from_row, const Matrix& to, u32 to_row, u32 group) {
        constexpr u32 SOURCE = Packed<S>::LEN, TARGET = Packed<D>::LEN;
        Vec16<S> source[LEN / SOURCE];
#pragma unroll
        for (u32 i = 0; i < LEN / SOURCE; i++) source[i] = Packed<S>::load_once(from, from_row, group * (LEN / SOURCE) + i);
#pragma unroll
        for (u32 i = 0; i < LEN / TARGET; i++) {
            Vec16<D> target;
#pragma unroll
            for (u32 e = 0; e < TARGET; e++) {
                const u32 at = i * TARGET + e;
                target[e] = from_f32<D>(to_f32(source[at / SOURCE][at % SOURCE]));
            }
            Packed<D>::store(to, to_row, group * (LEN / TARGET) + i, target);
        }
    }
};

// Same dtype: the bits as they are, NaN payloads too.
template <typename T>
struct Copy<T, T> {
    static constexpr u32 LEN = Packed<T>::LEN;

    static DEVICE void copy(const Matrix& from, u32 from_row, const Matrix& to, u32 to_row, u32 group) {
        Packed<T>::store(to, to_row, group, Packed<T>::load_once(from, from_row, group));
    }
};

// Element by element, whatever the dtypes.
struct CopyAny {
    static constexpr u32 LEN = 1;

    static DEVICE void copy(const Matrix& from, u32 from_row, const Matrix& to, u32 to_row, u32 group) {
        Any::store(to, to_row, group, Any::load(from, from_row, group));
    }
};
