// Work in the order of streams: when it runs, and in which of the orders that waits between streams allow.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace ferrotune_host {

using Work = std::function<int()>;

// Work of a stream that goes on after the call that issued it, counted.
struct Progress {
    std::atomic<uint64_t> issued{0}, done{0};
};

struct Lane;

// A point of a lane.
struct Mark {
    Lane* lane = nullptr; // on which it lies, until it is passed
    bool passed = false;
    std::chrono::steady_clock::time_point at{};
    // What was issued on its stream before it, and may go on.
    std::shared_ptr<Progress> progress{};
    uint64_t after = 0;
};

// What is issued: work, a point, or a wait for one.
struct Op {
    Work work{};
    std::shared_ptr<Mark> marks{}, waits{};
    bool frees = false; // runs also after a failure
};

// What is issued on a stream, or on one of those that a graph was recorded from, and has not run.
struct Lane {
    std::deque<Op> ops{};
    int code = 0; // the first failure; nothing but what frees runs after it
};

// When work runs.
enum class Order {
    ISSUED, // at once
    LATE,   // when somebody waits for it, and no more than what that needs
    EARLY,  // when somebody waits for something, as far as its own waits let it
};
Order order();

// Held while lanes are changed, unless work runs at once.
std::recursive_mutex& lanes_mutex();

// Runs lanes that wait for one another.
class Lanes {
  public:
    void add(Lane* lane) { lanes.push_back(lane); }
    void remove(Lane* lane) { std::erase(lanes, lane); }
    // Runs all of `lane`, and what that waits for.
    int finish(Lane& lane);
    // Runs all of each.
    void finish_each() {
        for (Lane* lane : lanes) {
            finish(*lane);
        }
    }
    // Runs what comes before a point of a lane.
    void pass(const Mark& mark);

  private:
    std::vector<Lane*> lanes{};
    void step(Lane& lane);
    void run(Lane& lane);
    void run_ahead(const Lane& but);
};

// A recorded operation, and which of the streams that take part it is of; 0 is the one that began.
struct Node {
    size_t lane;
    Op op;
};

struct Stream;

struct Graph {
    std::vector<Node> nodes{};
    size_t lanes = 1;
    bool broken = false;
    std::vector<Stream*> streams{}; // while it is recorded
    // Whether everything on other streams is waited for by the one that began.
    bool joined() const;
    // Until the first failure, also one that `failed` tells of.
    int run(const std::function<bool()>& failed) const;
};

} // namespace ferrotune_host
