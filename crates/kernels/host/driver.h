// What the stand-ins of the driver, of cublasLt and of NCCL share.
#pragma once

#include <cstddef>
#include <functional>

namespace ferrotune_host {

#pragma GCC visibility push(default)

// Issues `work` on a stream: runs it, or records it while the stream is captured. `operation` is
// the name under which failures are injected. Returns a driver code.
int issue(void* stream, const char* operation, std::function<int()> work);

// Whether one allocation of the stream's device holds the range.
bool holds(void* stream, const void* address, size_t bytes);

// Says that work issued on a stream goes on after the call; calling the answer says that it ended.
// Ends count in the order of the stream.
std::function<void()> defer(void* stream);

#pragma GCC visibility pop

} // namespace ferrotune_host
