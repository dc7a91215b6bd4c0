// Copies of boxes of a tensor from global to shared memory by the copy engine of Hopper (TMA), and the barriers
// in shared memory that count their bytes. sm_90 on; the twins of the host are in host/tma.h.
//
// One thread begins a copy, and the engine makes it whole: it finds the box in the tensor by its coordinates,
// makes what lies outside of the tensor zero, and swizzles. A barrier has phases, from 0 on. One ends when all
// its arrivals and all its bytes are there, no matter in which order they are expected and come; then the next
// one begins. Whoever has waited for the end of a phase sees all its bytes, and so do products that are issued
// behind a barrier of the block.
#pragma once
#include "types.cuh"

// A tensor and a box of it, as the driver describes them to the engine. Within the parameter of a kernel.
struct alignas(64) TensorMap {
    u64 words[16];
};

#if defined(FERROTUNE_HOST)

#include "tma.h"

#else

// By one thread, with a fence_async_shared behind it, and a barrier of the block before others wait.
DEVICE void mbarrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// The phase under way does not end before `bytes` more have come.
DEVICE void mbarrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.expect_tx.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
DEVICE void mbarrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits for the end of the phase whose number has this parity: the one under way, or the one before it.
DEVICE void mbarrier_wait(u64* barrier, u32 parity) {
    u32 ended;
    do {
        asm volatile(
            "{\n"
            ".reg .pred ended;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
            "selp.u32 %0, 1, 0, ended;\n"
            "}"
            : "=r"(ended)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!ended);
}
// Begins to copy the box of a tensor of three dimensions that starts at (x, y, z), x being the innermost, to
// `shared`, which is aligned to 128 bytes. Its bytes count for `barrier`, those outside of the tensor too.
DEVICE void load_box(void* shared, const TensorMap& map, u32 x, u32 y, u32 z, u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(shared_address(shared)), "l"(&map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
        : "memory");
}

#endif
