// libnccl.so.2: the calls of crates/dist/src/nccl, between ranks that are threads of one process, on the
// memory of the stand-in devices.
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
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

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

// One collective: every rank brings its buffer, the last one does the work for all.
struct Collective {
    const char* name;
    size_t count;
    int root;
    std::vector<float*> buffers;
    int arrived = 0;
    bool mismatch = false, done = false;

    void sum() {
        const size_t ranks = buffers.size();
        std::vector<float> result(count);
        for (size_t i = 0; i < count; i++) {
            const size_t first = i * ranks / count;
            float value = buffers[first][i];
            for (size_t r = 1; r < ranks; r++) {
                value += buffers[(first + r) % ranks][i];
            }
            result[i] = value;
        }
        for (float* buffer : buffers) {
            memcpy(buffer, result.data(), count * sizeof(float));
        }
    }
    void copy() {
        const float* from = buffers[static_cast<size_t>(root)];
        for (float* buffer : buffers) {
            if (buffer != from) {
                memcpy(buffer, from, count * sizeof(float));
            }
        }
    }
};

// The ranks of one unique id.
struct Group {
    std::mutex mutex;
    std::condition_variable changed;
    int joined = 0;
    std::map<uint64_t, std::shared_ptr<Collective>> collectives;
};

std::shared_ptr<Group> group_of(const UniqueId& id) {
    static std::mutex mutex;
    static std::map<std::string, std::shared_ptr<Group>> groups;
    std::lock_guard lock(mutex);
    auto& group = groups[std::string(id.bytes, sizeof id.bytes)];
    if (group == nullptr) {
        group = std::make_shared<Group>();
    }
    return group;
}

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
    std::shared_ptr<Group> group;
    Misbehaviour misbehaviour;
    bool log;
    std::mutex mutex{};
    std::condition_variable changed{};
    std::deque<Issued> queue{};
    uint64_t issued = 0, ended = 0;
    Result failure = SUCCESS;
    bool finalizing = false;
    Clock::time_point begun_until{};
    std::atomic<bool> ready{false}, aborted{false};
    std::thread worker{};

    Communicator(int ranks, int rank, std::shared_ptr<Group> group)
        : ranks(ranks), rank(rank), group(std::move(group)),
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
        std::unique_lock lock(group->mutex);
        group->joined++;
        group->changed.notify_all();
        group->changed.wait(lock, [&] { return aborted || group->joined == ranks; });
        if (misbehaviour.is("init", "fail")) {
            std::lock_guard mine(mutex);
            failure = SYSTEM_ERROR;
        }
        ready = !misbehaviour.is("init", "hang");
    }

    // False if the communicator was aborted first.
    bool run(uint64_t number, const Issued& issued_here) {
        std::unique_lock lock(group->mutex);
        if (misbehaviour.number("stuck", -1) == static_cast<long>(number)) {
            group->changed.wait(lock, [&] { return aborted.load(); });
            return false;
        }
        auto& place = group->collectives[number];
        if (place == nullptr) {
            place = std::make_shared<Collective>(Collective{issued_here.name, issued_here.count, issued_here.root, {}});
            place->buffers.resize(static_cast<size_t>(ranks));
        }
        const std::shared_ptr<Collective> together = place;
        together->mismatch |= strcmp(together->name, issued_here.name) != 0 || together->count != issued_here.count;
        together->buffers[static_cast<size_t>(rank)] = issued_here.buffer;
        if (++together->arrived == ranks && !together->mismatch) {
            strcmp(together->name, "all_reduce") == 0 ? together->sum() : together->copy();
            together->done = true;
            group->collectives.erase(number);
            group->changed.notify_all();
        }
        group->changed.wait(lock, [&] { return aborted || together->done; });
        return together->done;
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
            std::scoped_lock lock(mutex, group->mutex);
            aborted = true;
        }
        changed.notify_all();
        group->changed.notify_all();
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
    static std::atomic<uint64_t> made{0};
    *id = {};
    const uint64_t number = ++made;
    memcpy(id->bytes, &number, sizeof number);
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
    *communicator = new Communicator(ranks, rank, group_of(id));
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
