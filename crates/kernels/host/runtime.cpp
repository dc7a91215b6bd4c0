#include "runtime.h"

#include "worker.h"

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace ferrotune_host {
namespace {

// A second OS thread that helps whichever launch finds it free.
class Helper {
  public:
    bool try_start(std::function<void(Worker&)> task);
    void wait();

  private:
    void loop();
    std::mutex mutex_;
    std::condition_variable changed_;
    std::function<void(Worker&)> task_;
    bool busy_ = false, done_ = false, started_ = false;
};

bool Helper::try_start(std::function<void(Worker&)> task) {
    std::lock_guard lock(mutex_);
    if (busy_) {
        return false;
    }
    busy_ = true;
    done_ = false;
    task_ = std::move(task);
    if (!started_) {
        started_ = true;
        std::thread([this] { loop(); }).detach();
    }
    changed_.notify_all();
    return true;
}

void Helper::wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return done_; });
    busy_ = false;
}

void Helper::loop() {
    Worker own;
    std::unique_lock lock(mutex_);
    while (true) {
        changed_.wait(lock, [this] { return static_cast<bool>(task_); });
        auto task = std::move(task_);
        task_ = nullptr;
        lock.unlock();
        task(own);
        lock.lock();
        done_ = true;
        changed_.notify_all();
    }
}

Helper& helper() {
    static auto* one = new Helper; // never destroyed: its thread may outlive main
    return *one;
}

u64 first_seed() {
    const char* text = getenv("FERROTUNE_HOST_SEED");
    return text != nullptr ? strtoull(text, nullptr, 10) : 1;
}

u32 common_divisor(u32 a, u32 b) { return b == 0 ? a : common_divisor(b, a % b); }

// Blocks in an order of the seed: the i-th is (first + i step) mod count.
struct Order {
    u32 count, first, step;
    Order(u32 blocks, u64 seed) : count(blocks) {
        Random random = {seed * 0xd1b54a32d192ed03ull | 1};
        random.below(1);
        first = random.below(count);
        step = 1 + random.below(count);
        while (common_divisor(step, count) != 1) {
            step++;
        }
    }
    u32 at(u32 i) const { return static_cast<u32>((first + static_cast<u64>(i) * step) % count); }
};

// Runs blocks of a launch until none is left or one failed.
struct Shared {
    const Launch& launch;
    const u64 seed;
    const Order order;
    const ThreadLocals locals;
    std::atomic<u32> taken{0};
    std::mutex mutex{};
    std::string error{};

    void work(Worker& own) {
        for (u32 i = taken++; i < order.count; i = taken++) {
            const u32 block = order.at(i);
            std::string reason = own.run_block(launch, locals, block, seed + 0x10001ull * block);
            if (!reason.empty()) {
                std::lock_guard lock(mutex);
                if (error.empty()) {
                    error = std::string(launch.name) + ": block " + std::to_string(block) + " of " +
                            std::to_string(order.count) + " (order of seed " + std::to_string(seed) +
                            "): " + reason;
                }
                taken = order.count;
                return;
            }
        }
    }
};

} // namespace

size_t static_shared(void* library) { return thread_locals(library).bytes; }

std::string run(const Launch& launch) {
    static std::atomic<u64> launches{0};
    const u64 blocks = static_cast<u64>(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    if (blocks == 0 || blocks > 0x7fffffff || launch.threads == 0 || launch.threads > 1024) {
        return std::string(launch.name) + ": impossible grid or block";
    }
    const u64 seed = first_seed() + launches++;
    Shared shared{launch, seed, Order(static_cast<u32>(blocks), seed),
                  thread_locals(launch.library)};
    static thread_local Worker own;
    const bool helped = blocks > 1 && helper().try_start([&](Worker& other) { shared.work(other); });
    shared.work(own);
    if (helped) {
        helper().wait();
    }
    return shared.error;
}

} // namespace ferrotune_host

