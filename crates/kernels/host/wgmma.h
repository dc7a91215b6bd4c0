// The host's twins of include/wgmma.cuh. An operand is the word that the hardware reads, so that a wrong
// layout, stride or alignment gives wrong values here as it does there.
#pragma once

// What a lane brings to a product of its warpgroup: 16 rows of it are the warp's.
struct HostWgmma {
    f32* d; // [columns / 8][4]
    u32 a[4];
    u64 a_operand, b_operand;
    u32 columns;
    bool first, a_in_registers;
};

#pragma GCC visibility push(default)
extern "C" {
void ferrotune_host_wgmma_fence();
void ferrotune_host_wgmma(const HostWgmma* mine);
void ferrotune_host_wgmma_commit();
void ferrotune_host_wgmma_wait(u32 groups);
void ferrotune_host_fence_async_shared();
void ferrotune_host_wrote_shared(const void* shared);
}
#pragma GCC visibility pop

DEVICE u32 shared_address(const void* shared) { return static_cast<u32>(reinterpret_cast<u64>(shared)); }
DEVICE u64 wgmma_operand(const void* shared, u32 leading, u32 stride) {
    const u64 address = (shared_address(shared) & 0x3ffffu) >> 4;
    return 1ull << 62 | static_cast<u64>(stride >> 4) << 32 | static_cast<u64>(leading >> 4) << 16 | address;
}
DEVICE void wgmma_fence() { ferrotune_host_wgmma_fence(); }
DEVICE void wgmma_commit() { ferrotune_host_wgmma_commit(); }
template <u32 N>
DEVICE void wgmma_wait() {
    ferrotune_host_wgmma_wait(N);
}
template <u32 M>
DEVICE void wgmma_settle(f32 (&)[M][4]) {}
DEVICE void wgmma_hold(u32) {}
DEVICE void fence_async_shared() { ferrotune_host_fence_async_shared(); }
DEVICE void clear_shared_16(void* shared) {
    host_aligned_16(shared, "16-byte access");
    std::memset(shared, 0, 16);
    ferrotune_host_wrote_shared(shared);
}

template <bool FIRST, u32 M>
DEVICE void wgmma_shared(f32 (&d)[M][4], u64 a, u64 b) {
    const HostWgmma mine = {d[0], {}, a, b, 8 * M, FIRST, false};
    ferrotune_host_wgmma(&mine);
}
template <u32 M>
DEVICE void wgmma_registers(f32 (&d)[M][4], const u32 (&a)[4], u64 b) {
    const HostWgmma mine = {d[0], {a[0], a[1], a[2], a[3]}, 0, b, 8 * M, false, true};
    ferrotune_host_wgmma(&mine);
}
