// Runs a kernel on the host: each CUDA thread is a fiber.
#pragma once

#include <cstddef>
#include <string>

namespace ferrotune_host {

struct Launch {
    const char* name = "kernel";
    void (*kernel)(const void* params) = nullptr;
    const void* params = nullptr;
    unsigned grid[3] = {1, 1, 1};
    unsigned threads = 32;
    unsigned shared = 0;      // bytes of dynamic shared memory
    void* library = nullptr;  // dlopen handle whose SHARED variables are poisoned before each block
};

// Bytes of the SHARED variables of a kernel library.
size_t static_shared(void* library);

// Runs all blocks. Returns an empty string, or why the launch was ended.
std::string run(const Launch& launch);

} // namespace ferrotune_host
