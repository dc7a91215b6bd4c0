// libcuda.so.1: the driver calls of src/cuda, on the CPU. A launch is over when it returns; its
// failure shows in the next call, as on a device. Here: devices, contexts, streams, events, graphs;
// beside it cuda_memory.cpp, cuda_module.cpp and cuda_error.cpp.
#include "driver.h"
#include "state.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

using namespace ferrotune_host;

namespace {

struct Event {
    std::chrono::steady_clock::time_point at{};
    bool recorded = false;
    // What was issued on its stream before it.
    std::shared_ptr<Progress> progress{};
    uint64_t after = 0;
    Stream* stream = nullptr; // on which it was recorded last
    uint64_t waits = 0;       // of the stream before that
    int queries = 0;          // since then

    bool reached() const { return progress == nullptr || progress->done.load() >= after; }
};

// A slow device: it has passed what somebody has waited for, or asked for often, and nothing else.
constexpr int PATIENT_QUERIES = 20;

bool has_passed(const Event* event) {
    return event->stream == nullptr || event->stream->waits > event->waits;
}

void wait_until(const Progress& progress, uint64_t done) {
    while (progress.done.load() < done) {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
}

size_t number(const char* variable, size_t otherwise) {
    const char* text = getenv(variable);
    return text != nullptr && *text != 0 ? strtoull(text, nullptr, 10) : otherwise;
}

// What was written outside of an allocation shows here at the latest.
int check_memory(Context* context) {
    const std::string damage = context->device->memory.damage();
    if (!damage.empty()) {
        report(damage);
        return context->fault.stick(ILLEGAL_ADDRESS);
    }
    return SUCCESS;
}

} // namespace

namespace ferrotune_host {

std::vector<std::unique_ptr<Device>> devices;
int capability[2] = {8, 0};
thread_local Context* current = nullptr;

int ready() {
    if (devices.empty()) {
        return NOT_INITIALIZED;
    }
    return current == nullptr ? static_cast<int>(INVALID_CONTEXT) : current->fault.code.load();
}

int ready(const Stream* stream) {
    const int code = ready();
    if (code != SUCCESS) {
        return code;
    }
    return stream == nullptr ? static_cast<int>(INVALID_HANDLE) : stream->fault.code.load();
}

int outside_capture(Stream* stream) {
    if (const int code = ready(stream)) {
        return code;
    }
    if (stream->capture != nullptr) {
        stream->capture_broken = true;
        return CAPTURE_UNSUPPORTED;
    }
    return SUCCESS;
}

int issue_on(Stream* stream, const char* operation, Work work) {
    if (const int code = ready(stream)) {
        return code;
    }
    if (stream->capture != nullptr) {
        stream->capture->nodes.push_back(std::move(work));
        return SUCCESS;
    }
    if (const int code = injected(operation)) {
        return stream->fault.stick(code);
    }
    return stream->fault.stick(work());
}

int shared_limit() {
    switch (10 * capability[0] + capability[1]) {
    case 80:
    case 87:
        return 163 << 10;
    case 90:
    case 100:
    case 103:
        return 227 << 10;
    default:
        return 99 << 10;
    }
}

int issue(void* stream, const char* operation, std::function<int()> work) {
    return issue_on(static_cast<Stream*>(stream), operation, std::move(work));
}

bool holds(void* stream, const void* address, size_t bytes) {
    return on_device(static_cast<Stream*>(stream), address, bytes);
}

std::function<void()> defer(void* stream) {
    auto progress = static_cast<Stream*>(stream)->progress;
    progress->issued++;
    return [progress] { progress->done++; };
}

} // namespace ferrotune_host

API int cuInit(unsigned) {
    static std::once_flag once;
    std::call_once(once, [] {
        if (const char* text = getenv("FERROTUNE_HOST_CAPABILITY")) {
            sscanf(text, "%d.%d", &capability[0], &capability[1]);
        }
        read_injection();
        const size_t memory = number("FERROTUNE_HOST_MEMORY", size_t(4) << 30);
        const int count = static_cast<int>(number("FERROTUNE_HOST_DEVICES", 1));
        for (int i = 0; i < count; i++) {
            devices.push_back(std::make_unique<Device>(i, memory));
        }
    });
    return SUCCESS;
}

API int cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}

API int cuDeviceGetCount(int* count) {
    *count = static_cast<int>(devices.size());
    return devices.empty() ? NOT_INITIALIZED : SUCCESS;
}

API int cuDeviceGet(int* device, int ordinal) {
    if (ordinal < 0 || static_cast<size_t>(ordinal) >= devices.size()) {
        return INVALID_DEVICE;
    }
    *device = ordinal;
    return SUCCESS;
}

API int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, static_cast<size_t>(length), "ferrotune host stand-in");
    return SUCCESS;
}

API int cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
    case 1: // threads per block
        *value = 1024;
        return SUCCESS;
    case 10: // warp size
        *value = 32;
        return SUCCESS;
    case 16: // multiprocessors
        *value = 8;
        return SUCCESS;
    case 33: // PCI bus
        *value = device;
        return SUCCESS;
    case 34: // PCI device
    case 50: // PCI domain
        *value = 0;
        return SUCCESS;
    case 75:
    case 76: // compute capability
        *value = capability[attribute - 75];
        return SUCCESS;
    case 97: // shared memory per block, opted in
        *value = shared_limit();
        return SUCCESS;
    case 115: // memory pools
        *value = 1;
        return SUCCESS;
    default:
        return INVALID_VALUE;
    }
}

API int cuDevicePrimaryCtxRetain(Context** context, int ordinal) {
    if (ordinal < 0 || static_cast<size_t>(ordinal) >= devices.size()) {
        return devices.empty() ? NOT_INITIALIZED : INVALID_DEVICE;
    }
    Device& device = *devices[static_cast<size_t>(ordinal)];
    std::lock_guard lock(device.mutex);
    if (device.context.users++ == 0) {
        device.context.fault.code = SUCCESS;
    }
    *context = &device.context;
    return SUCCESS;
}

API int cuDevicePrimaryCtxRelease_v2(int ordinal) {
    if (ordinal < 0 || static_cast<size_t>(ordinal) >= devices.size()) {
        return INVALID_DEVICE;
    }
    Device& device = *devices[static_cast<size_t>(ordinal)];
    std::lock_guard lock(device.mutex);
    if (device.context.users == 0) {
        return INVALID_CONTEXT;
    }
    device.context.users--;
    return SUCCESS;
}

API int cuCtxSetCurrent(Context* context) {
    current = context;
    return SUCCESS;
}

API int cuStreamCreate(Stream** stream, unsigned) {
    if (const int code = ready()) {
        return code;
    }
    *stream = new Stream{current};
    return SUCCESS;
}

API int cuStreamDestroy_v2(Stream* stream) {
    delete stream;
    return SUCCESS;
}

API int cuStreamSynchronize(Stream* stream) {
    if (const int code = outside_capture(stream)) {
        return code;
    }
    if (const int code = injected("sync")) {
        return stream->fault.stick(code);
    }
    wait_until(*stream->progress, stream->progress->issued);
    stream->waits++;
    return check_memory(stream->context);
}

API int cuStreamWaitEvent(Stream* stream, const Event* event, unsigned) {
    return issue_on(stream, "event", [=] {
        if (event->progress != nullptr) {
            wait_until(*event->progress, event->after);
        }
        return SUCCESS;
    });
}

API int cuDeviceGetDefaultMemPool(void** pool, int ordinal) {
    if (ordinal < 0 || static_cast<size_t>(ordinal) >= devices.size()) {
        return INVALID_DEVICE;
    }
    *pool = devices[static_cast<size_t>(ordinal)].get();
    return SUCCESS;
}

API int cuEventCreate(Event** event, unsigned) {
    if (const int code = ready()) {
        return code;
    }
    *event = new Event;
    return SUCCESS;
}

API int cuEventDestroy_v2(Event* event) {
    delete event;
    return SUCCESS;
}

API int cuEventRecord(Event* event, Stream* stream) {
    return issue_on(stream, "event", [=] {
        event->at = std::chrono::steady_clock::now();
        event->recorded = true;
        event->progress = stream->progress;
        event->after = stream->progress->issued;
        event->stream = stream;
        event->waits = stream->waits;
        event->queries = 0;
        return SUCCESS;
    });
}

API int cuEventQuery(Event* event) {
    if (const int code = ready()) {
        return code;
    }
    if (!event->reached()) {
        return NOT_READY;
    }
    if (!has_passed(event)) {
        if (++event->queries < PATIENT_QUERIES) {
            return NOT_READY;
        }
        event->stream->waits++;
    }
    return SUCCESS;
}

API int cuEventSynchronize(const Event* event) {
    if (event->progress != nullptr) {
        wait_until(*event->progress, event->after);
    }
    if (const int code = ready()) {
        return code;
    }
    if (!has_passed(event)) {
        event->stream->waits++;
    }
    return SUCCESS;
}

API int cuEventElapsedTime(float* milliseconds, Event* from, Event* to) {
    if (const int code = ready()) {
        return code;
    }
    if (!from->recorded || !to->recorded) {
        return INVALID_HANDLE;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count();
    return SUCCESS;
}

API int cuStreamBeginCapture_v2(Stream* stream, int) {
    if (const int code = outside_capture(stream)) {
        return code;
    }
    if (const int code = injected("capture")) {
        return code;
    }
    stream->capture = std::make_unique<Graph>();
    stream->capture_broken = false;
    return SUCCESS;
}

API int cuStreamEndCapture(Stream* stream, Graph** graph) {
    if (stream == nullptr || stream->capture == nullptr) {
        return INVALID_VALUE;
    }
    auto captured = std::move(stream->capture);
    if (const int code = ready(stream)) {
        return code;
    }
    *graph = stream->capture_broken ? nullptr : captured.release();
    return *graph != nullptr ? SUCCESS : CAPTURE_INVALIDATED;
}

API int cuGraphInstantiateWithFlags(Graph** executable, const Graph* graph, unsigned long long) {
    if (const int code = ready()) {
        return code;
    }
    *executable = new Graph(*graph);
    return SUCCESS;
}

API int cuGraphLaunch(const Graph* graph, Stream* stream) {
    return issue_on(stream, "graph", [=] {
        for (const Work& node : graph->nodes) {
            const int code = node();
            if (code != SUCCESS) {
                return code;
            }
            if (stream->fault.code != SUCCESS) {
                break;
            }
        }
        return static_cast<int>(SUCCESS);
    });
}

API int cuGraphDestroy(Graph* graph) {
    delete graph;
    return SUCCESS;
}

API int cuGraphExecDestroy(Graph* graph) {
    delete graph;
    return SUCCESS;
}
