// Tensor maps: the driver's checks, and one of our own, that the tensor lies in an allocation.
#include "state.h"
#include "tensor_map.h"

#include <cstring>
#include <iterator>

using namespace ferrotune_host;

namespace {

// Bytes of an element by data type, as the driver numbers them.
constexpr uint32_t ELEMENT_BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
constexpr uint64_t MOST_ELEMENTS = uint64_t(1) << 32, MOST_STRIDE = uint64_t(1) << 40;
constexpr uint32_t MOST_BOX = 256;

int refuse(const std::string& reason) {
    report("cuTensorMapEncodeTiled: " + reason);
    return INVALID_VALUE;
}

} // namespace

API int cuTensorMapEncodeTiled(void* to, unsigned type, unsigned rank, void* address, const uint64_t* sizes,
                               const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                               unsigned interleave, unsigned swizzle, unsigned promotion, unsigned fill) {
    if (const int code = ready()) {
        return code;
    }
    if (capability[0] < 9) {
        return refuse("tensor maps need compute capability 9.0");
    }
    const auto at = reinterpret_cast<uint64_t>(address);
    if (reinterpret_cast<uint64_t>(to) % 64 != 0 || at == 0 || at % 16 != 0) {
        return refuse("the map is not aligned to 64 bytes, or the tensor not to 16");
    }
    if (type >= std::size(ELEMENT_BYTES) || rank == 0 || rank > 5 || swizzle > 6 || promotion > 3 || fill > 1) {
        return refuse("a type, rank, swizzle, promotion or fill that there is not");
    }
    if (interleave != 0) {
        return refuse("the stand-in knows no interleaved tensors");
    }
    HostTensorMap map = {};
    map.magic = HostTensorMap::MAGIC;
    map.address = at;
    map.rank = static_cast<uint8_t>(rank);
    map.type = static_cast<uint8_t>(type);
    map.swizzle = static_cast<uint8_t>(swizzle);
    const uint64_t bytes = ELEMENT_BYTES[type];
    uint64_t extent = bytes;
    for (unsigned i = 0; i < rank; i++) {
        const std::string dimension = "dimension " + std::to_string(i);
        if (sizes[i] == 0 || sizes[i] > MOST_ELEMENTS) {
            return refuse(dimension + " has " + std::to_string(sizes[i]) + " elements");
        }
        if (box[i] == 0 || box[i] > MOST_BOX || steps[i] == 0 || steps[i] > 8) {
            return refuse(dimension + " has a box of " + std::to_string(box[i]) + " in steps of " +
                          std::to_string(steps[i]));
        }
        if (i > 0 && (strides[i - 1] % 16 != 0 || strides[i - 1] >= MOST_STRIDE)) {
            return refuse(dimension + " has a stride of " + std::to_string(strides[i - 1]) + " bytes");
        }
        if (steps[i] != 1) {
            return refuse("the stand-in knows no steps");
        }
        if (i > 0) {
            map.strides[i - 1] = strides[i - 1];
        }
        map.last[i] = static_cast<uint32_t>(sizes[i] - 1);
        map.box[i] = static_cast<uint16_t>(box[i]);
        extent += (sizes[i] - 1) * (i > 0 ? strides[i - 1] : bytes);
    }
    const uint64_t row = box[0] * bytes;
    const uint64_t widest = swizzle == 0 ? MOST_BOX * bytes : swizzle < 3 ? 16u << swizzle : 128;
    if (row % 16 != 0 || row > widest) {
        return refuse("a row of " + std::to_string(row) + " bytes of the box, at most " + std::to_string(widest) +
                      " and a multiple of 16");
    }
    if (!current->device->memory.holds(address, extent)) {
        return refuse("a tensor of " + std::to_string(extent) + " bytes that no allocation holds");
    }
    memset(to, 0, 128);
    memcpy(to, &map, sizeof(map));
    return SUCCESS;
}
