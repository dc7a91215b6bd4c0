// Error codes, their texts, and failures on request.
#include "state.h"

#include <cstdio>
#include <cstdlib>

using namespace ferrotune_host;

namespace {

struct CodeText {
    int code;
    const char *name, *text;
};
const CodeText CODES[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {ECC_UNCORRECTABLE, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {INVALID_PTX, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
     "too many resources requested for launch"},
    {LAUNCH_TIMEOUT, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED",
     "capture was not ended in the same stream as it began"},
    {CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

const CodeText* describe(int code) {
    for (const CodeText& entry : CODES) {
        if (entry.code == code) {
            return &entry;
        }
    }
    return nullptr;
}

// Faults after which a context is of no use.
bool is_sticky(int code) {
    return code == ECC_UNCORRECTABLE || code == ILLEGAL_ADDRESS || code == LAUNCH_TIMEOUT ||
           (code >= 709 && code <= LAUNCH_FAILED) || code == UNKNOWN;
}

// "OPERATION:AFTER:CODE": that operation fails with CODE after AFTER successes, once, or, with ":on"
// behind it, from then on. Operations: alloc, host, copy, fill, launch, gemm, graph,
// capture, load, sync, event.
struct Injection {
    std::string operation;
    long after = -1;
    int code = 0;
    bool goes_on = false;

    bool parse(const char* text) {
        char name[16], more[8] = "";
        const int parts = sscanf(text, "%15[a-z]:%ld:%d:%7s", name, &after, &code, more);
        goes_on = parts == 4;
        const bool whole = parts == 3 || (goes_on && std::string(more) == "on");
        operation = whole ? name : "";
        return whole;
    }
    // The code if `name` fails now.
    int take(const char* name) {
        if (after < 0 || operation != name) {
            return SUCCESS;
        }
        if (after > 0) {
            after--;
            return SUCCESS;
        }
        after = goes_on ? 0 : -1;
        return code;
    }
};

std::mutex injection_mutex;
Injection everywhere;               // from FERROTUNE_HOST_FAIL
thread_local Injection on_thread;   // from ferrotune_host_inject

thread_local std::string last_error;

} // namespace

namespace ferrotune_host {

void report(const std::string& text) {
    last_error = text;
    fprintf(stderr, "ferrotune host: %s\n", text.c_str());
}

void read_injection() {
    const char* text = getenv("FERROTUNE_HOST_FAIL");
    if (text != nullptr && !everywhere.parse(text)) {
        report("FERROTUNE_HOST_FAIL is OPERATION:AFTER:CODE, or that and :on");
    }
}

int injected(const char* operation) {
    if (int code = on_thread.take(operation)) {
        return code;
    }
    std::lock_guard lock(injection_mutex);
    return everywhere.take(operation);
}

int Fault::stick(int failure) {
    if (is_sticky(failure)) {
        int none = SUCCESS;
        code.compare_exchange_strong(none, failure);
    }
    return failure;
}

} // namespace ferrotune_host

// For tests: makes an operation of the calling thread fail, see Injection. Returns 0, or 1 if the
// text is not understood.
API int ferrotune_host_inject(const char* text) { return on_thread.parse(text) ? 0 : 1; }
// The last message of the calling thread.
API const char* ferrotune_host_last_error() { return last_error.c_str(); }

API int cuGetErrorName(int code, const char** text) {
    const CodeText* found = describe(code);
    *text = found != nullptr ? found->name : nullptr;
    return found != nullptr ? SUCCESS : INVALID_VALUE;
}

API int cuGetErrorString(int code, const char** text) {
    const CodeText* found = describe(code);
    *text = found != nullptr ? found->text : nullptr;
    return found != nullptr ? SUCCESS : INVALID_VALUE;
}
