// Runs one block: its threads as fibers on one OS thread.
#pragma once

#include "runtime.h"

#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "types.cuh"
#include "wgmma.h"

namespace ferrotune_host {

struct PendingCopy {
    void* to;
    const void* from;
    u32 valid, group;
};

enum class State : u8 { ready, barrier, team, warp, exited };

// One CUDA thread. `view` is what the kernel sees.
struct Fiber {
    HostThread view;
    void* stack_pointer;
    char* stack; // lowest usable byte
    State state;
    u32 index;
    u32 group; // of cp.async, counted up at each commit
    std::vector<PendingCopy> copies;
    std::vector<u32> unfenced; // 16-byte places of shared memory that it wrote
    void* fake_stack; // of the address sanitizer
};

class Worker;

// Products of a warpgroup that a warp has under way.
struct Products {
    struct Product {
        u32 warp, group;
        bool made;
        std::vector<HostWgmma> lanes;
    };
    std::vector<Product> pending;
    std::map<const f32*, std::vector<f32>> sums; // by the first lane's, what their results will be
    u32 group = 0;
    bool fenced = false;

    void begin(Worker& worker, u32 warp, const HostSlot* slots);
    void wait(Worker& worker, u32 groups);

  private:
    void make(Worker& worker, Product& product);
};

struct Warp {
    const char* operation;
    u32 arrived;
    u32 turn; // which half of `slots` the next operation uses: nobody still reads it
    HostSlot slots[2][32];
    Products products;
};

struct Random {
    u64 state;
    u32 below(u32 n) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return static_cast<u32>(((state >> 32) * n) >> 32);
    }
};

// A library's thread-local variables; in a kernel library these are the SHARED ones.
struct ThreadLocals {
    size_t module = 0, bytes = 0;
};

ThreadLocals thread_locals(void* library);

// What one OS thread needs to run a block.
class Worker {
  public:
    ~Worker();
    // Empty, or why the block was ended.
    std::string run_block(const Launch& launch, const ThreadLocals& locals, u32 block, u64 seed);

    void barrier(int line);
    void team_barrier(u32 team, u32 threads);
    const HostSlot* warp(const char* name, const void* mine, u32 bytes, void (*combine)(HostSlot*));
    [[noreturn]] void fail(const std::string& reason);
    [[noreturn]] void body();

    // Those of the calling warp.
    Products& products() { return warps_[current->index / 32].products; }
    u8* dynamic_shared() const { return shared_; }
    u32 draw(u32 below) { return random_.below(below); }
    // Shared memory that a thread wrote by cp.async is not there for products of a warpgroup before its fence.
    void wrote_shared(const void* to);
    void fence_async_shared();
    void check_async_read(u64 address);

    Fiber* current = nullptr;

  private:
    void prepare(const Launch& launch, u32 block);
    void poison_shared();
    void check_margin();
    void check_products();
    void next();
    void go_to(Fiber* from, Fiber* to);
    void make_ready(State waiting, u32 first, u32 last);
    void release_barrier();
    std::string stuck() const;

    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<Warp> warps_;
    std::vector<u32> ready_;
    Random random_ = {1};
    const Launch* launch_ = nullptr;
    ThreadLocals locals_;
    std::unique_ptr<u8, decltype(&free)> dynamic_{nullptr, free};
    u8* shared_ = nullptr;     // within it
    std::vector<u32> unfenced_; // per 16 bytes, the thread that wrote it, counted from 1
    u32 waiting_ = 0, exited_ = 0;
    int barrier_line_ = 0;
    std::string error_;
    void* main_stack_pointer_ = nullptr;
    void* main_fake_stack_ = nullptr;
    const void* main_stack_ = nullptr;
    size_t main_stack_size_ = 0;
};

// That of the block that runs on this OS thread.
Worker* current_worker();

} // namespace ferrotune_host
