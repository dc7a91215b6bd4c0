// The memory of a stand-in device: host memory between guards, with a limit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace ferrotune_host {

// Fills what was never written and what was freed: a NaN in every float type.
constexpr int POISON = 0xff;

class DeviceMemory {
  public:
    explicit DeviceMemory(size_t limit) : limit_(limit) {}

    // A poisoned allocation aligned to 256, or null when the limit is reached.
    void* allocate(size_t bytes);
    // False if `address` is not the start of an allocation.
    bool release(void* address);
    // Whether one allocation holds the whole range.
    bool holds(const void* address, size_t bytes);
    // Empty, or what was written outside of an allocation; told once.
    std::string damage();

    size_t limit() const { return limit_; }
    size_t used();

  private:
    std::string check_guards(char* start, size_t bytes) const;
    void retire(char* start, size_t bytes);

    const size_t limit_;
    size_t used_ = 0;
    std::map<uintptr_t, size_t> live_;
    // Freed and poisoned, oldest first: what writes there is found, and addresses do not come back
    // at once.
    std::deque<std::pair<char*, size_t>> retired_;
    size_t retired_bytes_ = 0;
    std::string damage_;
    std::mutex mutex_;
};

} // namespace ferrotune_host
