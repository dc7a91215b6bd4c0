// Kernels of the self test: right ones, and wrong ones that must be caught.
#include "reduce.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

struct Tile {
    const bf16* a; // [16][16], or its transpose
    const bf16* b; // [8][16] (k adjacent), or [16][8]
    f32* d;        // [16][8]
};

DEVICE void store_tile(f32* d, const f32 (&c)[4]) {
    const u32 g = threadIdx.x / 4, t = threadIdx.x % 4;
    d[g * 8 + 2 * t] = c[0];
    d[g * 8 + 2 * t + 1] = c[1];
    d[(g + 8) * 8 + 2 * t] = c[2];
    d[(g + 8) * 8 + 2 * t + 1] = c[3];
}

// Fragments read element by element, as the PTX ISA lays them out.
DEVICE void mma_by_hand(const Tile& p) {
    const u32 g = threadIdx.x / 4, t = threadIdx.x % 4;
    const auto pair = [](bf16 low, bf16 high) { return low.bits | static_cast<u32>(high.bits) << 16; };
    const auto a = [&](u32 row, u32 k) { return pair(p.a[row * 16 + k], p.a[row * 16 + k + 1]); };
    const auto b = [&](u32 k) { return pair(p.b[g * 16 + k], p.b[g * 16 + k + 1]); };
    const u32 fa[4] = {a(g, 2 * t), a(g + 8, 2 * t), a(g, 2 * t + 8), a(g + 8, 2 * t + 8)};
    const u32 fb[2] = {b(2 * t), b(2 * t + 8)};
    f32 c[4] = {1, 1, 1, 1};
    mma_m16n8k16_bf16(c, fa, fb, c);
    store_tile(p.d, c);
}
KERNEL(mma_by_hand_1, 32, Tile, mma_by_hand)

// Through cp.async, shared memory and ldmatrix.
template <bool A_TRANSPOSED, bool B_TRANSPOSED>
DEVICE void mma_by_ldmatrix(const Tile& p) {
    bf16* a = dynamic_shared<bf16>();
    bf16* b = a + 16 * 16;
    const u32 lane = threadIdx.x;
    cp_async_16(a + 8 * lane, p.a + 8 * lane, 16);
    if (lane < 16) {
        cp_async_16(b + 8 * lane, p.b + 8 * lane, 16);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    u32 fa[4], fb[2];
    if (A_TRANSPOSED) { // stored [k][row]: matrices 1 and 2 change places
        ldmatrix_x4_trans(fa, a + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
    } else {
        ldmatrix_x4(fa, a + lane % 16 * 16 + lane / 16 * 8);
    }
    if (B_TRANSPOSED) {
        ldmatrix_x2_trans(fb, b + lane % 16 * 8);
    } else {
        ldmatrix_x2(fb, b + lane % 8 * 16 + lane / 8 % 2 * 8);
    }
    f32 c[4] = {1, 1, 1, 1};
    mma_m16n8k16_bf16(c, fa, fb, c);
    store_tile(p.d, c);
}
KERNEL(mma_ldmatrix_nt, 32, Tile, (mma_by_ldmatrix<false, false>))
KERNEL(mma_ldmatrix_nn, 32, Tile, (mma_by_ldmatrix<false, true>))
KERNEL(mma_ldmatrix_tt, 32, Tile, (mma_by_ldmatrix<true, false>))
KERNEL(mma_ldmatrix_tn, 32, Tile, (mma_by_ldmatrix<true, true>))

struct Reduce {
    const f32* in; // one per thread
    f64* out;      // [blocks][8]
};
// Every reduction twice in a row, without a barrier between.
DEVICE void reduce_all(const Reduce& p) {
    const f32 v = p.in[threadIdx.x];
    f64 got[8] = {};
    for (u32 round = 0; round < 2; round++) {
        f32 a = v, b = 2 * v;
        block_sum2(a, b);
        const ArgMax best = block_argmax({v, threadIdx.x});
        const f64 now[8] = {block_sum(v), a, b, block_max(v), block_sum(static_cast<f64>(v)),
                            best.value, static_cast<f64>(best.index),
                            static_cast<f64>(block_sum(threadIdx.x))};
        for (u32 i = 0; i < 8; i++) {
            got[i] = round == 0 || got[i] == now[i] ? now[i] : -1;
        }
    }
    // Thread by thread: all must have received the same.
    for (u32 i = 0; i < 8; i++) {
        const f64 first = shuffle_idx(got[i], 0);
        if (ballot(first == got[i]) == 0xffffffffu && threadIdx.x == blockDim.x - 1) {
            p.out[blockIdx.x * 8 + i] = got[i];
        }
    }
}
KERNEL(reduce_all_1, 1024, Reduce, reduce_all)

struct Shuffle {
    u32* out; // [5][32]
};
DEVICE void shuffles(const Shuffle& p) {
    const u32 lane = threadIdx.x;
    p.out[lane] = shuffle_xor(lane, 5);
    p.out[32 + lane] = shuffle_down(lane, 3);
    p.out[64 + lane] = shuffle_up(lane, 3);
    p.out[96 + lane] = shuffle_idx(lane, lane / 2);
    p.out[128 + lane] = ballot(lane % 3 == 0);
}
KERNEL(shuffles_1, 32, Shuffle, shuffles)

struct Values {
    const f32* in;
    f32* out;
    u32 count;
};

// Each value as bf16 and back.
DEVICE void through_bf16(const Values& p) {
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += gridDim.x * blockDim.x) {
        p.out[i] = to_f32(from_f32<bf16>(p.in[i]));
    }
}
KERNEL(through_bf16_1, 256, Values, through_bf16)

DEVICE void add_one(const Values& p) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) {
        return;
    }
    p.out[i] = p.in[i] + 1;
}
KERNEL(add_one_1, 64, Values, add_one)

// An early exit before a barrier, which CUDA permits.
DEVICE void early_exit(const Values& p) {
    SHARED f32 tile[64];
    if (threadIdx.x >= p.count) {
        return;
    }
    tile[threadIdx.x] = p.in[threadIdx.x];
    __syncthreads();
    p.out[threadIdx.x] = tile[p.count - 1 - threadIdx.x];
}
KERNEL(early_exit_1, 64, Values, early_exit)

// Two teams of 64 threads that reverse `team + 1` times, each with barriers of its own; `count` threads
// of the last one stay away.
DEVICE void teams(const Values& p) {
    SHARED f32 tile[2][64];
    const u32 team = threadIdx.x / 64, i = threadIdx.x % 64;
    if (threadIdx.x >= 128 - p.count) {
        return;
    }
    f32 value = p.in[threadIdx.x];
    for (u32 round = 0; round <= team; round++) {
        tile[team][i] = value;
        team_barrier(team, 64);
        value = tile[team][63 - i];
        team_barrier(team, 64);
    }
    p.out[threadIdx.x] = value;
}
KERNEL(teams_1, 128, Values, teams)

// Static and dynamic shared memory as a block finds it.
DEVICE void stale_shared(const Values& p) {
    SHARED f32 tile[64];
    f32* dynamic = dynamic_shared<f32>();
    const u32 i = threadIdx.x;
    p.out[blockIdx.x * 64 + i] = tile[i] != tile[i] && dynamic[i] != dynamic[i] ? 1 : 0;
    tile[i] = 0;
    dynamic[i] = 0;
}
KERNEL(stale_shared_1, 64, Values, stale_shared)

// Copies of which the last `count` bytes are not valid; before and after the wait.
DEVICE void copies(const Values& p) {
    f32* tile = dynamic_shared<f32>();
    const u32 i = threadIdx.x;
    cp_async_16(tile + 4 * i, p.in + 4 * i, 16 - p.count);
    cp_async_commit();
    cp_async_16(tile + 128 + 4 * i, p.in + 4 * i, 16);
    cp_async_commit();
    p.out[i] = tile[4 * i];
    cp_async_wait<1>();
    p.out[32 + i] = tile[4 * i];
    p.out[64 + i] = tile[4 * i + 3];
    p.out[96 + i] = tile[128 + 4 * i];
    cp_async_wait<0>();
    p.out[128 + i] = tile[128 + 4 * i];
}
KERNEL(copies_1, 32, Values, copies)

// Wrong: no barrier between write and read.
DEVICE void missing_barrier(const Values& p) {
    SHARED f32 tile[64];
    tile[threadIdx.x] = p.in[threadIdx.x];
    p.out[threadIdx.x] = tile[63 - threadIdx.x];
}
KERNEL(missing_barrier_1, 64, Values, missing_barrier)

// Wrong: half a warp calls an operation of the warp.
DEVICE void half_warp(const Values& p) {
    if (threadIdx.x % 32 < 16) {
        p.out[threadIdx.x] = shuffle_xor(p.in[threadIdx.x], 1);
    }
}
KERNEL(half_warp_1, 64, Values, half_warp)

// Wrong: the halves of a block wait at different barriers.
DEVICE void diverged(const Values& p) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    p.out[threadIdx.x] = 0;
}
KERNEL(diverged_1, 64, Values, diverged)

// Wrong: one warp waits for the block, the other for its lanes.
DEVICE void mixed(const Values& p) {
    if (threadIdx.x == 40) {
        __syncthreads();
    }
    p.out[threadIdx.x] = shuffle_xor(p.in[threadIdx.x], 1);
}
KERNEL(mixed_1, 64, Values, mixed)

// Wrong: 16 bytes at an odd address.
DEVICE void misaligned(const Values& p) { store_16(p.out, load_16(p.in + 1)); }
KERNEL(misaligned_1, 32, Values, misaligned)

// Wrong: writes element `count`, one behind the end.
DEVICE void out_of_bounds(const Values& p) {
    if (threadIdx.x == 0) {
        p.out[p.count] = 1;
    }
}
KERNEL(out_of_bounds_1, 32, Values, out_of_bounds)

// Wrong: writes behind its dynamic shared memory.
DEVICE void shared_out_of_bounds(const Values& p) {
    if (threadIdx.x == 0) {
        dynamic_shared<f32>()[p.count] = 1;
    }
}
KERNEL(shared_out_of_bounds_1, 32, Values, shared_out_of_bounds)

// `rows` rows of `columns` elements, in blocks of 64 columns, as wgmma_operand has them.
DEVICE void load_swizzled(bf16* shared, const bf16* from, u32 rows, u32 columns) {
    for (u32 at = threadIdx.x; at < rows * columns / 8; at += blockDim.x) {
        const u32 row = at / (columns / 8), chunk = at % (columns / 8);
        cp_async_16(shared + (chunk / 8 * rows + row) * 64 + (chunk % 8 ^ row % 8) * 8, from + at * 8, 16);
    }
}

// A product of a warpgroup. `wrong` leaves something out: 1 the fence of shared memory, 2 that of registers,
// 3 the wait, 4 the alignment.
struct Group {
    const bf16* a; // [64][64]
    const bf16* b; // [96][64], or [64][128]
    f32* d;        // [64][96], or [64][128]
    u32 wrong, unused;
};

template <bool A_IN_REGISTERS>
DEVICE void group_product(const Group& p) {
    constexpr u32 N = A_IN_REGISTERS ? 128 : 96;
    u8* const start = dynamic_shared<u8>();
    bf16* const a = reinterpret_cast<bf16*>(start + (0u - shared_address(start)) % 1024u + (p.wrong == 4 ? 512 : 0));
    bf16* const b = a + 64 * 64;
    load_swizzled(a, p.a, 64, 64);
    load_swizzled(b, p.b, A_IN_REGISTERS ? 64 : 96, A_IN_REGISTERS ? 128 : 64);
    cp_async_commit();
    cp_async_wait<0>();
    if (p.wrong != 1) fence_async_shared();
    __syncthreads();
    f32 d[N / 8][4];
    for (auto& tile : d) {
        for (f32& value : tile) value = 1.0f;
    }
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = threadIdx.x / 32 * 16 + g;
    const auto pair = [&](u32 r, u32 k) {
        return p.a[r * 64 + k].bits | static_cast<u32>(p.a[r * 64 + k + 1].bits) << 16;
    };
    if (p.wrong != 2) wgmma_fence();
    for (u32 k = 0; k < 4; k++) {
        if constexpr (A_IN_REGISTERS) {
            const u32 left[4] = {pair(row, k * 16 + 2 * t), pair(row + 8, k * 16 + 2 * t),
                                 pair(row, k * 16 + 2 * t + 8), pair(row + 8, k * 16 + 2 * t + 8)};
            wgmma_registers(d, left, wgmma_operand(b + k * 16 * 64, 64 * 128, 1024));
        } else {
            wgmma_shared<false>(d, wgmma_operand(a + k * 16, 16, 1024), wgmma_operand(b + k * 16, 16, 1024));
        }
    }
    wgmma_commit();
    if (p.wrong != 3) wgmma_wait<0>();
    wgmma_settle(d);
    for (u32 i = 0; i < N / 2; i++) {
        p.d[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + 2 * t + i % 2] = d[i / 4][i % 4];
    }
}
KERNEL(group_shared_1, 128, Group, group_product<false>)
KERNEL(group_registers_1, 128, Group, group_product<true>)

// Two boxes of 64 columns of a tensor, one after the other to the same place, read back as they lie there.
// `wrong` leaves something out or does something else.
struct Boxed {
    TensorMap map; // of boxes [rows][64]
    f32* out;      // [2][rows][64]
    u32 rows, head, row[2];
    u32 wrong, bytes; // that are expected of a box
};
enum WrongBox : u32 {
    NO_INIT = 1,
    NO_INIT_FENCE,
    NO_WAIT,
    NO_ARRIVE,
    TWO_ARRIVALS,
    WRITTEN_OVER,
    WRONG_PARITY,
    MISALIGNED,
    BEYOND,
    NO_FENCE,
    TWICE,
    NO_BARRIER,
};

DEVICE void two_boxes(const Boxed& p) {
    SHARED u64 barrier;
    u8* const start = dynamic_shared<u8>();
    bf16* const shared = reinterpret_cast<bf16*>(start + (0u - shared_address(start)) % 1024u);
    if (threadIdx.x == 0) {
        if (p.wrong != NO_INIT) mbarrier_init(&barrier, 1);
        if (p.wrong != NO_INIT_FENCE) fence_async_shared();
    }
    if (p.wrong != NO_BARRIER) __syncthreads();
    for (u32 turn = 0; turn < 2; turn++) {
        if (threadIdx.x == 0) {
            bf16* const to = shared + (p.wrong == MISALIGNED ? 32 : p.wrong == BEYOND ? 64 * 64 : 0);
            if (p.wrong == WRITTEN_OVER) barrier = 1;
            mbarrier_expect(&barrier, p.bytes);
            load_box(to, p.map, 64, p.head, p.row[turn], &barrier);
            if (p.wrong == TWICE) load_box(to, p.map, 64, p.head, p.row[turn], &barrier);
            if (p.wrong != NO_ARRIVE) mbarrier_arrive(&barrier);
            if (p.wrong == TWO_ARRIVALS) mbarrier_arrive(&barrier);
        }
        if (p.wrong != NO_WAIT) mbarrier_wait(&barrier, p.wrong == WRONG_PARITY ? 1 - turn : turn);
        for (u32 at = threadIdx.x; at < p.rows * 64; at += blockDim.x) {
            const u32 row = at / 64, column = at % 64;
            p.out[turn * p.rows * 64 + at] = to_f32(shared[row * 64 + (column / 8 ^ row % 8) * 8 + column % 8]);
        }
        __syncthreads();
        for (u32 at = threadIdx.x; at < p.rows * 8; at += blockDim.x) clear_shared_16(shared + at * 8);
        if (p.wrong != NO_FENCE) fence_async_shared();
        __syncthreads();
    }
}
KERNEL(two_boxes_1, 64, Boxed, two_boxes)

// a b^T of boxes [64][64]; with `wrong` a product that begins before the boxes are there, or goes on when the next
// one is on its way.
struct BoxedProduct {
    TensorMap map;
    f32* d; // [64][64]
    u32 wrong, unused;
};
DEVICE void box_product(const BoxedProduct& p) {
    SHARED u64 barrier;
    u8* const start = dynamic_shared<u8>();
    bf16* const a = reinterpret_cast<bf16*>(start + (0u - shared_address(start)) % 1024u);
    bf16* const b = a + 64 * 64;
    if (threadIdx.x == 0) {
        mbarrier_init(&barrier, 1);
        fence_async_shared();
        mbarrier_expect(&barrier, 2 * 64 * 128);
        load_box(a, p.map, 0, 0, 0, &barrier);
        load_box(b, p.map, 0, 0, 64, &barrier);
        mbarrier_arrive(&barrier);
    }
    __syncthreads();
    if (p.wrong != 1) mbarrier_wait(&barrier, 0);
    f32 d[8][4];
    wgmma_fence();
    wgmma_shared<true>(d, wgmma_operand(a, 16, 1024), wgmma_operand(b, 16, 1024));
    for (u32 k = 1; k < 4; k++) {
        wgmma_shared<false>(d, wgmma_operand(a + k * 16, 16, 1024), wgmma_operand(b + k * 16, 16, 1024));
    }
    wgmma_commit();
    if (p.wrong == 1) mbarrier_wait(&barrier, 0);
    if (p.wrong == 2) {
        __syncthreads();
        if (threadIdx.x == 0) {
            mbarrier_expect(&barrier, 64 * 128);
            load_box(b, p.map, 0, 0, 0, &barrier);
            mbarrier_arrive(&barrier);
        }
    }
    wgmma_wait<0>();
    wgmma_settle(d);
    if (p.wrong == 2) mbarrier_wait(&barrier, 1);
    const u32 lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    for (u32 i = 0; i < 32; i++) p.d[(row + i % 4 / 2 * 8) * 64 + i / 4 * 8 + 2 * (lane % 4) + i % 2] = d[i / 4][i % 4];
}
KERNEL(box_product_1, 128, BoxedProduct, box_product)
