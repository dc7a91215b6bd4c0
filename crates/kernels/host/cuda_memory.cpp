// Device memory: allocation, copies, fills.
#include "state.h"

#include <cstdlib>
#include <cstring>

using namespace ferrotune_host;

// Nothing is kept back: what is freed is free.
API int cuMemPoolSetAttribute(void*, int, void*) { return ready(); }
API int cuMemPoolTrimTo(void*, size_t) { return ready(); }

API int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    if (const int code = ready()) {
        return code;
    }
    auto& memory = current->device->memory;
    finish_all();
    *total = memory.limit();
    *free_bytes = memory.limit() - memory.used();
    return SUCCESS;
}

API int cuMemAllocAsync(uint64_t* address, size_t bytes, Stream* stream) {
    if (const int code = outside_capture(stream)) {
        return code;
    }
    if (bytes == 0) {
        return INVALID_VALUE;
    }
    if (const int code = injected("alloc")) {
        return stream->fault.stick(code);
    }
    void* start = stream->context->device->memory.allocate(bytes);
    if (start == nullptr) {
        finish_all(); // what is still to be freed
        start = stream->context->device->memory.allocate(bytes);
    }
    *address = reinterpret_cast<uint64_t>(start);
    return start != nullptr ? SUCCESS : OUT_OF_MEMORY;
}

// Also after a failure, as a device frees with its context.
API int cuMemFreeAsync(uint64_t address, Stream* stream) {
    if (stream == nullptr) {
        return INVALID_HANDLE;
    }
    if (stream->capture != nullptr) {
        stream->capture->broken = true;
        return CAPTURE_UNSUPPORTED;
    }
    const auto release = [=]() -> int {
        if (!stream->context->device->memory.release(pointer(address))) {
            report("cuMemFreeAsync of an address that was not allocated");
            return INVALID_VALUE;
        }
        return SUCCESS;
    };
    if (order() == Order::ISSUED) {
        const int code = release();
        return code != SUCCESS ? code : stream->fault.code.load();
    }
    std::lock_guard lock(lanes_mutex());
    stream->lane.ops.push_back({.work = release, .frees = true});
    return SUCCESS;
}

API int cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    if (const int code = ready()) {
        return code;
    }
    if (const int code = injected("host")) {
        return current->fault.stick(code);
    }
    *address = malloc(bytes);
    return *address != nullptr ? SUCCESS : OUT_OF_MEMORY;
}

API int cuMemFreeHost(void* address) {
    free(address);
    return SUCCESS;
}

namespace {

int of_nobody() {
    report("a copy from or to memory that is not allocated");
    return INVALID_VALUE;
}

} // namespace

API int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* stream) {
    return issue_on(stream, "copy", [=]() -> int {
        if (!on_device(stream, pointer(to), bytes)) {
            return of_nobody();
        }
        memcpy(pointer(to), from, bytes);
        return SUCCESS;
    });
}

API int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* stream) {
    return issue_on(stream, "copy", [=]() -> int {
        if (!on_device(stream, pointer(from), bytes)) {
            return of_nobody();
        }
        memcpy(to, pointer(from), bytes);
        return SUCCESS;
    });
}

API int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream* stream) {
    return issue_on(stream, "copy", [=] {
        if (!on_device(stream, pointer(to), bytes) || !on_device(stream, pointer(from), bytes)) {
            return INVALID_VALUE;
        }
        memmove(pointer(to), pointer(from), bytes);
        return SUCCESS;
    });
}

namespace {

// One half of CUDA_MEMCPY2D.
struct Side {
    size_t x_bytes, y;
    unsigned kind; // 1: host, 2: device
    void* host;
    uint64_t device;
    void* array;
    size_t pitch;

    char* start() const {
        char* base = static_cast<char*>(kind == 1 ? host : pointer(device));
        return base + y * pitch + x_bytes;
    }
    bool legal(const Stream* stream, size_t width, size_t height) const {
        if ((kind != 1 && kind != 2) || (height > 1 && pitch < x_bytes + width)) {
            return false;
        }
        return kind == 1 || on_device(stream, start(), (height - 1) * pitch + width);
    }
};
struct Copy2d {
    Side from, to;
    size_t width, height;
};
static_assert(sizeof(Copy2d) == 128, "the layout of CUDA_MEMCPY2D");

int copy_2d(const Stream* stream, const Copy2d& copy) {
    if (copy.width == 0 || copy.height == 0) {
        return SUCCESS;
    }
    if (!copy.from.legal(stream, copy.width, copy.height) ||
        !copy.to.legal(stream, copy.width, copy.height)) {
        return INVALID_VALUE;
    }
    for (size_t row = 0; row < copy.height; row++) {
        memmove(copy.to.start() + row * copy.to.pitch, copy.from.start() + row * copy.from.pitch,
                copy.width);
    }
    return SUCCESS;
}

} // namespace

API int cuMemcpy2DAsync_v2(const Copy2d* copy, Stream* stream) {
    return issue_on(stream, "copy", [=, copy = *copy] { return copy_2d(stream, copy); });
}

API int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, Stream* stream) {
    return issue_on(stream, "fill", [=] {
        if (!on_device(stream, pointer(to), bytes)) {
            return INVALID_VALUE;
        }
        memset(pointer(to), value, bytes);
        return SUCCESS;
    });
}
