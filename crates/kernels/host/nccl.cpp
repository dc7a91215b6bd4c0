// libnccl.so.2: the calls of crates/dist/src/nccl, between ranks that are threads or processes of one
// machine, on the memory of the stand-in devices.
//
// As in NCCL, a call of a communicator with `blocking = 0` only begins something; a call before the
// previous one came to its end is refused; a sum starts at another rank from part to part of a buffer, so
// that its bits depend on where a buffer begins and ends; and a rank that is missing is waited for without
// end.
//
// The file `misbehave` beside the library, read when a communicator is made, makes it fail, a line each:
//
//     version N            what ncclGetVersion says (22705)
//     rank R               the rest is about this rank alone
//     init hang|fail|block the communicator never becomes ready; fails; the call itself takes `block` ms
//     block N              milliseconds
//     async_error N        after N collectives the communicator reports a remote error
//     stuck N              collective number N, from 0, never ends
//     in_progress N        whatever a call begins comes to its end N ms later
//     abort_ms N           ncclCommAbort takes so long
//     finalize hang        ncclCommFinalize never comes to its end
//     log                  every call is a line of the file `calls.RANK`
#include "driver.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <fcntl.h>
#include <fstream>
#include <map>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>

#define API extern "C" __attribute__((visibility("default")))

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

enum Result : int {
    SUCCESS = 0,
    SYSTEM_ERROR = 2,
    INVALID_ARGUMENT = 4,
    INVALID_USAGE = 5,
    REMOTE_ERROR = 6,
    IN_PROGRESS = 7,
};

constexpr int FLOAT32 = 7;
constexpr int SUM = 0;

struct UniqueId {
    char bytes[128];
};
// ncclConfig_t as of NCCL 2.18.
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char* net_name;
    int split_share;
};
static_assert(sizeof(Config) == 48 && offsetof(Config, net_name) == 32, "the layout of ncclConfig_t");

std::string folder() {
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(&folder), &info);
    const std::string path = info.dli_fname != nullptr ? info.dli_fname : "";
    return path.substr(0, path.rfind('/') + 1);
}

// What the file asks for, by its first word.
struct Misbehaviour {
    std::map<std::string, std::string> wishes;

    Misbehaviour() {
        std::ifstream file(folder() + "misbehave");
        for (std::string line; std::getline(file, line);) {
            std::istringstream words(line);
            std::string key, value;
            words >> key >> value;
            wishes[key] = value;
        }
    }
    bool is(const char* key, const char* value) const {
        const auto found = wishes.find(key);
        return found != wishes.end() && found->second == value;
    }
    long number(const char* key, long otherwise) const {
        const auto found = wishes.find(key);
        return found != wishes.end() ? atol(found->second.c_str()) : otherwise;
    }
};

// Floats that ranks exchange at a time.
constexpr size_t PART = 1 << 16;

// The ranks of one unique id, threads or processes, and the memory they share: a call of each, and a part of
// its buffer.
class Group {
  public:
    Group(const UniqueId& id, int ranks, int rank, const std::atomic<bool>& aborted)
        : name_("/ferrotune-nccl-" + std::string(id.bytes)), ranks_(static_cast<size_t>(ranks)),
          rank_(static_cast<size_t>(rank)), aborted_(aborted) {
        const int file = shm_open(name_.c_str(), O_CREAT | O_RDWR, 0600);
        if (file < 0) {
            return;
        }
        // Memory that is not there is an error here, not a signal later.
        if (posix_fallocate(file, 0, static_cast<off_t>(bytes())) == 0) {
            void* const memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
            places_ = memory != MAP_FAILED ? static_cast<Place*>(memory) : nullptr;
        }
        close(file);
    }
    Group(const Group&) = delete;
    Group& operator=(const Group&) = delete;
    ~Group() {
        shm_unlink(name_.c_str());
        if (places_ != nullptr) {
            munmap(places_, bytes());
        }
    }

    bool is_shared() const { return places_ != nullptr; }

    // Waits until all ranks are there. False if the communicator was aborted first.
    bool join() {
        const bool all = meet();
        // Whoever has it keeps it; nobody else is to come.
        shm_unlink(name_.c_str());
        return all;
    }

    // One collective, as `join`.
    bool run(const char* name, float* buffer, size_t count, size_t root) {
        const bool sums = strcmp(name, "all_reduce") == 0;
        const Call call{sums, count, root};
        size_t at = 0;
        do {
            const size_t floats = std::min(PART, count - at);
            places_[rank_].call = call;
            if (sums || rank_ == root) {
                memcpy(part(rank_), buffer + at, floats * sizeof(float));
            }
            if (!meet() || !all_call(call)) {
                return false;
            }
            for (size_t i = 0; i < floats; i++) {
                buffer[at + i] = sums ? sum(at + i, count) : part(root)[i];
            }
            if (!meet()) {
                return false;
            }
            at += floats;
        } while (at < count);
        return true;
    }

  private:
    struct Call {
        bool sums;
        size_t count, root;
        bool operator==(const Call&) const = default;
    };
    struct Place {
        std::atomic<uint64_t> met; // how often this rank was where all others come too
        Call call;
    };
    static_assert(std::atomic<uint64_t>::is_always_lock_free, "processes share it");

    size_t bytes() const { return ranks_ * (sizeof(Place) + PART * sizeof(float)); }
    float* part(size_t rank) const { return reinterpret_cast<float*>(places_ + ranks_) + rank * PART; }

    bool meet() {
        const uint64_t mine = ++places_[rank_].met;
        for (size_t rank = 0; rank < ranks_; rank++) {
            while (places_[rank].met < mine) {
                if (aborted_) {
                    return false;
                }
                std::this_thread::sleep_for(std::chrono::microseconds(50));
            }
        }
        return true;
    }

    // Whether all ranks want the same. What does not fit never ends, as in NCCL.
    bool all_call(const Call& call) const {
        const bool all = std::all_of(places_, places_ + ranks_, [&](const Place& place) { return place.call == call; });
        while (!all && !aborted_) {
            std::this_thread::sleep_for(milliseconds(1));
        }
        return all;
    }

    // Of element `i` of `count`, from the rank at which its part of the buffer starts.
    float sum(size_t i, size_t count) const {
        const size_t first = i * ranks_ / count;
        float value = part(first)[i % PART];
        for (size_t r = 1; r < ranks_; r++) {
            value += part((first + r) % ranks_)[i % PART];
        }
        return value;
    }

    std::string name_;
    size_t ranks_, rank_;
    const std::atomic<bool>& aborted_;
    Place* places_ = nullptr;
};

thread_local std::string last_error;

struct Issued {
    const char* name;
    float* buffer;
    size_t count;
    int root;
    std::function<void()> finish;
};

} // namespace

struct Communicator {
    int ranks, rank;
    std::atomic<bool> ready{false}, aborted{false};
    Group group;
    Misbehaviour misbehaviour;
    bool log;
    std::mutex mutex{};
    std::condition_variable changed{};
    std::deque<Issued> queue{};
    uint64_t issued = 0, ended = 0;
    Result failure = SUCCESS;
    bool finalizing = false;
    Clock::time_point begun_until{};
    std::thread worker{};

    Communicator(int ranks, int rank, const UniqueId& id)
        : ranks(ranks), rank(rank), group(id, ranks, rank, aborted),
          log(misbehaviour.wishes.count("log") != 0) {
        if (misbehaviour.number("rank", rank) != rank) {
            misbehaviour.wishes.clear();
        }
        worker = std::thread([this] { work(); });
    }

    void note(const std::string& line) const {
        if (log) {
            std::ofstream(folder() + "calls." + std::to_string(rank), std::ios::app) << line << '\n';
        }
    }

    void begin() { begun_until = Clock::now() + milliseconds(misbehaviour.number("in_progress", 0)); }

    // Under the lock.
    Result state() const {
        if (failure != SUCCESS) {
            return failure;
        }
        const bool finalized = !misbehaviour.is("finalize", "hang") && ended == issued;
        const bool busy = !ready || (finalizing && !finalized) || Clock::now() < begun_until;
        return busy ? IN_PROGRESS : SUCCESS;
    }

    void work() {
        join();
        for (uint64_t number = 0;; number++) {
            std::unique_lock lock(mutex);
            changed.wait(lock, [&] { return aborted || !queue.empty(); });
            if (aborted) {
                break;
            }
            Issued next = queue.front();
            queue.pop_front();
            lock.unlock();
            const bool done = run(number, next);
            // Also if aborted, as a kernel that leaves.
            next.finish();
            if (!done) {
                break;
            }
            lock.lock();
            ended++;
        }
    }

    void join() {
        const bool shared = group.is_shared() && group.join();
        if (!shared || misbehaviour.is("init", "fail")) {
            std::lock_guard mine(mutex);
            failure = SYSTEM_ERROR;
        }
        ready = !misbehaviour.is("init", "hang");
    }

    // False if the communicator was aborted first.
    bool run(uint64_t number, const Issued& next) {
        if (misbehaviour.number("stuck", -1) == static_cast<long>(number)) {
            std::unique_lock lock(mutex);
            changed.wait(lock, [&] { return aborted.load(); });
            return false;
        }
        return group.run(next.name, next.buffer, next.count, static_cast<size_t>(next.root));
    }

    Result issue(const char* name, float* buffer, size_t count, int root, void* stream) {
        std::lock_guard lock(mutex);
        note(std::string(name) + ' ' + std::to_string(reinterpret_cast<uintptr_t>(buffer)) + ' ' +
             std::to_string(count));
        if (const Result now = state(); now != SUCCESS) {
            last_error = "a call before the previous one came to its end";
            return now == IN_PROGRESS ? INVALID_ARGUMENT : now;
        }
        if (!ferrotune_host::holds(stream, buffer, count * sizeof(float))) {
            last_error = "the buffer is not in the memory of the device";
            return INVALID_ARGUMENT;
        }
        begin();
        queue.push_back({name, buffer, count, root, ferrotune_host::defer(stream)});
        issued++;
        if (misbehaviour.number("async_error", LONG_MAX) < static_cast<long>(issued)) {
            failure = REMOTE_ERROR;
            last_error = "socket: connection closed by remote peer";
        }
        changed.notify_all();
        return state();
    }

    void end() {
        {
            std::lock_guard lock(mutex);
            aborted = true;
        }
        changed.notify_all();
        worker.join();
        for (const Issued& left : queue) {
            left.finish();
        }
    }
};

API int ncclGetVersion(int* version) {
    *version = static_cast<int>(Misbehaviour().number("version", 22705));
    return SUCCESS;
}

API const char* ncclGetErrorString(int result) {
    switch (result) {
    case SUCCESS:
        return "no error";
    case SYSTEM_ERROR:
        return "unhandled system error";
    case INVALID_ARGUMENT:
        return "invalid argument";
    case INVALID_USAGE:
        return "invalid usage";
    case REMOTE_ERROR:
        return "remote process exited or there was a network error";
    case IN_PROGRESS:
        return "NCCL operation in progress";
    default:
        return "unknown result code";
    }
}

API const char* ncclGetLastError(const Communicator*) { return last_error.c_str(); }

API int ncclGetUniqueId(UniqueId* id) {
    *id = {};
    std::random_device random;
    snprintf(id->bytes, sizeof id->bytes, "%08x%08x%08x%08x", random(), random(), random(), random());
    return SUCCESS;
}

API int ncclCommInitRankConfig(Communicator** communicator, int ranks, UniqueId id, int rank,
                               const Config* config) {
    if (config->magic != 0xcafebeef || config->size != sizeof(Config) || config->version != 21800 ||
        config->blocking != 0 || config->cga_cluster_size != INT_MIN || config->min_ctas != INT_MIN ||
        config->max_ctas != INT_MIN || config->net_name != nullptr || config->split_share != INT_MIN) {
        last_error = "the configuration is not NCCL_CONFIG_INITIALIZER with blocking = 0";
        return INVALID_ARGUMENT;
    }
    if (rank < 0 || rank >= ranks) {
        last_error = "rank out of range";
        return INVALID_ARGUMENT;
    }
    *communicator = new Communicator(ranks, rank, id);
    (*communicator)->note("init");
    if ((*communicator)->misbehaviour.is("init", "block")) {
        std::this_thread::sleep_for(milliseconds((*communicator)->misbehaviour.number("block", 0)));
    }
    return IN_PROGRESS;
}

API int ncclCommGetAsyncError(Communicator* communicator, int* result) {
    std::lock_guard lock(communicator->mutex);
    *result = communicator->state();
    return SUCCESS;
}

API int ncclAllReduce(const void* from, void* to, size_t count, int type, int operation,
                      Communicator* communicator, void* stream) {
    if (from != to || type != FLOAT32 || operation != SUM) {
        return INVALID_ARGUMENT;
    }
    return communicator->issue("all_reduce", static_cast<float*>(to), count, 0, stream);
}

API int ncclBroadcast(const void* from, void* to, size_t count, int type, int root,
                      Communicator* communicator, void* stream) {
    if (from != to || type != FLOAT32 || root < 0 || root >= communicator->ranks) {
        return INVALID_ARGUMENT;
    }
    return communicator->issue("broadcast", static_cast<float*>(to), count, root, stream);
}

#ifndef FERROTUNE_HOST_NCCL_WITHOUT_FINALIZE
API int ncclCommFinalize(Communicator* communicator) {
    std::lock_guard lock(communicator->mutex);
    communicator->note("finalize");
    communicator->finalizing = true;
    communicator->begin();
    return communicator->state();
}
#endif

API int ncclCommDestroy(Communicator* communicator) {
    communicator->note("destroy");
    communicator->end();
    delete communicator;
    return SUCCESS;
}

API int ncclCommAbort(Communicator* communicator) {
    communicator->note("abort");
    std::this_thread::sleep_for(milliseconds(communicator->misbehaviour.number("abort_ms", 0)));
    communicator->end();
    delete communicator;
    return SUCCESS;
}
