// How far a Gram matrix is from the identity. One block of threads has all of it.
#include "reduce.cuh"

struct Gram {
    // [R, R].
    f32* gram;
    f32* distance;
    u32 rank, unused;

    DEVICE f32 away(u64 at) const {
        const f32 value = gram[at];
        return at / rank == at % rank && value > 0.0f ? value - 1.0f : value;
    }
};

DEVICE void direction(const Gram& p) {
    const u64 elements = static_cast<u64>(p.rank) * p.rank;
    f64 squares = 0.0;
    for (u64 at = threadIdx.x; at < elements; at += blockDim.x) {
        const f64 away = p.away(at);
        squares += away * away;
    }
    const f64 distance = sqrt(block_sum(squares));
    const f64 inverse = distance > 0.0 ? 1.0 / distance : 0.0;
    for (u64 at = threadIdx.x; at < elements; at += blockDim.x) {
        p.gram[at] = static_cast<f32>(p.away(at) * inverse);
    }
    if (threadIdx.x == 0) *p.distance = static_cast<f32>(distance);
}

KERNEL(identity_distance, 512, Gram, direction)
