#include "reduce.cuh"

// Two operands with pitches, and a scale.
struct Add {
    const void* a;
    void* out;
    u64 a_pitch, out_pitch;
    u32 rows, cols;
    f32 scale, unused;
};

template <typename T>
DEVICE void add(const Add& p) {
    const T* a = static_cast<const T*>(p.a) + blockIdx.x * p.a_pitch;
    T* out = static_cast<T*>(p.out) + blockIdx.x * p.out_pitch;
    for (u32 c = threadIdx.x; c < p.cols; c += blockDim.x) {
        out[c] = from_f32<T>(to_f32(out[c]) + p.scale * to_f32(a[c]));
    }
}

KERNEL(add_f32, 64, Add, add<f32>)
KERNEL(add_bf16, 64, Add, add<bf16>)

// Sums of rows, through dynamic shared memory at an offset.
struct RowSum {
    const f32* a;
    f32* out;
    u32 cols, offset;
};

DEVICE void row_sum(const RowSum& p) {
    f32* staged = dynamic_shared<f32>() + p.offset;
    f32 part = 0.0f;
    for (u32 c = threadIdx.x; c < p.cols; c += blockDim.x) {
        staged[c] = p.a[blockIdx.x * u64(p.cols) + c];
    }
    __syncthreads();
    for (u32 c = threadIdx.x; c < p.cols; c += blockDim.x) {
        part += staged[p.cols - 1 - c];
    }
    part = block_sum(part);
    if (threadIdx.x == 0) {
        p.out[blockIdx.x] = part;
    }
}

KERNEL(sum_f32, 64, RowSum, row_sum)
