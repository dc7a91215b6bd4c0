// Random words that are a function of a counter and a key.
#pragma once
#include "types.cuh"

struct Words {
    u32 word[4];
};

// Philox-4x32 with ten rounds, as in rng.rs.
DEVICE Words philox4x32(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
#pragma unroll
    for (u32 round = 0; round < 10; round++) {
        const u64 p0 = u64(c0) * 0xd2511f53u, p1 = u64(c2) * 0xcd9e8d57u;
        c0 = u32(p1 >> 32) ^ c1 ^ k0;
        c1 = u32(p1);
        c2 = u32(p0 >> 32) ^ c3 ^ k1;
        c3 = u32(p0);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return {{c0, c1, c2, c3}};
}
