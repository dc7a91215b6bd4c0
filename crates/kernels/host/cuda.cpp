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
    std::shared_ptr<Mark> mark{};   // where it was recorded last
    std::weak_ptr<Graph> captured{}; // in which graph, if in one
    bool in_graph = false;
    Stream* stream = nullptr; // on which it was recorded last
    uint64_t waits = 0;       // of the stream before that
    int queries = 0;          // since then
};

// A slow device: it has passed what somebody has waited for, or asked for often, and nothing else.
constexpr int PATIENT_QUERIES = 20;

bool has_passed(const Event* event) {
    return event->stream == nullptr || event->stream->waits > event->waits;
}

bool reached(const Mark& mark) {
    return mark.passed && (mark.progress == nullptr || mark.progress->done.load() >= mark.after);
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
int capability[2] = {9, 0};
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

// The streams whose work is held back.
Lanes& held_back() {
    static Lanes lanes;
    return lanes;
}

// Runs what comes before a point that is held back.
void pass(const Mark& mark) {
    if (order() != Order::ISSUED) {
        std::lock_guard lock(lanes_mutex());
        held_back().pass(mark);
    }
    if (mark.progress != nullptr) {
        wait_until(*mark.progress, mark.after);
    }
}

int finish(Stream* stream) {
    if (order() == Order::ISSUED) {
        return SUCCESS;
    }
    std::lock_guard lock(lanes_mutex());
    const int code = held_back().finish(stream->lane);
    if (code != SUCCESS) {
        int none = SUCCESS;
        stream->fault.code.compare_exchange_strong(none, code);
    }
    return stream->fault.code;
}

void finish_all() {
    if (order() != Order::ISSUED) {
        std::lock_guard lock(lanes_mutex());
        held_back().finish_each();
    }
}

int outside_capture(Stream* stream) {
    if (const int code = ready(stream)) {
        return code;
    }
    if (stream->capture != nullptr) {
        stream->capture->broken = true;
        return CAPTURE_UNSUPPORTED;
    }
    return SUCCESS;
}

int issue_on(Stream* stream, const char* operation, Work work) {
    return issue_on(stream, operation, Op{.work = std::move(work)});
}

int issue_on(Stream* stream, const char* operation, Op op) {
    if (const int code = ready(stream)) {
        return code;
    }
    if (stream->capture != nullptr) {
        stream->capture->nodes.push_back({stream->capture_lane, std::move(op)});
        return SUCCESS;
    }
    if (const int code = injected(operation)) {
        return stream->fault.stick(code);
    }
    if (order() != Order::ISSUED) {
        std::lock_guard lock(lanes_mutex());
        if (op.marks) {
            op.marks->lane = &stream->lane;
        }
        stream->lane.ops.push_back(std::move(op));
        return SUCCESS;
    }
    const int code = op.work ? op.work() : static_cast<int>(SUCCESS);
    if (op.marks) {
        op.marks->passed = true;
    }
    return stream->fault.stick(code);
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
    *version = static_cast<int>(number("FERROTUNE_HOST_DRIVER", 13000));
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
    std::lock_guard lock(lanes_mutex());
    held_back().add(&(*stream)->lane);
    return SUCCESS;
}

// What is held back ends first.
API int cuStreamDestroy_v2(Stream* stream) {
    finish(stream);
    {
        std::lock_guard lock(lanes_mutex());
        held_back().remove(&stream->lane);
    }
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
    const int code = finish(stream);
    wait_until(*stream->progress, stream->progress->issued);
    stream->waits++;
    const int damage = check_memory(stream->context);
    return code != SUCCESS ? code : damage;
}

// To wait for a point of a stream that is recorded is to take part in the recording.
API int cuStreamWaitEvent(Stream* stream, const Event* event, unsigned) {
    if (const int code = ready(stream)) {
        return code;
    }
    const std::shared_ptr<Mark> mark = event->mark;
    if (mark == nullptr) {
        return SUCCESS;
    }
    if (event->in_graph) {
        const std::shared_ptr<Graph> graph = event->captured.lock();
        if (graph == nullptr || (stream->capture != nullptr && stream->capture != graph)) {
            return CAPTURED_EVENT;
        }
        if (stream->capture == nullptr) {
            stream->capture = graph;
            stream->capture_lane = graph->lanes++;
            graph->streams.push_back(stream);
        }
        return issue_on(stream, "event", Op{.waits = mark});
    }
    if (stream->capture != nullptr) {
        stream->capture->broken = true;
        return CAPTURE_ISOLATION;
    }
    const auto wait = [mark] {
        if (mark->progress != nullptr) {
            wait_until(*mark->progress, mark->after);
        }
        return static_cast<int>(SUCCESS);
    };
    return issue_on(stream, "event", Op{.work = wait, .waits = mark});
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
    if (const int code = ready(stream)) {
        return code;
    }
    const auto mark = std::make_shared<Mark>();
    Op op{.marks = mark};
    if (stream->capture == nullptr) {
        Mark* at = mark.get();
        op.work = [at, stream] {
            at->at = std::chrono::steady_clock::now();
            at->progress = stream->progress;
            at->after = stream->progress->issued;
            return static_cast<int>(SUCCESS);
        };
    }
    if (const int code = issue_on(stream, "event", std::move(op))) {
        return code;
    }
    *event = {mark, stream->capture, stream->capture != nullptr, stream, stream->waits, 0};
    return SUCCESS;
}

API int cuEventQuery(Event* event) {
    if (const int code = ready()) {
        return code;
    }
    if (event->in_graph) {
        return CAPTURED_EVENT;
    }
    const bool held = event->mark != nullptr && !event->mark->passed;
    if (event->mark != nullptr && !held && !reached(*event->mark)) {
        return NOT_READY;
    }
    if (held || !has_passed(event)) {
        if (++event->queries < PATIENT_QUERIES) {
            return NOT_READY;
        }
        if (held) {
            pass(*event->mark);
        }
        event->stream->waits++;
    }
    return SUCCESS;
}

API int cuEventSynchronize(const Event* event) {
    if (event->in_graph) {
        return CAPTURED_EVENT;
    }
    if (event->mark != nullptr) {
        pass(*event->mark);
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
    if (from->mark == nullptr || to->mark == nullptr || from->in_graph || to->in_graph) {
        return INVALID_HANDLE;
    }
    if (!from->mark->passed || !to->mark->passed) {
        return NOT_READY;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(to->mark->at - from->mark->at).count();
    return SUCCESS;
}

API int cuStreamBeginCapture_v2(Stream* stream, int) {
    if (const int code = outside_capture(stream)) {
        return code;
    }
    if (const int code = injected("capture")) {
        return code;
    }
    stream->capture = std::make_shared<Graph>();
    stream->capture_lane = 0;
    stream->capture->streams.push_back(stream);
    return SUCCESS;
}

API int cuStreamEndCapture(Stream* stream, Graph** graph) {
    if (stream == nullptr || stream->capture == nullptr) {
        return INVALID_VALUE;
    }
    const std::shared_ptr<Graph> captured = stream->capture;
    for (Stream* part : captured->streams) {
        part->capture = nullptr;
    }
    captured->streams.clear();
    *graph = nullptr;
    if (const int code = ready(stream)) {
        return code;
    }
    if (captured->broken) {
        return CAPTURE_INVALIDATED;
    }
    if (!captured->joined()) {
        return CAPTURE_UNJOINED;
    }
    *graph = new Graph(*captured);
    return SUCCESS;
}

API int cuGraphInstantiateWithFlags(Graph** executable, const Graph* graph, unsigned long long) {
    if (const int code = ready()) {
        return code;
    }
    *executable = new Graph(*graph);
    return SUCCESS;
}

API int cuGraphLaunch(const Graph* graph, Stream* stream) {
    // The graph may be destroyed before it has run.
    return issue_on(stream, "graph", [copy = std::make_shared<Graph>(*graph), stream] {
        return copy->run([stream] { return stream->fault.code != SUCCESS; });
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
