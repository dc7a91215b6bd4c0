// What cuTensorMapEncodeTiled puts in the 128 bytes of a tensor map: what the copies of tma.cpp read.
#pragma once

#include <cstdint>

namespace ferrotune_host {

struct HostTensorMap {
    static constexpr uint64_t MAGIC = 0x70616d726f736e74;
    static constexpr uint32_t BF16 = 9, SWIZZLE_128 = 3; // as the driver numbers types and swizzles
    uint64_t magic;
    uint64_t address;
    uint64_t strides[4]; // bytes, of the second dimension and those after it
    uint32_t last[5];    // size of each dimension, less one
    uint16_t box[5];
    uint8_t rank, type, swizzle;
};
static_assert(sizeof(HostTensorMap) <= 128, "a tensor map has 128 bytes");

} // namespace ferrotune_host
