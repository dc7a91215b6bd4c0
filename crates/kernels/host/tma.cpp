// Barriers of shared memory that count bytes, and copies of boxes. A copy is made when it begins or when its
// barrier is waited for, as a seed decides; until it is made its destination is NaN.
#include "memory.h"
#include "tma.cuh"
#include "worker.h"

#include <algorithm>
#include <cstring>

namespace ferrotune_host {
namespace {

// What the word of a barrier holds: whoever writes over it is found.
u64 word_of(const Mbarrier& barrier) { return 0x6d62617272000000ull + barrier.phase; }

constexpr u32 ROW = 128; // bytes of a row of a box: the span of the swizzle
constexpr u32 CHUNK = 16;

// As far as a barrier counts.
constexpr i64 MOST_BYTES = (1 << 20) - 1;

} // namespace

Mbarrier& Boxes::find(Worker& worker, const u64* at, const char* what) {
    const auto found = barriers.find(at);
    if (found == barriers.end()) {
        worker.fail(std::string(what) + " of a barrier without mbarrier_init");
    }
    if (*at != word_of(found->second)) {
        worker.fail(std::string(what) + " of a barrier that was written over");
    }
    return found->second;
}

void Boxes::init(Worker& worker, u64* at, u32 arrivals) {
    if (arrivals == 0 || arrivals >= 1 << 20 || reinterpret_cast<u64>(at) % 8 != 0) {
        worker.fail("mbarrier_init for " + std::to_string(arrivals) + " arrivals, or not aligned to 8");
    }
    Mbarrier& barrier = barriers[at];
    barrier = {};
    barrier.arrivals = barrier.missing = arrivals;
    barrier.unfenced = worker.current->index + 1;
    *at = word_of(barrier);
}

void Boxes::fence(u32 thread) {
    for (auto& [at, barrier] : barriers) {
        if (barrier.unfenced == thread + 1) {
            barrier.unfenced = 0;
        }
    }
}

void Boxes::count(Worker& worker, u64* at, Mbarrier& barrier, u32 arrivals, i64 bytes) {
    barrier.missing -= arrivals;
    barrier.bytes += bytes;
    if (barrier.bytes > MOST_BYTES || barrier.bytes < -MOST_BYTES) {
        worker.fail("a barrier counts at most " + std::to_string(MOST_BYTES) + " bytes");
    }
    if (barrier.missing == 0 && barrier.bytes == 0) {
        barrier.missing = barrier.arrivals;
        barrier.phase++;
        *at = word_of(barrier);
        worker.release_mbarrier(at);
    }
}

void Boxes::expect(Worker& worker, u64* at, u32 bytes) {
    count(worker, at, find(worker, at, "mbarrier_expect"), 0, bytes);
}

void Boxes::arrive(Worker& worker, u64* at) {
    Mbarrier& barrier = find(worker, at, "mbarrier_arrive");
    if (barrier.missing == 0) {
        worker.fail("mbarrier_arrive, but all of the phase's arrivals are there");
    }
    count(worker, at, barrier, 1, 0);
}

void Boxes::wait(Worker& worker, u64* at, u32 parity) {
    const auto ended = [&] {
        Mbarrier& barrier = find(worker, at, "mbarrier_wait");
        if ((barrier.phase & 1) == parity) {
            return false;
        }
        barrier.waited = barrier.phase;
        return true;
    };
    if (parity > 1) {
        worker.fail("mbarrier_wait for a parity of " + std::to_string(parity));
    }
    while (!ended()) {
        const auto mine = [&](const BoxCopy& copy) { return copy.barrier == at; };
        const auto next = std::find_if(pending.begin(), pending.end(), mine);
        if (next == pending.end()) {
            worker.block_at_mbarrier(at);
            continue;
        }
        const BoxCopy copy = *next;
        pending.erase(next);
        make(worker, copy);
    }
}

void Boxes::begin(Worker& worker, BoxCopy copy, const void* map) {
    Mbarrier& barrier = find(worker, copy.barrier, "load_box");
    if (barrier.unfenced != 0) {
        worker.fail("load_box counts for a barrier without fence_async_shared behind its mbarrier_init");
    }
    if (reinterpret_cast<u64>(map) % 64 != 0) {
        worker.fail("load_box of a tensor map that is not aligned to 64 bytes");
    }
    memcpy(&copy.map, map, sizeof(copy.map));
    if (copy.map.magic != HostTensorMap::MAGIC || copy.map.rank != 3) {
        worker.fail("load_box without a tensor map of three dimensions");
    }
    if (copy.map.type != HostTensorMap::BF16 || copy.map.swizzle != HostTensorMap::SWIZZLE_128 ||
        copy.map.box[0] * 2 != ROW) {
        worker.fail("load_box: the stand-in knows boxes of bf16 with rows of 128 bytes and their swizzle");
    }
    if (copy.to % ROW != 0) {
        worker.fail("load_box to " + std::to_string(copy.to % ROW) + " bytes behind a multiple of 128");
    }
    barrier.copied = barrier.phase + 1;
    worker.begin_async_write(copy.to, copy.bytes());
    memset(reinterpret_cast<void*>(copy.to), POISON, copy.bytes());
    if (worker.draw(2) == 0) {
        make(worker, copy);
    } else {
        pending.push_back(copy);
    }
}

void Boxes::make(Worker& worker, const BoxCopy& copy) {
    const HostTensorMap& map = copy.map;
    u64 to = copy.to;
    for (u32 z = 0; z < map.box[2]; z++) {
        for (u32 y = 0; y < map.box[1]; y++, to += ROW) {
            const u64 row = copy.at[2] + static_cast<u64>(z), line = copy.at[1] + static_cast<u64>(y);
            const bool inside = row <= map.last[2] && line <= map.last[1];
            const u64 from = map.address + row * map.strides[1] + line * map.strides[0];
            for (u32 i = 0; i < ROW / 2; i++) {
                const u64 column = copy.at[0] + static_cast<u64>(i), at = to + i * 2;
                u16 value = 0;
                if (inside && column <= map.last[0]) {
                    memcpy(&value, reinterpret_cast<const void*>(from + column * 2), 2);
                }
                memcpy(reinterpret_cast<void*>(at ^ (at / ROW % 8 * CHUNK)), &value, 2);
            }
        }
    }
    worker.end_async_write(copy.to, copy.bytes());
    count(worker, copy.barrier, find(worker, copy.barrier, "a copy"), 0, -static_cast<i64>(copy.bytes()));
}

std::string Boxes::missing(const u64* at) const {
    const auto found = barriers.find(at);
    if (found == barriers.end()) {
        return "";
    }
    return " (phase " + std::to_string(found->second.phase) + ", which misses " +
           std::to_string(found->second.missing) + " arrivals and " + std::to_string(found->second.bytes) + " bytes)";
}

bool Boxes::left() const {
    for (const auto& [at, barrier] : barriers) {
        if (barrier.copied > barrier.waited) {
            return true;
        }
    }
    return false;
}

void Boxes::clear() {
    barriers.clear();
    pending.clear();
}

} // namespace ferrotune_host

using ferrotune_host::current_worker;
using ferrotune_host::Worker;

extern "C" {

void ferrotune_host_mbarrier_init(u64* barrier, u32 arrivals) {
    current_worker()->boxes().init(*current_worker(), barrier, arrivals);
}

void ferrotune_host_mbarrier_expect(u64* barrier, u32 bytes) {
    current_worker()->boxes().expect(*current_worker(), barrier, bytes);
}

void ferrotune_host_mbarrier_arrive(u64* barrier) { current_worker()->boxes().arrive(*current_worker(), barrier); }

void ferrotune_host_mbarrier_wait(u64* barrier, u32 parity) {
    current_worker()->boxes().wait(*current_worker(), barrier, parity);
}

void ferrotune_host_load_box(void* shared, const void* map, u32 x, u32 y, u32 z, u64* barrier) {
    ferrotune_host::BoxCopy copy = {};
    copy.to = reinterpret_cast<u64>(shared);
    copy.at[0] = x, copy.at[1] = y, copy.at[2] = z;
    copy.barrier = barrier;
    current_worker()->boxes().begin(*current_worker(), copy, map);
}
}
