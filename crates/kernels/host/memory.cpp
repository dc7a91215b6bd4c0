#include "memory.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ferrotune_host {
namespace {

constexpr size_t ALIGNMENT = 256;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t GUARD = 0; // the sanitizer's red zones are better
#else
constexpr size_t GUARD = 256;
#endif
constexpr unsigned char GUARD_BYTE = 0xa5;
// Freed memory of this size and more goes back to the system, where a touch is a fault. So does all
// under the sanitizer, which knows better.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t LARGE = 0;
#else
constexpr size_t LARGE = 1 << 20;
#endif
constexpr size_t RETIRED = 32 << 20;

} // namespace

void* DeviceMemory::allocate(size_t bytes) {
    std::lock_guard lock(mutex_);
    void* block = nullptr;
    if (bytes == 0 || bytes > limit_ - used_ ||
        posix_memalign(&block, ALIGNMENT, bytes + 2 * GUARD) != 0) {
        return nullptr;
    }
    char* start = static_cast<char*>(block) + GUARD;
    memset(start - GUARD, GUARD_BYTE, GUARD);
    memset(start, POISON, bytes);
    memset(start + bytes, GUARD_BYTE, GUARD);
    live_[reinterpret_cast<uintptr_t>(start)] = bytes;
    used_ += bytes;
    return start;
}

bool DeviceMemory::release(void* address) {
    std::lock_guard lock(mutex_);
    auto found = live_.find(reinterpret_cast<uintptr_t>(address));
    if (found == live_.end()) {
        return false;
    }
    char* start = static_cast<char*>(address);
    const size_t bytes = found->second;
    if (damage_.empty()) {
        damage_ = check_guards(start, bytes);
    }
    live_.erase(found);
    used_ -= bytes;
    if (bytes < LARGE) {
        retire(start, bytes);
    } else {
        free(start - GUARD);
    }
    return true;
}

void DeviceMemory::retire(char* start, size_t bytes) {
    memset(start, POISON, bytes);
    retired_.emplace_back(start, bytes);
    retired_bytes_ += bytes;
    while (retired_bytes_ > RETIRED) {
        const auto [oldest, size] = retired_.front();
        retired_.pop_front();
        retired_bytes_ -= size;
        // All bytes are the poison if the first is and each equals the next.
        if (static_cast<unsigned char>(oldest[0]) != POISON ||
            memcmp(oldest, oldest + 1, size - 1) != 0) {
            damage_ = "an allocation of " + std::to_string(size) + " bytes was written after it was freed";
        }
        free(oldest - GUARD);
    }
}

bool DeviceMemory::holds(const void* address, size_t bytes) {
    std::lock_guard lock(mutex_);
    const auto at = reinterpret_cast<uintptr_t>(address);
    auto next = live_.upper_bound(at);
    if (next == live_.begin()) {
        return false;
    }
    const auto& [start, size] = *std::prev(next);
    return at - start <= size && bytes <= size - (at - start);
}

std::string DeviceMemory::damage() {
    std::lock_guard lock(mutex_);
    for (auto it = live_.begin(); it != live_.end() && damage_.empty(); ++it) {
        damage_ = check_guards(reinterpret_cast<char*>(it->first), it->second);
    }
    return std::exchange(damage_, "");
}

size_t DeviceMemory::used() {
    std::lock_guard lock(mutex_);
    return used_;
}

// Mends them, so that each damage is told once.
std::string DeviceMemory::check_guards(char* start, size_t bytes) const {
    for (size_t i = 0; i < GUARD; i++) {
        const bool before = static_cast<unsigned char>(start[-1 - static_cast<long>(i)]) != GUARD_BYTE;
        const bool after = static_cast<unsigned char>(start[bytes + i]) != GUARD_BYTE;
        if (before || after) {
            char text[160];
            snprintf(text, sizeof(text), "%zu bytes %s the allocation of %zu bytes at %p were written",
                     i + 1, before ? "before" : "behind", bytes, static_cast<void*>(start));
            memset(start - GUARD, GUARD_BYTE, GUARD);
            memset(start + bytes, GUARD_BYTE, GUARD);
            return text;
        }
    }
    return "";
}

} // namespace ferrotune_host
