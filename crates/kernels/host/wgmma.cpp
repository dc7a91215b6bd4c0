// Products of a warpgroup, each warp's 16 rows by themselves. A product is made when it begins or when it is
// waited for, as a seed decides: operands that are not there yet, or no longer, give other results. Until
// the wait its result is NaN.
#include "memory.h"
#include "worker.h"

#include <cstring>

namespace ferrotune_host {
namespace {

constexpr u32 LANES = 32;

// Bytes of shared memory as an operand describes them.
struct Operand {
    u64 start; // as the host addresses it
    u64 leading, stride;
    bool summed_columns; // whether a row holds what is summed over

    // Element `i` of what stays, `k` of the 16 that are summed over.
    u64 address(u32 i, u32 k) const {
        const u64 at = summed_columns ? start + i / 8 * stride + i % 8 * 128 + k * 2
                                      : start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128;
        return at ^ ((at >> 7 & 7) << 4);
    }
};

Operand decode(Worker& worker, u64 word, bool summed_columns) {
    if (word >> 62 != 1 || (word >> 49 & 7) != 0) {
        worker.fail("wgmma: an operand without the 128-byte swizzle, or with a base offset");
    }
    constexpr u64 WINDOW = 1 << 18;
    const u64 base = reinterpret_cast<u64>(worker.dynamic_shared());
    u64 start = base / WINDOW * WINDOW + ((word & 0x3fff) << 4);
    start += start < base ? WINDOW : 0;
    const bool aligned = summed_columns ? start / 128 % 8 == 0 && start % 128 <= 128 - 32 : start % 1024 == 0;
    if (!aligned) {
        worker.fail("wgmma: an operand that starts " + std::to_string(start % 1024) +
                    " bytes behind a multiple of 1024");
    }
    return {start, (word >> 16 & 0x3fff) << 4, (word >> 32 & 0x3fff) << 4, summed_columns};
}

f64 read(Worker& worker, const Operand& operand, u32 i, u32 k) {
    const u64 at = operand.address(i, k);
    worker.check_async_read(at);
    u16 bits;
    memcpy(&bits, reinterpret_cast<const void*>(at), 2);
    return bits_float(static_cast<u32>(bits) << 16);
}

// sums [lane][columns / 8][4] (+)= a b, in the layout of mma_m16n8k16.
void multiply(Worker& worker, const Products::Product& product, std::vector<f32>& sums) {
    const u32 columns = product.lanes[0].columns, first_row = product.warp % 4 * 16;
    f64 a[16][16];
    std::vector<f64> b(16 * columns);
    if (product.lanes[0].a_in_registers) {
        for (u32 lane = 0; lane < LANES; lane++) {
            const u32 g = lane / 4, t = lane % 4;
            for (u32 i = 0; i < 8; i++) {
                a[g + 8 * (i / 2 % 2)][2 * t + 8 * (i / 4) + i % 2] =
                    host_bf16_half(product.lanes[lane].a[i / 2], i % 2);
            }
        }
    } else {
        const Operand operand = decode(worker, product.lanes[0].a_operand, true);
        for (u32 row = 0; row < 16; row++) {
            for (u32 k = 0; k < 16; k++) {
                a[row][k] = read(worker, operand, first_row + row, k);
            }
        }
    }
    const Operand operand = decode(worker, product.lanes[0].b_operand, !product.lanes[0].a_in_registers);
    for (u32 column = 0; column < columns; column++) {
        for (u32 k = 0; k < 16; k++) {
            b[k * columns + column] = read(worker, operand, column, k);
        }
    }
    for (u32 lane = 0; lane < LANES; lane++) {
        for (u32 i = 0; i < columns / 2; i++) {
            const u32 row = lane / 4 + 8 * (i % 4 / 2), column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
            f32& target = sums[lane * columns / 2 + i];
            f64 sum = product.lanes[0].first ? 0.0 : target;
            for (u32 k = 0; k < 16; k++) {
                sum += a[row][k] * b[k * columns + column];
            }
            target = static_cast<f32>(sum);
        }
    }
}

} // namespace

void Products::begin(Worker& worker, u32 warp, const HostSlot* slots) {
    Product product = {warp, group, false, std::vector<HostWgmma>(LANES)};
    for (u32 lane = 0; lane < LANES; lane++) {
        const HostWgmma* mine;
        memcpy(&mine, &slots[lane], sizeof(mine));
        product.lanes[lane] = *mine;
        if (mine->a_operand != product.lanes[0].a_operand || mine->b_operand != product.lanes[0].b_operand) {
            worker.fail("wgmma: the lanes of a warp have different operands");
        }
    }
    if (!fenced) {
        worker.fail("wgmma without wgmma_fence since registers may have changed");
    }
    const u32 values = product.lanes[0].columns / 2;
    auto [found, added] = sums.try_emplace(product.lanes[0].d);
    if (added) {
        found->second.resize(LANES * values);
        for (u32 lane = 0; lane < LANES; lane++) {
            memcpy(&found->second[lane * values], product.lanes[lane].d, 4 * values);
            memset(product.lanes[lane].d, POISON, 4 * values);
        }
    }
    pending.push_back(std::move(product));
    bool all_made = true;
    for (size_t i = 0; i + 1 < pending.size(); i++) {
        all_made = all_made && pending[i].made;
    }
    if (all_made && worker.draw(2) == 0) {
        make(worker, pending.back());
    }
}

void Products::make(Worker& worker, Product& product) {
    if (!product.made) {
        multiply(worker, product, sums[product.lanes[0].d]);
        product.made = true;
    }
}

void Products::wait(Worker& worker, u32 groups) {
    size_t done = 0;
    while (done < pending.size() && pending[done].group + groups < group) {
        make(worker, pending[done++]);
    }
    std::vector<Product> finished(pending.begin(), pending.begin() + static_cast<long>(done));
    pending.erase(pending.begin(), pending.begin() + static_cast<long>(done));
    for (const Product& product : finished) {
        bool more = false;
        for (const Product& other : pending) {
            more = more || other.lanes[0].d == product.lanes[0].d;
        }
        const auto found = sums.find(product.lanes[0].d);
        if (more || found == sums.end()) {
            continue;
        }
        const u32 values = product.lanes[0].columns / 2;
        for (u32 lane = 0; lane < LANES; lane++) {
            memcpy(product.lanes[lane].d, &found->second[lane * values], 4 * values);
        }
        sums.erase(found);
    }
    fenced = false;
}

} // namespace ferrotune_host

using ferrotune_host::current_worker;
using ferrotune_host::Products;
using ferrotune_host::Worker;

extern "C" {

void ferrotune_host_wgmma_fence() {
    current_worker()->warp("wgmma_fence", nullptr, 0, [](HostSlot*) { current_worker()->products().fenced = true; });
}

void ferrotune_host_wgmma(const HostWgmma* mine) {
    current_worker()->warp("wgmma", &mine, sizeof(mine), [](HostSlot* slots) {
        Worker& worker = *current_worker();
        worker.products().begin(worker, worker.current->index / 32, slots);
    });
}

void ferrotune_host_wgmma_commit() {
    current_worker()->warp("wgmma_commit", nullptr, 0, [](HostSlot*) { current_worker()->products().group++; });
}

void ferrotune_host_wgmma_wait(u32 groups) {
    current_worker()->warp("wgmma_wait", &groups, sizeof(groups), [](HostSlot* slots) {
        Worker& worker = *current_worker();
        worker.products().wait(worker, slots[0].word[0]);
    });
}

void ferrotune_host_fence_async_shared() { current_worker()->fence_async_shared(); }
}
