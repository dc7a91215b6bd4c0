// The host's twins of include/tma.cuh.
#pragma once

#pragma GCC visibility push(default)
extern "C" {
void ferrotune_host_mbarrier_init(u64* barrier, u32 arrivals);
void ferrotune_host_mbarrier_expect(u64* barrier, u32 bytes);
void ferrotune_host_mbarrier_arrive(u64* barrier);
void ferrotune_host_mbarrier_wait(u64* barrier, u32 parity);
void ferrotune_host_load_box(void* shared, const void* map, u32 x, u32 y, u32 z, u64* barrier);
}
#pragma GCC visibility pop

DEVICE void mbarrier_init(u64* barrier, u32 arrivals) { ferrotune_host_mbarrier_init(barrier, arrivals); }
DEVICE void mbarrier_expect(u64* barrier, u32 bytes) { ferrotune_host_mbarrier_expect(barrier, bytes); }
DEVICE void mbarrier_arrive(u64* barrier) { ferrotune_host_mbarrier_arrive(barrier); }
DEVICE void mbarrier_wait(u64* barrier, u32 parity) { ferrotune_host_mbarrier_wait(barrier, parity); }
DEVICE void load_box(void* shared, const TensorMap& map, u32 x, u32 y, u32 z, u64* barrier) {
    ferrotune_host_load_box(shared, &map, x, y, z, barrier);
}
