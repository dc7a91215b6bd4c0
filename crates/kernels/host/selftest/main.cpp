// Tests of the stand-ins through their C functions. main KERNELS.cu HEADER...: runs all;
// main --crash NAME KERNELS.cu HEADER...: writes out of bounds, for the address sanitizer.
#include "api.h"

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "types.cuh"

namespace {

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);         \
            exit(1);                                                                \
        }                                                                           \
    } while (false)

constexpr int INVALID_VALUE = 1, OUT_OF_MEMORY = 2, ECC = 214, ILLEGAL_ADDRESS = 700, RESOURCES = 701,
              LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901;

std::string read(const std::string& path) {
    std::ifstream file(path);
    std::stringstream text;
    text << file.rdbuf();
    CHECK(file.good());
    return text.str();
}

// Status of NVRTC, and the library or the log.
std::pair<int, std::string> compile(const std::string& source, const std::vector<std::string>& headers) {
    std::vector<std::string> texts, names;
    std::vector<const char*> text_pointers, name_pointers;
    for (const std::string& path : headers) {
        texts.push_back(read(path));
        names.push_back(std::filesystem::path(path).filename());
    }
    for (size_t i = 0; i < headers.size(); i++) {
        text_pointers.push_back(texts[i].c_str());
        name_pointers.push_back(names[i].c_str());
    }
    void* program;
    CHECK(nvrtcCreateProgram(&program, source.c_str(), "kernels.cu", static_cast<int>(headers.size()),
                             text_pointers.data(), name_pointers.data()) == 0);
    const char* options[] = {"--gpu-architecture=sm_80", "-std=c++17", "--ptxas-options=-v"};
    const int status = nvrtcCompileProgram(program, 3, options);
    size_t size;
    CHECK((status == 0 ? nvrtcGetCUBINSize : nvrtcGetProgramLogSize)(program, &size) == 0);
    std::string out(size, 0);
    CHECK((status == 0 ? nvrtcGetCUBIN : nvrtcGetProgramLog)(program, out.data()) == 0);
    CHECK(nvrtcDestroyProgram(&program) == 0);
    return {status, out};
}

// A context with its own stream; after a fault it is opened anew.
struct Gpu {
    void *context = nullptr, *stream = nullptr, *module = nullptr;
    std::string image;

    void open() {
        CHECK(cuDevicePrimaryCtxRetain(&context, 0) == 0);
        CHECK(cuCtxSetCurrent(context) == 0);
        CHECK(cuStreamCreate(&stream, 1) == 0);
        CHECK(cuModuleLoadData(&module, image.data()) == 0);
    }
    void reopen() {
        CHECK(cuStreamDestroy_v2(stream) == 0);
        CHECK(cuDevicePrimaryCtxRelease_v2(0) == 0);
        open();
    }
    template <typename P>
    int launch(const char* name, u32 blocks, u32 threads, u32 shared, const P& params) {
        void* function;
        CHECK(cuModuleGetFunction(&function, module, name) == 0);
        void* pointers[] = {const_cast<P*>(&params)};
        return cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, pointers, nullptr);
    }
    // Launches and waits; the message of a failed launch.
    template <typename P>
    std::string failure(const char* name, u32 threads, u32 shared, const P& params) {
        CHECK(launch(name, 1, threads, shared, params) == 0);
        CHECK(cuStreamSynchronize(stream) == LAUNCH_FAILED);
        reopen();
        return ferrotune_host_last_error();
    }
};
Gpu gpu;

// An array on the device.
template <typename T>
struct Array {
    uint64_t at = 0;
    size_t count;
    explicit Array(size_t count) : count(count) {
        CHECK(cuMemAllocAsync(&at, count * sizeof(T), gpu.stream) == 0);
    }
    explicit Array(const std::vector<T>& values) : Array(values.size()) {
        CHECK(cuMemcpyHtoDAsync_v2(at, values.data(), count * sizeof(T), gpu.stream) == 0);
        CHECK(cuStreamSynchronize(gpu.stream) == 0); // until then the values must stay
    }
    ~Array() { cuMemFreeAsync(at, gpu.stream); }
    Array(const Array&) = delete;
    T* ptr() const { return reinterpret_cast<T*>(at); }
    std::vector<T> values() const {
        std::vector<T> out(count);
        CHECK(cuMemcpyDtoHAsync_v2(out.data(), at, count * sizeof(T), gpu.stream) == 0);
        CHECK(cuStreamSynchronize(gpu.stream) == 0);
        return out;
    }
};

struct Group {
    const bf16* a;
    const bf16* b;
    f32* d;
    u32 wrong, unused;
};
// As the driver numbers them.
constexpr unsigned BF16 = 9, SWIZZLE_128 = 3;
struct alignas(64) Map {
    u64 words[16];
};
struct Boxed {
    Map map;
    f32* out;
    u32 rows, head, row[2];
    u32 wrong, bytes;
};
struct BoxedProduct {
    Map map;
    f32* d;
    u32 wrong, unused;
};
struct Tile {
    const bf16* a;
    const bf16* b;
    f32* d;
};
struct Values {
    const f32* in;
    f32* out;
    u32 count;
};
struct Reduce {
    const f32* in;
    f64* out;
};

void set_seed(int seed) { setenv("FERROTUNE_HOST_SEED", std::to_string(1000 * seed).c_str(), 1); }

std::vector<f32> integers(size_t count, u32 seed) {
    std::vector<f32> out(count);
    for (f32& v : out) {
        seed = seed * 1664525 + 1013904223;
        v = static_cast<f32>(seed >> 24) - 128;
    }
    return out;
}

std::vector<bf16> as_bf16(const std::vector<f32>& values, size_t rows, size_t columns, bool transposed) {
    std::vector<bf16> out(values.size());
    for (size_t i = 0; i < rows; i++) {
        for (size_t j = 0; j < columns; j++) {
            out[transposed ? j * rows + i : i * columns + j] = from_f32<bf16>(values[i * columns + j]);
        }
    }
    return out;
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// Every path to the tensor cores against the plain product of integers, which is exact.
void fragments() {
    const std::vector<f32> a = integers(16 * 16, 1), b = integers(8 * 16, 2);
    std::vector<f32> want(16 * 8, 1);
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 8; j++) {
            for (int k = 0; k < 16; k++) {
                want[i * 8 + j] += a[i * 16 + k] * b[j * 16 + k];
            }
        }
    }
    const struct {
        const char* name;
        bool a_transposed, b_transposed;
    } cases[] = {{"mma_by_hand_1", false, false},   {"mma_ldmatrix_nt", false, false},
                 {"mma_ldmatrix_nn", false, true},  {"mma_ldmatrix_tt", true, false},
                 {"mma_ldmatrix_tn", true, true}};
    for (const auto& c : cases) {
        Array<bf16> da(as_bf16(a, 16, 16, c.a_transposed)), db(as_bf16(b, 8, 16, c.b_transposed));
        Array<f32> d(16 * 8);
        CHECK(gpu.launch(c.name, 1, 32, (16 * 16 + 8 * 16) * 2, Tile{da.ptr(), db.ptr(), d.ptr()}) == 0);
        CHECK(d.values() == want);
    }
}

// Products of a warpgroup against the plain ones, and what must be caught.
void warpgroups() {
    const std::vector<f32> a = integers(64 * 64, 6), b = integers(64 * 128, 7);
    Array<bf16> da(as_bf16(a, 64, 64, false)), db(as_bf16(b, 64, 128, false));
    for (const bool in_registers : {false, true}) {
        const int columns = in_registers ? 128 : 96;
        const char* name = in_registers ? "group_registers_1" : "group_shared_1";
        std::vector<f32> want(64 * columns, 1);
        for (int i = 0; i < 64; i++) {
            for (int j = 0; j < columns; j++) {
                for (int k = 0; k < 64; k++) {
                    want[i * columns + j] += a[i * 64 + k] * (in_registers ? b[k * 128 + j] : b[j * 64 + k]);
                }
            }
        }
        Array<f32> d(64 * columns);
        const auto group = [&](u32 wrong) { return Group{da.ptr(), db.ptr(), d.ptr(), wrong, 0}; };
        for (int seed = 0; seed < 20; seed++) {
            set_seed(seed);
            CHECK(gpu.launch(name, 1, 128, 32 << 10, group(0)) == 0);
            CHECK(d.values() == want);
        }
        CHECK(contains(gpu.failure(name, 128, 32 << 10, group(1)), "without fence_async_shared behind it"));
        CHECK(contains(gpu.failure(name, 128, 32 << 10, group(2)), "without wgmma_fence"));
        CHECK(contains(gpu.failure(name, 128, 32 << 10, group(3)), "without waiting for its products"));
        CHECK(contains(gpu.failure(name, 128, 32 << 10, group(4)), "512 bytes behind a multiple of 1024"));
    }
}

// A tensor [rows][heads][columns] whose rows are `pitch` elements, and boxes of 64 columns.
struct Tensor {
    uint64_t address, sizes[3], strides[2];
    uint32_t box[3], steps[3] = {1, 1, 1};
    unsigned type = BF16, swizzle = SWIZZLE_128;
    Tensor(uint64_t address, uint64_t rows, uint64_t heads, uint64_t columns, uint64_t pitch, uint32_t box_rows)
        : address(address), sizes{columns, heads, rows}, strides{2 * columns, 2 * pitch}, box{64, 1, box_rows} {}
    int encode(void* map) const {
        return cuTensorMapEncodeTiled(map, type, 3, reinterpret_cast<void*>(address), sizes, strides, box, steps, 0,
                                      swizzle, 2, 0);
    }
    Map map() const {
        Map map;
        CHECK(encode(&map) == 0);
        return map;
    }
};

void tensor_maps_are_checked() {
    Array<bf16> x(10 * 400);
    const Tensor good(x.at, 10, 4, 96, 400, 16);
    CHECK(good.map().words[0] != 0);
    const auto refused = [&](const char* why, auto change) {
        Tensor tensor = good;
        change(tensor);
        Map map;
        CHECK(tensor.encode(&map) == INVALID_VALUE);
        CHECK(contains(ferrotune_host_last_error(), why));
    };
    refused("not aligned to 64 bytes, or the tensor not to 16", [](Tensor& t) { t.address += 8; });
    refused("not aligned to 64 bytes, or the tensor not to 16", [](Tensor& t) { t.address = 0; });
    refused("dimension 2 has 0 elements", [](Tensor& t) { t.sizes[2] = 0; });
    refused("dimension 1 has a stride of 200 bytes", [](Tensor& t) { t.strides[0] = 200; });
    refused("dimension 2 has a stride of 1099511627776 bytes", [](Tensor& t) { t.strides[1] = uint64_t(1) << 40; });
    refused("dimension 2 has a box of 257", [](Tensor& t) { t.box[2] = 257; });
    refused("dimension 1 has a box of 0", [](Tensor& t) { t.box[1] = 0; });
    refused("in steps of 9", [](Tensor& t) { t.steps[2] = 9; });
    refused("a row of 144 bytes", [](Tensor& t) { t.box[0] = 72; });
    refused("a row of 24 bytes", [](Tensor& t) { t.box[0] = 12; });
    refused("a row of 128 bytes of the box, at most 64", [](Tensor& t) { t.swizzle = 2; });
    refused("a type, rank, swizzle", [](Tensor& t) { t.type = 40; });
    refused("no allocation holds", [](Tensor& t) { t.sizes[2] = 11; });
    alignas(64) u8 bytes[192];
    CHECK(good.encode(bytes + 32) == INVALID_VALUE);
}

// How many of `runs` seeds find out that a kernel is wrong; not every order shows it.
template <typename P>
int failures(const char* name, u32 threads, u32 shared, const P& params, int runs) {
    int failed = 0;
    for (int seed = 0; seed < runs; seed++) {
        set_seed(seed);
        CHECK(gpu.launch(name, 1, threads, shared, params) == 0);
        if (cuStreamSynchronize(gpu.stream) != 0) {
            failed++;
            gpu.reopen();
        }
    }
    return failed;
}

// Boxes of a tensor, what they have beyond its columns and rows, and what must be caught.
void boxes() {
    constexpr u32 COLUMNS = 96, HEADS = 3, ROWS = 20, PITCH = 304, BOX = 16;
    const std::vector<f32> values = integers(ROWS * PITCH, 11);
    Array<bf16> x(as_bf16(values, ROWS, PITCH, false));
    const Map map = Tensor(x.at, ROWS, HEADS, COLUMNS, PITCH, BOX).map();
    Array<f32> out(2 * BOX * 64);
    const auto boxed = [&](u32 wrong) { return Boxed{map, out.ptr(), BOX, 1, {2, 13}, wrong, BOX * 128}; };
    for (int seed = 0; seed < 20; seed++) {
        set_seed(seed);
        CHECK(gpu.launch("two_boxes_1", 1, 64, 4 << 10, boxed(0)) == 0);
        const std::vector<f32> got = out.values();
        for (u32 at = 0; at < 2 * BOX * 64; at++) {
            const u32 row = at / 64 % BOX + (at < BOX * 64 ? 2 : 13), column = 64 + at % 64;
            CHECK(got[at] == (row < ROWS && column < COLUMNS ? values[row * PITCH + COLUMNS + column] : 0));
        }
    }
    const struct {
        u32 wrong;
        const char* caught;
    } cases[] = {{1, "without mbarrier_init"},
                 {2, "without fence_async_shared behind its mbarrier_init"},
                 {4, "64 threads (the first is 0) wait at an mbarrier (phase 0, which misses 1 arrivals and 0 bytes)"},
                 {6, "a barrier that was written over"},
                 {7, ""}, // waits for ever, or not at all
                 {8, "64 bytes behind a multiple of 128"},
                 {9, "outside of dynamic shared memory"},
                 {10, "without fence_async_shared behind it"}};
    for (const auto& c : cases) {
        for (int seed = 0; seed < 5; seed++) {
            set_seed(seed);
            CHECK(contains(gpu.failure("two_boxes_1", 64, 4 << 10, boxed(c.wrong)), c.caught));
        }
    }
    for (const u32 wrong : {3, 5, 11, 12}) {
        CHECK(failures("two_boxes_1", 64, 4 << 10, boxed(wrong), 20) > 5);
    }
    for (const int more : {-128, 128}) {
        Boxed wrong = boxed(0);
        wrong.bytes = static_cast<u32>(static_cast<int>(wrong.bytes) + more);
        const std::string misses = "which misses 0 arrivals and " + std::to_string(more) + " bytes";
        CHECK(contains(gpu.failure("two_boxes_1", 64, 4 << 10, wrong), misses.c_str()));
    }
    Boxed none = boxed(0);
    none.map = {};
    CHECK(contains(gpu.failure("two_boxes_1", 64, 4 << 10, none), "without a tensor map"));
}

// Products of boxes, and those that begin too early or end too late.
void products_of_boxes() {
    const std::vector<f32> values = integers(128 * 64, 12);
    std::vector<f32> want(64 * 64);
    for (int i = 0; i < 64; i++) {
        for (int j = 0; j < 64; j++) {
            for (int k = 0; k < 64; k++) {
                want[i * 64 + j] += values[i * 64 + k] * values[(64 + j) * 64 + k];
            }
        }
    }
    Array<bf16> x(as_bf16(values, 128, 64, false));
    Array<f32> d(64 * 64);
    const Map map = Tensor(x.at, 128, 1, 64, 64, 64).map();
    const auto product = [&](u32 wrong) { return BoxedProduct{map, d.ptr(), wrong, 0}; };
    for (int seed = 0; seed < 20; seed++) {
        set_seed(seed);
        CHECK(gpu.launch("box_product_1", 1, 128, 18 << 10, product(0)) == 0);
        CHECK(d.values() == want);
    }
    CHECK(failures("box_product_1", 128, 18 << 10, product(1), 20) > 5);
    int wrong = failures("box_product_1", 128, 18 << 10, product(2), 20);
    for (int seed = 0; seed < 20; seed++) {
        set_seed(seed);
        CHECK(gpu.launch("box_product_1", 1, 128, 18 << 10, product(2)) == 0);
        if (cuStreamSynchronize(gpu.stream) != 0) {
            gpu.reopen();
        } else {
            wrong += d.values() != want;
        }
    }
    CHECK(wrong > 10);
}

void reductions() {
    for (u32 threads : {32u, 64u, 96u, 256u, 1024u}) {
        const std::vector<f32> in = integers(threads, threads);
        f64 sum = 0, max = -1e9;
        u32 index = 0;
        for (u32 i = 0; i < threads; i++) {
            sum += in[i];
            index = in[i] > max ? i : index;
            max = std::fmax(max, in[i]);
        }
        const std::vector<f64> one = {sum, sum, 2 * sum, max, sum, max, static_cast<f64>(index),
                                      threads * (threads - 1) / 2.0};
        std::vector<f64> want = one;
        want.insert(want.end(), one.begin(), one.end());
        Array<f32> device(in);
        for (int seed = 0; seed < 20; seed++) {
            set_seed(seed);
            Array<f64> out(16);
            CHECK(gpu.launch("reduce_all_1", 2, threads, 0, Reduce{device.ptr(), out.ptr()}) == 0);
            CHECK(out.values() == want);
        }
    }
}

void shuffles() {
    Array<u32> out(5 * 32);
    CHECK(gpu.launch("shuffles_1", 1, 32, 0, out.ptr()) == 0);
    const std::vector<u32> got = out.values();
    for (u32 lane = 0; lane < 32; lane++) {
        CHECK(got[lane] == (lane ^ 5));
        CHECK(got[32 + lane] == (lane < 29 ? lane + 3 : lane));
        CHECK(got[64 + lane] == (lane >= 3 ? lane - 3 : lane));
        CHECK(got[96 + lane] == lane / 2);
        CHECK(got[128 + lane] == 0x49249249u);
    }
}

// Every bf16 survives; values between two go to the nearer one, from the middle to the even one.
void conversions() {
    std::vector<f32> in, want;
    for (u32 bits = 0; bits < 0x10000; bits++) {
        const f32 here = bits_float(bits << 16), next = bits_float((bits + 1) << 16);
        if (std::isnan(here) || (bits & 0x7fff) == 0x7f80) {
            continue;
        }
        in.insert(in.end(), {here, bits_float(bits << 16 | 0x7fff), bits_float(bits << 16 | 0x8000),
                             bits_float(bits << 16 | 0x8001)});
        want.insert(want.end(), {here, here, bits % 2 == 0 ? here : next, next});
    }
    Array<f32> device(in), out(in.size());
    CHECK(gpu.launch("through_bf16_1", 64, 256, 0,
                     Values{device.ptr(), out.ptr(), static_cast<u32>(in.size())}) == 0);
    const std::vector<f32> got = out.values();
    CHECK(memcmp(got.data(), want.data(), got.size() * sizeof(f32)) == 0);
    CHECK(round_to_bf16(bits_float(0x7f800001)) == 0x7fc0 && round_to_bf16(bits_float(0xffff1234)) == 0xffff);
}

void shared_memory_and_copies() {
    Array<f32> stale(8 * 64);
    CHECK(gpu.launch("stale_shared_1", 8, 64, 256, Values{nullptr, stale.ptr(), 0}) == 0);
    CHECK(stale.values() == std::vector<f32>(8 * 64, 1));

    const std::vector<f32> in = integers(128, 3);
    Array<f32> device(in), out(5 * 32);
    CHECK(gpu.launch("copies_1", 1, 32, 1024, Values{device.ptr(), out.ptr(), 4}) == 0);
    const std::vector<f32> got = out.values();
    for (size_t i = 0; i < 32; i++) {
        CHECK(std::isnan(got[i]));
        CHECK(got[32 + i] == in[4 * i] && got[64 + i] == 0);
        CHECK(std::isnan(got[96 + i]));
        CHECK(got[128 + i] == in[4 * i]);
    }

    Array<f32> reversed(64);
    CHECK(gpu.launch("early_exit_1", 1, 64, 0, Values{device.ptr(), reversed.ptr(), 40}) == 0);
    const std::vector<f32> back = reversed.values();
    for (size_t i = 0; i < 64; i++) {
        CHECK(i < 40 ? back[i] == in[39 - i] : std::isnan(back[i]));
    }

    Array<f32> turned(128);
    CHECK(gpu.launch("teams_1", 1, 128, 0, Values{device.ptr(), turned.ptr(), 0}) == 0);
    const std::vector<f32> turns = turned.values();
    for (size_t i = 0; i < 64; i++) {
        CHECK(turns[i] == in[63 - i] && turns[64 + i] == in[64 + i]);
    }
}

void wrong_kernels_are_caught() {
    const std::vector<f32> in = integers(64, 4);
    Array<f32> device(in), out(64);
    const Values p = {device.ptr(), out.ptr(), 64};
    std::set<std::string> results;
    for (int seed = 0; seed < 20; seed++) {
        set_seed(seed);
        CHECK(gpu.launch("missing_barrier_1", 1, 64, 0, p) == 0);
        const std::vector<f32> got = out.values();
        results.insert(std::string(reinterpret_cast<const char*>(got.data()), 256));
    }
    CHECK(results.size() > 10);

    CHECK(contains(gpu.failure("half_warp_1", 64, 0, p), "32 threads (the first is 0) wait in a warp operation (shuffle_xor)"));
    CHECK(contains(gpu.failure("diverged_1", 64, 0, p), "diverged"));
    CHECK(contains(gpu.failure("mixed_1", 64, 0, p), "deadlock"));
    {
        Array<f32> both(integers(128, 5)), turned(128);
        CHECK(contains(gpu.failure("teams_1", 128, 0, Values{both.ptr(), turned.ptr(), 1}),
                       "63 threads (the first is 64) wait at a barrier of their team"));
    }
    CHECK(contains(gpu.failure("misaligned_1", 32, 0, p), "not aligned to 16"));
#if !defined(__SANITIZE_ADDRESS__)
    CHECK(contains(gpu.failure("shared_out_of_bounds_1", 32, 64, Values{nullptr, nullptr, 16}),
                   "past its 64 bytes of dynamic shared memory"));
    {
        Array<f32> ten(10);
        CHECK(gpu.launch("out_of_bounds_1", 1, 32, 0, Values{nullptr, ten.ptr(), 10}) == 0);
        CHECK(cuStreamSynchronize(gpu.stream) == ILLEGAL_ADDRESS);
        CHECK(contains(ferrotune_host_last_error(), "behind the allocation of 40 bytes"));
    }
    gpu.reopen();
    CHECK(cuStreamSynchronize(gpu.stream) == 0);
    uint64_t freed;
    {
        Array<f32> ten(10);
        freed = ten.at;
    }
    CHECK(gpu.launch("out_of_bounds_1", 1, 32, 0, Values{nullptr, reinterpret_cast<f32*>(freed), 5}) == 0);
    for (int i = 0; i < 40; i++) {
        Array<u8> large((1 << 20) - 1); // pushes it out of what is kept poisoned
    }
    CHECK(cuStreamSynchronize(gpu.stream) == ILLEGAL_ADDRESS);
    CHECK(contains(ferrotune_host_last_error(), "after it was freed"));
#endif
}

void launches_are_checked() {
    const Values none = {nullptr, nullptr, 0};
    CHECK(gpu.launch("add_one_1", 0, 32, 0, none) == INVALID_VALUE);
    CHECK(gpu.launch("add_one_1", 1, 96, 0, none) == RESOURCES);
    CHECK(gpu.launch("add_one_1", 1, 32, 64 << 10, none) == INVALID_VALUE);
}

void memory() {
    size_t free_bytes, total;
    CHECK(cuMemGetInfo_v2(&free_bytes, &total) == 0 && free_bytes == total && total == 1 << 24);
    uint64_t at;
    CHECK(cuMemAllocAsync(&at, total + 1, gpu.stream) == OUT_OF_MEMORY);
    {
        Array<f32> whole(total / 4);
        CHECK(whole.at % 256 == 0);
        CHECK(cuMemAllocAsync(&at, 1, gpu.stream) == OUT_OF_MEMORY);
        CHECK(std::isnan(whole.values()[total / 4 - 1]));
        CHECK(cuMemsetD8Async(whole.at + 4, 0, total - 3, gpu.stream) == INVALID_VALUE);
    }
    CHECK(cuMemGetInfo_v2(&free_bytes, &total) == 0 && free_bytes == total);
    CHECK(cuMemFreeAsync(12345, gpu.stream) == INVALID_VALUE);
}

void failures_stick() {
    Array<f32> some(4);
    CHECK(ferrotune_host_inject("nonsense") == 1);
    CHECK(ferrotune_host_inject("fill:1:214") == 0);
    CHECK(cuMemsetD8Async(some.at, 0, 16, gpu.stream) == 0);
    CHECK(cuMemsetD8Async(some.at, 0, 16, gpu.stream) == ECC);
    CHECK(cuStreamSynchronize(gpu.stream) == ECC);
    CHECK(cuMemsetD8Async(some.at, 0, 16, gpu.stream) == ECC);
    gpu.reopen();
    CHECK(ferrotune_host_inject("alloc:0:2") == 0);
    uint64_t at;
    CHECK(cuMemAllocAsync(&at, 16, gpu.stream) == OUT_OF_MEMORY);
    CHECK(cuMemsetD8Async(some.at, 0, 16, gpu.stream) == 0);
}

// Recorded work runs at each replay and not before; a wait breaks the recording.
void graphs() {
    Array<f32> x(std::vector<f32>(64, 5));
    void *graph, *executable;
    CHECK(cuStreamBeginCapture_v2(gpu.stream, 2) == 0);
    CHECK(cuMemsetD8Async(x.at, 0, 32 * sizeof(f32), gpu.stream) == 0);
    CHECK(gpu.launch("add_one_1", 1, 64, 0, Values{x.ptr(), x.ptr(), 64}) == 0);
    CHECK(cuStreamEndCapture(gpu.stream, &graph) == 0);
    CHECK(x.values() == std::vector<f32>(64, 5));
    CHECK(cuGraphInstantiateWithFlags(&executable, graph, 0) == 0);
    CHECK(cuGraphDestroy(graph) == 0);
    for (int i = 1; i <= 3; i++) {
        CHECK(cuGraphLaunch(executable, gpu.stream) == 0);
        const std::vector<f32> got = x.values();
        CHECK(got[0] == 1 && got[63] == static_cast<f32>(5 + i));
    }
    CHECK(cuGraphExecDestroy(executable) == 0);

    CHECK(cuStreamBeginCapture_v2(gpu.stream, 2) == 0);
    CHECK(cuStreamSynchronize(gpu.stream) == CAPTURE_UNSUPPORTED);
    CHECK(cuStreamEndCapture(gpu.stream, &graph) == CAPTURE_INVALIDATED);
    CHECK(cuStreamSynchronize(gpu.stream) == 0);
}

// A second stream, and a point of either.
struct Side {
    void *stream = nullptr, *event = nullptr;
    Side() {
        CHECK(cuStreamCreate(&stream, 1) == 0);
        CHECK(cuEventCreate(&event, 0) == 0);
    }
    ~Side() {
        CHECK(cuEventDestroy_v2(event) == 0);
        CHECK(cuStreamDestroy_v2(stream) == 0);
    }
    // `then` goes on behind what is on `first`.
    void order(void* first, void* then) {
        CHECK(cuEventRecord(event, first) == 0);
        CHECK(cuStreamWaitEvent(then, event, 0) == 0);
    }
};

// Runs `body`, or what is recorded of it.
void issued_or_recorded(bool recorded, const std::function<void()>& body) {
    if (!recorded) {
        return body();
    }
    void *graph, *executable;
    CHECK(cuStreamBeginCapture_v2(gpu.stream, 2) == 0);
    body();
    CHECK(cuStreamEndCapture(gpu.stream, &graph) == 0);
    CHECK(cuGraphInstantiateWithFlags(&executable, graph, 0) == 0);
    CHECK(cuGraphDestroy(graph) == 0);
    CHECK(cuGraphLaunch(executable, gpu.stream) == 0);
    CHECK(cuGraphExecDestroy(executable) == 0);
}

// What is written on one stream and read on the other: `late` forgets a wait of the reader, `early` one of the
// writer, where work is held back in that order.
void streams(const std::string& mode) {
    const bool late = mode == "late", early = mode == "early";
    for (const bool recorded : {false, true}) {
        for (const bool waits : {true, false}) {
            Array<f32> x(std::vector<f32>(64, 5)), y(std::vector<f32>(64, 9));
            Side side;
            issued_or_recorded(recorded, [&] {
                side.order(gpu.stream, side.stream);
                CHECK(cuMemsetD8Async(x.at, 0, 256, side.stream) == 0);
                if (waits) {
                    side.order(side.stream, gpu.stream);
                }
                CHECK(cuMemcpyDtoDAsync_v2(y.at, x.at, 256, gpu.stream) == 0);
                side.order(side.stream, gpu.stream);
            });
            CHECK(y.values() == std::vector<f32>(64, !waits && late ? 5 : 0));
        }
        for (const bool waits : {true, false}) {
            Array<f32> x(std::vector<f32>(64, 5)), y(std::vector<f32>(64, 9));
            Side side;
            issued_or_recorded(recorded, [&] {
                side.order(gpu.stream, side.stream);
                CHECK(gpu.launch("add_one_1", 1, 64, 0, Values{x.ptr(), x.ptr(), 64}) == 0);
                CHECK(cuMemcpyDtoDAsync_v2(y.at, x.at, 256, gpu.stream) == 0);
                if (waits) {
                    side.order(gpu.stream, side.stream);
                }
                CHECK(cuMemsetD8Async(x.at, 0, 256, side.stream) == 0);
                side.order(side.stream, gpu.stream);
            });
            CHECK(y.values() == std::vector<f32>(64, !waits && early ? 1 : 6));
            CHECK(x.values() == std::vector<f32>(64, !waits && early ? 1 : 0));
        }
    }
    // A recording holds all that takes part in it, and nothing else.
    Side side, other;
    Array<f32> x(1);
    void* graph;
    CHECK(cuEventRecord(other.event, other.stream) == 0);
    CHECK(cuStreamBeginCapture_v2(gpu.stream, 2) == 0);
    side.order(gpu.stream, side.stream);
    CHECK(cuEventQuery(side.event) == 907);
    CHECK(cuMemsetD8Async(x.at, 0, 4, side.stream) == 0);
    CHECK(cuStreamEndCapture(gpu.stream, &graph) == 904);
    CHECK(cuStreamBeginCapture_v2(gpu.stream, 2) == 0);
    CHECK(cuStreamWaitEvent(gpu.stream, other.event, 0) == 905);
    CHECK(cuStreamEndCapture(gpu.stream, &graph) == CAPTURE_INVALIDATED);
    CHECK(cuStreamSynchronize(gpu.stream) == 0);
}

struct Shape {
    bool a_transposed, b_transposed, bf16_in, bf16_out;
    size_t m, n, k;
};

// The descriptors of a product.
struct Product {
    void *handle, *op, *a, *b, *d, *preference;
    Product(const Shape& s, size_t a_pitch, size_t b_pitch, size_t d_pitch) {
        const int in = s.bf16_in ? 14 : 0, out = s.bf16_out ? 14 : 0;
        const int ta = s.a_transposed, tb = s.b_transposed;
        CHECK(cublasLtCreate(&handle) == 0);
        CHECK(cublasLtMatmulDescCreate(&op, 68, 0) == 0);
        CHECK(cublasLtMatmulDescSetAttribute(op, 3, &ta, 4) == 0);
        CHECK(cublasLtMatmulDescSetAttribute(op, 4, &tb, 4) == 0);
        CHECK(cublasLtMatrixLayoutCreate(&a, in, ta ? s.k : s.m, ta ? s.m : s.k, static_cast<i64>(a_pitch)) == 0);
        CHECK(cublasLtMatrixLayoutCreate(&b, in, tb ? s.n : s.k, tb ? s.k : s.n, static_cast<i64>(b_pitch)) == 0);
        CHECK(cublasLtMatrixLayoutCreate(&d, out, s.m, s.n, static_cast<i64>(d_pitch)) == 0);
        CHECK(cublasLtMatmulPreferenceCreate(&preference) == 0);
    }
    ~Product() {
        cublasLtMatmulPreferenceDestroy(preference);
        cublasLtMatrixLayoutDestroy(d);
        cublasLtMatrixLayoutDestroy(b);
        cublasLtMatrixLayoutDestroy(a);
        cublasLtMatmulDescDestroy(op);
        cublasLtDestroy(handle);
    }
};

template <typename T>
std::vector<T> convert(const std::vector<f32>& values) {
    std::vector<T> out;
    for (f32 v : values) {
        out.push_back(from_f32<T>(v));
    }
    return out;
}

// Small integers: every order of summation gives the same bits.
template <typename In, typename Out>
void product(const Shape& s) {
    const size_t a_pitch = (s.a_transposed ? s.k : s.m) + 3, b_pitch = (s.b_transposed ? s.n : s.k) + 1,
                 d_pitch = s.m + 2;
    std::vector<f32> a = integers(a_pitch * (s.a_transposed ? s.m : s.k), 5);
    std::vector<f32> b = integers(b_pitch * (s.b_transposed ? s.k : s.n), 6);
    std::vector<f32> c = integers(d_pitch * s.n, 7);
    for (auto* x : {&a, &b}) {
        for (f32& v : *x) {
            v = std::fmod(v, 3.0f);
        }
    }
    std::vector<f32> want = c;
    for (size_t j = 0; j < s.n; j++) {
        for (size_t i = 0; i < s.m; i++) {
            f32 sum = 0;
            for (size_t k = 0; k < s.k; k++) {
                sum += a[s.a_transposed ? i * a_pitch + k : k * a_pitch + i] *
                       b[s.b_transposed ? k * b_pitch + j : j * b_pitch + k];
            }
            want[j * d_pitch + i] = to_f32(from_f32<Out>(0.5f * sum + 2 * c[j * d_pitch + i]));
        }
    }
    Array<In> da(convert<In>(a)), db(convert<In>(b));
    const Product p(s, a_pitch, b_pitch, d_pitch);
    u64 results[3 * 12];
    int found;
    CHECK(cublasLtMatmulAlgoGetHeuristic(p.handle, p.op, p.a, p.b, p.d, p.d, p.preference, 3, results,
                                         &found) == 0);
    CHECK(found == 3);
    const f32 alpha = 0.5f, beta = 2;
    for (int algorithm = 0; algorithm < 3; algorithm++) {
        Array<Out> dd(convert<Out>(c));
        CHECK(cublasLtMatmul(p.handle, p.op, &alpha, da.ptr(), p.a, db.ptr(), p.b, &beta, dd.ptr(), p.d,
                             dd.ptr(), p.d, results + 12 * algorithm, nullptr, 0, gpu.stream) == 0);
        const std::vector<Out> got = dd.values();
        for (size_t i = 0; i < want.size(); i++) {
            CHECK(to_f32(got[i]) == want[i]);
        }
    }
    // Promised alignment and allocated range are held against the pointers.
    Array<Out> small(1);
    CHECK(cublasLtMatmul(p.handle, p.op, &alpha, da.ptr() + 1, p.a, db.ptr(), p.b, &beta, small.ptr(),
                         p.d, small.ptr(), p.d, results, nullptr, 0, gpu.stream) == 15);
    CHECK(cublasLtMatmul(p.handle, p.op, &alpha, da.ptr(), p.a, db.ptr(), p.b, &beta, small.ptr(), p.d,
                         small.ptr(), p.d, results, nullptr, 0, gpu.stream) == 13);
}

void products() {
    for (const auto& [m, n, k] : {std::array<size_t, 3>{1, 2, 1}, {33, 9, 40}, {70, 37, 300}}) {
        for (int op = 0; op < 3; op++) {
            const bool ta = op == 0, tb = op == 2;
            product<f32, f32>({ta, tb, false, false, m, n, k});
            product<bf16, f32>({ta, tb, true, false, m, n, k});
            product<bf16, bf16>({ta, tb, true, true, m, n, k});
        }
    }
}

void compile_errors(const std::vector<std::string>& headers) {
    const auto [status, log] = compile("#include \"types.cuh\"\n\nint x = nothing;\n", headers);
    CHECK(status == 6 && contains(log, "kernels.cu:3:") && contains(log, "nothing"));
}

} // namespace

int main(int argc, char** argv) {
    const bool crash = argc > 2 && strcmp(argv[1], "--crash") == 0;
    const std::string name = crash ? argv[2] : "";
    char** files = argv + (crash ? 3 : 1);
    const std::vector<std::string> headers(files + 1, argv + argc);
    setenv("FERROTUNE_HOST_MEMORY", "16777216", 1);
    CHECK(cuInit(0) == 0);
    const auto [status, image] = compile(read(files[0]), headers);
    if (status != 0) {
        fprintf(stderr, "%s", image.c_str());
        return 1;
    }
    gpu.image = image;
    gpu.open();
    if (crash) {
        Array<f32> ten(10);
        CHECK(gpu.launch(name.c_str(), 1, 32, 40, Values{nullptr, ten.ptr(), 10}) == 0);
        return 0;
    }
    const char* held_back = getenv("FERROTUNE_HOST_STREAMS");
    streams(held_back != nullptr ? held_back : "");
    if (held_back != nullptr) {
        printf("self test: streams held back, %s\n", held_back);
        return 0;
    }
    memory();
    fragments();
    warpgroups();
    tensor_maps_are_checked();
    boxes();
    products_of_boxes();
    reductions();
    shuffles();
    conversions();
    shared_memory_and_copies();
    launches_are_checked();
    failures_stick();
    graphs();
    products();
    compile_errors(headers);
    wrong_kernels_are_caught();
    puts("self test: all passed");
}
