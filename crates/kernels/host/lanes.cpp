#include "lanes.h"

#include <cstdlib>
#include <cstring>

namespace ferrotune_host {

Order order() {
    static const Order order = [] {
        const char* text = getenv("FERROTUNE_HOST_STREAMS");
        if (text == nullptr || *text == 0) {
            return Order::ISSUED;
        }
        return strcmp(text, "early") == 0 ? Order::EARLY : Order::LATE;
    }();
    return order;
}

std::recursive_mutex& lanes_mutex() {
    static std::recursive_mutex mutex;
    return mutex;
}

void Lanes::run(Lane& lane) {
    Op op = std::move(lane.ops.front());
    lane.ops.pop_front();
    if (op.work && (lane.code == 0 || op.frees)) {
        const int code = op.work();
        if (lane.code == 0) {
            lane.code = code;
        }
    }
    if (op.marks) {
        op.marks->passed = true;
    }
}

// Whatever does not have to wait runs before the next operation of another lane.
void Lanes::run_ahead(const Lane& but) {
    for (bool moved = true; moved;) {
        moved = false;
        for (Lane* lane : lanes) {
            while (lane != &but && !lane->ops.empty() &&
                   (!lane->ops.front().waits || lane->ops.front().waits->passed)) {
                run(*lane);
                moved = true;
            }
        }
    }
}

void Lanes::step(Lane& lane) {
    const std::shared_ptr<Mark> waits = lane.ops.front().waits;
    if (waits && !waits->passed) {
        pass(*waits);
    }
    if (order() == Order::EARLY) {
        run_ahead(lane);
    }
    run(lane);
}

int Lanes::finish(Lane& lane) {
    while (!lane.ops.empty()) {
        step(lane);
    }
    return lane.code;
}

void Lanes::pass(const Mark& mark) {
    while (!mark.passed) {
        step(*mark.lane);
    }
}

namespace {

// The nodes as lanes that have not begun.
std::vector<Lane> lanes_of(const Graph& graph, bool with_work) {
    std::vector<Lane> lanes(graph.lanes);
    for (const Node& node : graph.nodes) {
        Op op = node.op;
        if (op.marks) {
            op.marks->lane = &lanes[node.lane];
            op.marks->passed = false;
        }
        if (!with_work && op.work) {
            op.work = [] { return 0; };
        }
        lanes[node.lane].ops.push_back(std::move(op));
    }
    return lanes;
}

} // namespace

bool Graph::joined() const {
    std::vector<Lane> all = lanes_of(*this, false);
    // The first alone, and what it waits for.
    Lanes lanes;
    while (!all[0].ops.empty()) {
        const std::shared_ptr<Mark> waits = all[0].ops.front().waits;
        if (waits) {
            lanes.pass(*waits);
        }
        Op op = std::move(all[0].ops.front());
        all[0].ops.pop_front();
        if (op.marks) {
            op.marks->passed = true;
        }
    }
    for (const Lane& lane : all) {
        for (const Op& op : lane.ops) {
            if (op.work) {
                return false;
            }
        }
    }
    return true;
}

int Graph::run(const std::function<bool()>& failed) const {
    if (order() == Order::ISSUED) {
        for (const Node& node : nodes) {
            const int code = node.op.work ? node.op.work() : 0;
            if (code != 0 || failed()) {
                return code;
            }
        }
        return 0;
    }
    std::vector<Lane> all = lanes_of(*this, true);
    Lanes lanes;
    for (Lane& lane : all) {
        lanes.add(&lane);
    }
    int first = 0;
    for (Lane& lane : all) {
        const int code = lanes.finish(lane);
        first = first != 0 ? first : code;
    }
    return first;
}

} // namespace ferrotune_host
