// A row that is passed over several times.
#pragma once
#include "rows.cuh"

// Groups that a thread of a row team holds in registers; as in cuda/rows.rs.
constexpr u32 SLOTS = 2;

// A row in spans of SLOTS groups per thread. The span visited last stays in registers for the next
// visit, so that a row of one span is read once.
class Spans {
    static constexpr u32 NONE = 0xffffffffu;
    const RowTeam& team;
    u32 groups;
    u32 held = NONE;

    template <typename Body>
    DEVICE void for_span(u32 start, const Body& body) const {
#pragma unroll
        for (u32 slot = 0; slot < SLOTS; slot++) {
            const u32 group = start + slot * team.threads + team.lane;
            if (group < groups) body(slot, group);
        }
    }

   public:
    DEVICE Spans(const RowTeam& team, u32 groups) : team(team), groups(groups) {}

    // body(slot, group) for every group of this thread, after load(slot, group) where the registers
    // hold another.
    template <typename Load, typename Body>
    DEVICE void visit(const Load& load, const Body& body) {
        const u32 first = held;
        if (first != NONE) for_span(first, body);
        for (u32 start = 0; start < groups; start += SLOTS * team.threads) {
            if (start == first) continue;
            for_span(start, load);
            for_span(start, body);
            held = start;
        }
    }
};
