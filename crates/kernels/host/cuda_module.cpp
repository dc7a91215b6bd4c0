// Kernel libraries: loading them from memory, finding kernels, launching.
#include "runtime.h"
#include "state.h"

#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <elf.h>
#include <map>
#include <sys/mman.h>
#include <unistd.h>

using namespace ferrotune_host;

namespace {

struct Module {
    Context* context;
    void* library;
    std::map<std::string, std::unique_ptr<struct Function>> functions{};
    std::mutex mutex{};
};

struct Function {
    Module* module;
    std::string name;
    void (*kernel)(const void*);
    uint32_t params, threads;
    int dynamic_limit = 48 << 10;
};

// Bytes of an ELF image: its section headers come last.
size_t image_size(const void* image) {
    Elf64_Ehdr header;
    memcpy(&header, image, sizeof(header));
    return header.e_shoff + static_cast<size_t>(header.e_shnum) * header.e_shentsize;
}

bool is_host_library(const void* image) {
    if (memcmp(image, ELFMAG, SELFMAG) != 0) {
        return false;
    }
    Elf64_Ehdr header;
    memcpy(&header, image, sizeof(header));
#if defined(__x86_64__)
    constexpr int machine = EM_X86_64;
#else
    constexpr int machine = EM_AARCH64;
#endif
    return header.e_ident[EI_CLASS] == ELFCLASS64 && header.e_type == ET_DYN &&
           header.e_machine == machine;
}

// Opens a library that is in memory. The file descriptor stays open, so that no second library gets
// the same path, by which the loader would take it for the first.
void* open_image(const void* image) {
    const int file = memfd_create("ferrotune-kernels", MFD_CLOEXEC);
    size_t size = image_size(image);
    const char* bytes = static_cast<const char*>(image);
    while (file >= 0 && size > 0) {
        const ssize_t written = write(file, bytes, size);
        if (written <= 0) {
            return nullptr;
        }
        bytes += written;
        size -= static_cast<size_t>(written);
    }
    const std::string path = "/proc/self/fd/" + std::to_string(file);
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        report(dlerror());
    }
    return library;
}

} // namespace

API int cuModuleLoadData(Module** module, const void* image) {
    if (const int code = ready()) {
        return code;
    }
    if (const int code = injected("load")) {
        return current->fault.stick(code);
    }
    if (!is_host_library(image)) {
        return memcmp(image, ELFMAG, SELFMAG) == 0 ? INVALID_IMAGE : INVALID_PTX;
    }
    void* library = open_image(image);
    if (library == nullptr) {
        return INVALID_IMAGE;
    }
    *module = new Module{current, library};
    return SUCCESS;
}

// The library stays: its thread-local variables may be in use.
API int cuModuleUnload(Module* module) {
    delete module;
    return SUCCESS;
}

API int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    if (const int code = ready()) {
        return code;
    }
    std::lock_guard lock(module->mutex);
    auto& found = module->functions[name];
    if (found == nullptr) {
        const std::string text = name;
        auto* kernel = reinterpret_cast<void (*)(const void*)>(dlsym(module->library, name));
        auto* params = static_cast<uint32_t*>(dlsym(module->library, (text + "_params").c_str()));
        auto* threads = static_cast<uint32_t*>(dlsym(module->library, (text + "_threads").c_str()));
        if (kernel == nullptr || params == nullptr || threads == nullptr) {
            module->functions.erase(name);
            return NOT_FOUND;
        }
        found = std::make_unique<Function>(Function{module, text, kernel, *params, *threads});
        // Unasked, static and dynamic shared memory share 48 KiB. What is static is known of the whole
        // module alone, so this asks for more room than a kernel needs, up to 16 KiB.
        const size_t fixed = ferrotune_host::static_shared(module->library);
        found->dynamic_limit -= static_cast<int>(fixed < (16u << 10) ? fixed : (16u << 10));
    }
    *function = found.get();
    return SUCCESS;
}

API int cuFuncSetAttribute(Function* function, int attribute, int value) {
    if (const int code = ready()) {
        return code;
    }
    if (attribute != 8 || value < 0 || value > shared_limit()) {
        return INVALID_VALUE;
    }
    function->dynamic_limit = value;
    return SUCCESS;
}

API int cuFuncGetAttribute(int* value, int attribute, Function* function) {
    if (const int code = ready()) {
        return code;
    }
    switch (attribute) {
    case 0: // threads per block
        *value = static_cast<int>(function->threads);
        return SUCCESS;
    case 1: // static shared memory; that of all kernels of the module
        *value = static_cast<int>(ferrotune_host::static_shared(function->module->library));
        return SUCCESS;
    case 8: // dynamic shared memory
        *value = function->dynamic_limit;
        return SUCCESS;
    default:
        return INVALID_VALUE;
    }
}

API int cuFuncGetParamInfo(Function* function, size_t index, size_t* offset, size_t* size) {
    if (index != 0) {
        return INVALID_VALUE;
    }
    *offset = 0;
    *size = function->params;
    return SUCCESS;
}

API int cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                       unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                       Stream* stream, void** params, void** extra) {
    if (const int code = ready(stream)) {
        return code;
    }
    if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_x > 0x7fffffff || grid_y > 65535 ||
        grid_z > 65535 || block_x == 0 || block_y != 1 || block_z != 1 || extra != nullptr ||
        shared > static_cast<unsigned>(function->dynamic_limit)) {
        return INVALID_VALUE;
    }
    if (block_x > function->threads) {
        return LAUNCH_OUT_OF_RESOURCES;
    }
    // Aligned as far as the struct of any kernel.
    constexpr size_t ALIGNMENT = 64;
    const size_t bytes = (function->params + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const std::shared_ptr<void> copied(std::aligned_alloc(ALIGNMENT, bytes), free);
    memcpy(copied.get(), params[0], function->params);
    return issue_on(stream, "launch", [=] {
        ferrotune_host::Launch launch;
        launch.name = function->name.c_str();
        launch.kernel = function->kernel;
        launch.params = copied.get();
        launch.grid[0] = grid_x;
        launch.grid[1] = grid_y;
        launch.grid[2] = grid_z;
        launch.threads = block_x;
        launch.shared = shared;
        launch.library = function->module->library;
        const std::string error = ferrotune_host::run(launch);
        if (!error.empty()) {
            report(error);
            stream->fault.stick(LAUNCH_FAILED);
        }
        return SUCCESS;
    });
}
