// What the files of libcuda.so.1 share: contexts, streams, and how a call is checked and issued.
#pragma once

#include "lanes.h"
#include "memory.h"

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace ferrotune_host {

enum Code : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    ECC_UNCORRECTABLE = 214,
    INVALID_PTX = 218,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    LAUNCH_TIMEOUT = 702,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURED_EVENT = 907,
    UNKNOWN = 999,
};

struct Device;

// The first fault; it sticks.
struct Fault {
    std::atomic<int> code{SUCCESS};
    // Remembers `failure` if it is a fault; returns it.
    int stick(int failure);
};

struct Context {
    Device* device;
    Fault fault{}; // damaged memory
    int users = 0;
    explicit Context(Device* device) : device(device) {}
};

struct Device {
    int ordinal;
    ferrotune_host::DeviceMemory memory;
    Context context{this};
    std::mutex mutex{};
    Device(int ordinal, size_t memory_limit) : ordinal(ordinal), memory(memory_limit) {}
};

// A fault of its work sticks to a stream alone. On a GPU it takes the whole process; here a test may
// break its own device while others use theirs.
struct Stream {
    Context* context;
    Fault fault{};
    std::shared_ptr<Graph> capture{}; // what is recorded, if it takes part in that
    size_t capture_lane = 0;
    Lane lane{};
    std::shared_ptr<Progress> progress = std::make_shared<Progress>();
    uint64_t waits = 0; // times somebody has waited for what was issued
};

extern std::vector<std::unique_ptr<Device>> devices;
extern int capability[2];
extern thread_local Context* current;

// Bytes of shared memory a block may ask for.
int shared_limit();

// Says it on standard error and to ferrotune_host_last_error.
void report(const std::string& text);

// Reads FERROTUNE_HOST_FAIL.
void read_injection();
// The code with which `operation` is to fail now, or SUCCESS.
int injected(const char* operation);

// What every call checks first.
int ready();
int ready(const Stream* stream);
// A call that waits or allocates breaks a capture.
int outside_capture(Stream* stream);
// Runs `work`, or records it while the stream is captured, or holds it back (`Order`).
int issue_on(Stream* stream, const char* operation, Work work);
// The same for what also is a point of the stream, or waits for one.
int issue_on(Stream* stream, const char* operation, Op op);
// Runs everything that is held back on a stream, or on all. Returns the first failure of it.
int finish(Stream* stream);
void finish_all();

inline bool on_device(const Stream* stream, const void* address, size_t bytes) {
    return stream->context->device->memory.holds(address, bytes);
}
inline void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

} // namespace ferrotune_host
