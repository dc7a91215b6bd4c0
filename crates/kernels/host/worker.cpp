#include "worker.h"

#include "context.h"
#include "memory.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace ferrotune_host {
namespace {

constexpr size_t GUARD = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK = 512 << 10;
constexpr size_t MARGIN = 0; // the sanitizer's red zones are better
#else
constexpr size_t STACK = 128 << 10;
constexpr size_t MARGIN = 256; // behind the dynamic shared memory
#endif
constexpr u8 MARGIN_BYTE = 0xa5;
constexpr u32 COPYING = ~0u;

thread_local Worker* worker = nullptr;

void enter() { worker->body(); }

char* new_stack() {
    void* area = mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) {
        perror("ferrotune host: mmap of a stack");
        abort();
    }
    mprotect(area, GUARD, PROT_NONE);
    return static_cast<char*>(area) + GUARD;
}

void start_switch(void** save, const void* stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(save, stack, size);
#else
    (void)save, (void)stack, (void)size;
#endif
}

} // namespace

ThreadLocals thread_locals(void* library) {
    struct Find {
        ElfW(Addr) base;
        size_t bytes;
    };
    ThreadLocals found;
    link_map* map = nullptr;
    if (library == nullptr || dlinfo(library, RTLD_DI_TLS_MODID, &found.module) != 0 ||
        found.module == 0 || dlinfo(library, RTLD_DI_LINKMAP, &map) != 0) {
        return {};
    }
    Find find = {map->l_addr, 0};
    const auto visit = [](dl_phdr_info* info, size_t, void* data) {
        auto* find = static_cast<Find*>(data);
        for (int i = 0; info->dlpi_addr == find->base && i < info->dlpi_phnum; i++) {
            if (info->dlpi_phdr[i].p_type == PT_TLS) {
                find->bytes = info->dlpi_phdr[i].p_memsz;
            }
        }
        return find->bytes > 0 ? 1 : 0;
    };
    dl_iterate_phdr(visit, &find);
    found.bytes = find.bytes;
    return found;
}

Worker::~Worker() {
    for (auto& fiber : fibers_) {
        munmap(fiber->stack - GUARD, GUARD + STACK);
    }
}

// `from` and `to` may be null: the stack of run_block.
void Worker::go_to(Fiber* from, Fiber* to) {
    current = to;
    start_switch(from != nullptr ? &from->fake_stack : &main_fake_stack_,
                 to != nullptr ? to->stack : main_stack_, to != nullptr ? STACK : main_stack_size_);
    ferrotune_host_switch(from != nullptr ? &from->stack_pointer : &main_stack_pointer_,
                          to != nullptr ? to->stack_pointer : main_stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from != nullptr ? from->fake_stack : main_fake_stack_, nullptr,
                                    nullptr);
#endif
}

// Goes on with a ready fiber; ends the block when there is none.
void Worker::next() {
    Fiber* from = current;
    if (ready_.empty()) {
        if (exited_ < launch_->threads) {
            error_ = stuck();
        }
        go_to(from, nullptr);
        return;
    }
    const u32 choice = random_.below(static_cast<u32>(ready_.size()));
    Fiber* to = fibers_[ready_[choice]].get();
    ready_[choice] = ready_.back();
    ready_.pop_back();
    if (to != from) {
        go_to(from, to);
    }
}

void Worker::make_ready(State waiting, u32 first, u32 last) {
    for (u32 i = first; i < last; i++) {
        if (fibers_[i]->state == waiting) {
            fibers_[i]->state = State::ready;
            ready_.push_back(i);
        }
    }
}

void Worker::release_barrier() {
    waiting_ = 0;
    make_ready(State::barrier, 0, launch_->threads);
}

// An exited thread counts as arrived, as on GPUs since Volta.
void Worker::barrier(int line) {
    if (waiting_ > 0 && line != barrier_line_) {
        fail("__syncthreads of line " + std::to_string(line) + " meets that of line " +
             std::to_string(barrier_line_) + ": the threads of a block have diverged");
    }
    barrier_line_ = line;
    current->state = State::barrier;
    if (++waiting_ + exited_ == launch_->threads) {
        release_barrier();
    }
    next();
}

// Unlike at the barrier of the block, an exited thread never arrives.
void Worker::team_barrier(u32 team, u32 threads) {
    const u32 first = team * threads, last = first + threads;
    if (threads % 32 != 0 || team >= 15 || current->index / threads != team || last > launch_->threads) {
        fail("a barrier of team " + std::to_string(team) + " of " + std::to_string(threads) +
             " threads, which is not this thread's");
    }
    current->state = State::team;
    u32 waiting = 0;
    for (u32 i = first; i < last; i++) {
        waiting += fibers_[i]->state == State::team;
    }
    if (waiting == threads) {
        make_ready(State::team, first, last);
    }
    next();
}

const HostSlot* Worker::warp(const char* name, const void* mine, u32 bytes,
                             void (*combine)(HostSlot*)) {
    const u32 index = current->index / 32, lane = current->index % 32;
    Warp& warp = warps_[index];
    if (warp.arrived > 0 && strcmp(warp.operation, name) != 0) {
        fail(std::string(name) + " meets " + warp.operation + ": the lanes of a warp have diverged");
    }
    warp.operation = name;
    HostSlot* slots = warp.slots[warp.turn];
    if (bytes > 0) {
        memcpy(&slots[lane], mine, bytes);
    }
    current->state = State::warp;
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        warp.turn ^= 1;
        if (combine != nullptr) {
            combine(slots);
        }
        make_ready(State::warp, 32 * index, 32 * index + 32);
    }
    next();
    return slots;
}

void Worker::body() {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
    if (main_stack_ == nullptr) {
        main_stack_ = stack;
        main_stack_size_ = size;
    }
#endif
    launch_->kernel(launch_->params);
    current->state = State::exited;
    exited_++;
    if (waiting_ > 0 && waiting_ + exited_ == launch_->threads) {
        release_barrier();
    }
    next();
    abort(); // nobody switches to an exited fiber
}

void Worker::fail(const std::string& reason) {
    error_ = "thread " + std::to_string(current->index) + ": " + reason;
    go_to(current, nullptr);
    abort();
}

// Names the threads that wait for others that never come.
std::string Worker::stuck() const {
    std::string text = "deadlock:";
    const char* names[] = {"ready", "wait at __syncthreads", "wait at a barrier of their team",
                           "wait at an mbarrier", "wait in a warp operation", "exited"};
    for (State state : {State::barrier, State::team, State::mbarrier, State::warp, State::exited}) {
        u32 count = 0, first = 0;
        for (u32 i = 0; i < launch_->threads; i++) {
            if (fibers_[i]->state == state && count++ == 0) {
                first = i;
            }
        }
        if (count > 0) {
            text += " " + std::to_string(count) + " threads (the first is " + std::to_string(first) +
                    ") " + names[static_cast<int>(state)];
            if (state == State::barrier) {
                text += " (line " + std::to_string(barrier_line_) + ")";
            }
            if (state == State::mbarrier) {
                text += boxes_.missing(fibers_[first]->mbarrier);
            }
            if (state == State::warp) {
                text += std::string(" (") + warps_[first / 32].operation + ")";
            }
            text += ";";
        }
    }
    return text;
}

void Worker::poison_shared() {
    if (locals_.bytes == 0) {
        return;
    }
    // As compiled code asks for a thread-local variable: makes this thread's copy if need be.
    struct {
        unsigned long module, offset;
    } index = {locals_.module, 0};
    using Address = void* (*)(void*);
    static const auto address = reinterpret_cast<Address>(dlsym(RTLD_DEFAULT, "__tls_get_addr"));
    if (address != nullptr) {
        memset(address(&index), POISON, locals_.bytes);
    }
}

void Worker::prepare(const Launch& launch, u32 block) {
    waiting_ = exited_ = 0;
    boxes_.clear();
    error_.clear();
    ready_.clear();
    warps_.assign((launch.threads + 31) / 32, Warp{});
    while (fibers_.size() < launch.threads) {
        fibers_.push_back(std::make_unique<Fiber>());
        fibers_.back()->stack = new_stack();
    }
    // Behind static variables it starts on 16 bytes and no more.
    constexpr size_t PAGE = 1024, OFFSET = 16;
    void* dynamic = nullptr;
    if (posix_memalign(&dynamic, PAGE, OFFSET + launch.shared + MARGIN) != 0) {
        abort();
    }
    dynamic_.reset(static_cast<u8*>(dynamic));
    shared_ = dynamic_.get() + OFFSET;
    memset(dynamic, POISON, OFFSET + launch.shared);
    memset(shared_ + launch.shared, MARGIN_BYTE, MARGIN);
    unfenced_.assign(launch.shared / 16 + 1, 0);
    poison_shared();
    const HostIndex at = {block % launch.grid[0], block / launch.grid[0] % launch.grid[1],
                          block / launch.grid[0] / launch.grid[1]};
    for (u32 i = 0; i < launch.threads; i++) {
        Fiber& fiber = *fibers_[i];
        fiber.view = {{i, 0, 0},
                      at,
                      {launch.threads, 1, 1},
                      {launch.grid[0], launch.grid[1], launch.grid[2]},
                      shared_};
        fiber.state = State::ready;
        fiber.index = i;
        fiber.group = 0;
        fiber.copies.clear();
        fiber.unfenced.clear();
        fiber.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(fiber.stack, STACK); // an ended block left its frames
#endif
        fiber.stack_pointer = prepare_stack(fiber.stack + STACK, enter);
        ready_.push_back(i);
    }
}

void Worker::check_margin() {
    for (size_t i = launch_->shared; i < launch_->shared + MARGIN; i++) {
        if (shared_[i] != MARGIN_BYTE) {
            error_ = "wrote past its " + std::to_string(launch_->shared) +
                     " bytes of dynamic shared memory";
            return;
        }
    }
}

void Worker::check_products() {
    for (const Warp& warp : warps_) {
        if (!warp.products.pending.empty()) {
            error_ = "wgmma: a warp ended without waiting for its products";
        }
    }
}

void Worker::check_boxes() {
    if (boxes_.left()) {
        error_ = "load_box: a block ended without waiting for its copies";
    }
}

void Worker::wrote_shared(const void* to) {
    const u64 at = reinterpret_cast<u64>(to) - reinterpret_cast<u64>(shared_);
    if (at < launch_->shared) {
        unfenced_[at / 16] = current->index + 1;
        current->unfenced.push_back(static_cast<u32>(at / 16));
    }
}

void Worker::fence_async_shared() {
    for (u32 chunk : current->unfenced) {
        if (unfenced_[chunk] == current->index + 1) {
            unfenced_[chunk] = 0;
        }
    }
    current->unfenced.clear();
    boxes_.fence(current->index);
}

void Worker::check_async_read(u64 address) {
    const u64 at = address - reinterpret_cast<u64>(shared_);
    if (at >= launch_->shared) {
        fail("wgmma reads outside of dynamic shared memory");
    }
    if (unfenced_[at / 16] == COPYING) {
        fail("wgmma reads what a copy of a box is yet to bring");
    }
    if (unfenced_[at / 16] != 0) {
        fail("wgmma reads what thread " + std::to_string(unfenced_[at / 16] - 1) +
             " wrote without fence_async_shared behind it");
    }
}

void Worker::begin_async_write(u64 address, u32 bytes) {
    const u64 at = address - reinterpret_cast<u64>(shared_);
    if (at >= launch_->shared || bytes > launch_->shared - at) {
        fail("load_box writes outside of dynamic shared memory");
    }
    for (u64 chunk = at / 16; chunk < (at + bytes + 15) / 16; chunk++) {
        if (unfenced_[chunk] == COPYING) {
            fail("load_box to where another one is on its way");
        }
        if (unfenced_[chunk] != 0) {
            fail("load_box to what thread " + std::to_string(unfenced_[chunk] - 1) +
                 " wrote without fence_async_shared behind it");
        }
        unfenced_[chunk] = COPYING;
    }
}

void Worker::end_async_write(u64 address, u32 bytes) {
    const u64 at = address - reinterpret_cast<u64>(shared_);
    for (u64 chunk = at / 16; chunk < (at + bytes + 15) / 16; chunk++) {
        unfenced_[chunk] = 0;
    }
}

void Worker::block_at_mbarrier(const u64* at) {
    current->state = State::mbarrier;
    current->mbarrier = at;
    next();
}

void Worker::release_mbarrier(const u64* at) {
    for (u32 i = 0; i < launch_->threads; i++) {
        if (fibers_[i]->state == State::mbarrier && fibers_[i]->mbarrier == at) {
            fibers_[i]->state = State::ready;
            ready_.push_back(i);
        }
    }
}

std::string Worker::run_block(const Launch& launch, const ThreadLocals& locals, u32 block,
                              u64 seed) {
    launch_ = &launch;
    locals_ = locals;
    prepare(launch, block);
    random_ = {seed * 0x9e3779b97f4a7c15ull | 1};
    for (int i = 0; i < 4; i++) {
        random_.below(1);
    }
    worker = this;
    current = nullptr;
    next();
    if (error_.empty()) {
        check_products();
    }
    if (error_.empty()) {
        check_boxes();
    }
    if (error_.empty()) {
        check_margin();
    }
    return error_;
}

Worker* current_worker() { return worker; }

} // namespace ferrotune_host

using ferrotune_host::worker;

extern "C" {

const HostThread* ferrotune_host_thread() { return &worker->current->view; }

void ferrotune_host_barrier(int line) { worker->barrier(line); }

void ferrotune_host_team_barrier(u32 team, u32 threads) { worker->team_barrier(team, threads); }

const HostSlot* ferrotune_host_warp(const char* name, const void* mine, u32 bytes,
                                    void (*combine)(HostSlot*)) {
    return worker->warp(name, mine, bytes, combine);
}

// The bytes are undefined until the wait: a kernel that reads them earlier reads NaN, and one that
// overwrites the source earlier copies what it wrote.
void ferrotune_host_cp_async(void* shared, const void* global, u32 valid_bytes) {
    if (valid_bytes > 16) {
        ferrotune_host_fail("cp.async of %u bytes, at most 16", valid_bytes);
    }
    memset(shared, ferrotune_host::POISON, 16);
    auto* fiber = worker->current;
    fiber->copies.push_back({shared, global, valid_bytes, fiber->group});
}

void ferrotune_host_wrote_shared(const void* shared) { worker->wrote_shared(shared); }

void ferrotune_host_cp_async_commit() { worker->current->group++; }

void ferrotune_host_cp_async_wait(u32 groups) {
    auto* fiber = worker->current;
    size_t done = 0;
    for (auto& copy : fiber->copies) {
        if (copy.group + groups >= fiber->group) {
            break;
        }
        memset(copy.to, 0, 16);
        memcpy(copy.to, copy.from, copy.valid);
        worker->wrote_shared(copy.to);
        done++;
    }
    fiber->copies.erase(fiber->copies.begin(), fiber->copies.begin() + static_cast<long>(done));
}

void ferrotune_host_fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    worker->fail(text);
}
}
