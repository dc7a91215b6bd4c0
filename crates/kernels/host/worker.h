// Runs one block: its threads as fibers on one OS thread.
#pragma once

#include "runtime.h"

#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tensor_map.h"
#include "types.cuh"
#include "wgmma.h"

namespace ferrotune_host {

struct PendingCopy {
    void* to;
    const void* from;
    u32 valid, group;
};

enum class State : u8 { ready, barrier, team, mbarrier, warp, exited };

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
    const u64* mbarrier;       // at which it waits
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

// A barrier of shared memory that counts arrivals and bytes.
struct Mbarrier {
    u32 arrivals; // of each phase
    u32 missing;  // of the phase under way
    i64 bytes;    // expected and not come
    u32 phase;
    u32 copied, waited; // phases that copies count for, and that somebody has waited for
    u32 unfenced;       // the thread that made it, counted from 1, until its fence
};

// A box on its way to shared memory.
struct BoxCopy {
    u64 to;
    u32 at[3];
    HostTensorMap map;
    u64* barrier;
    u32 bytes() const { return 2u * map.box[0] * map.box[1] * map.box[2]; }
};

// The barriers of a block, and what they count.
class Boxes {
  public:
    void init(Worker& worker, u64* at, u32 arrivals);
    void expect(Worker& worker, u64* at, u32 bytes);
    void arrive(Worker& worker, u64* at);
    void wait(Worker& worker, u64* at, u32 parity);
    void begin(Worker& worker, BoxCopy copy, const void* map);
    // What `thread` made is there for copies.
    void fence(u32 thread);
    // What a phase waits for, in words.
    std::string missing(const u64* at) const;
    // Whether there are copies that nobody has waited for.
    bool left() const;
    void clear();

  private:
    Mbarrier& find(Worker& worker, const u64* at, const char* what);
    void count(Worker& worker, u64* at, Mbarrier& barrier, u32 arrivals, i64 bytes);
    void make(Worker& worker, const BoxCopy& copy);
    std::map<const u64*, Mbarrier> barriers;
    std::vector<BoxCopy> pending;
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
    Boxes& boxes() { return boxes_; }
    u8* dynamic_shared() const { return shared_; }
    u32 draw(u32 below) { return random_.below(below); }
    // Shared memory that a thread wrote is not there for products of a warpgroup, or free for copies of boxes,
    // before its fence; what a copy brings is not there before its end.
    void wrote_shared(const void* to);
    void fence_async_shared();
    void check_async_read(u64 address);
    void begin_async_write(u64 address, u32 bytes);
    void end_async_write(u64 address, u32 bytes);
    void block_at_mbarrier(const u64* at);
    void release_mbarrier(const u64* at);

    Fiber* current = nullptr;

  private:
    void prepare(const Launch& launch, u32 block);
    void poison_shared();
    void check_margin();
    void check_products();
    void check_boxes();
    void next();
    void go_to(Fiber* from, Fiber* to);
    void make_ready(State waiting, u32 first, u32 last);
    void release_barrier();
    std::string stuck() const;

    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<Warp> warps_;
    Boxes boxes_;
    std::vector<u32> ready_;
    Random random_ = {1};
    const Launch* launch_ = nullptr;
    ThreadLocals locals_;
    std::unique_ptr<u8, decltype(&free)> dynamic_{nullptr, free};
    u8* shared_ = nullptr;     // within it
    std::vector<u32> unfenced_; // per 16 bytes, the thread that wrote it, counted from 1, or COPYING
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
