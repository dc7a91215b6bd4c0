// Runs one block: its threads as fibers on one OS thread.
#pragma once

#include "runtime.h"

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "types.cuh"

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
    void* fake_stack; // of the address sanitizer
};

struct Warp {
    const char* operation;
    u32 arrived;
    u32 turn; // which half of `slots` the next operation uses: nobody still reads it
    HostSlot slots[2][32];
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

    Fiber* current = nullptr;

  private:
    void prepare(const Launch& launch, u32 block);
    void poison_shared();
    void check_margin();
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
    u32 waiting_ = 0, exited_ = 0;
    int barrier_line_ = 0;
    std::string error_;
    void* main_stack_pointer_ = nullptr;
    void* main_fake_stack_ = nullptr;
    const void* main_stack_ = nullptr;
    size_t main_stack_size_ = 0;
};

} // namespace ferrotune_host
