// Rows of hidden states in and out, the loss of a chunk of logits, and its gradient in place.
#include "types.cuh"
#include "reduce.cuh"

// One row per block: to[i] = hidden[rows[i]], or hidden[rows[i]] += to[i]. Padding reads zeros and
// adds nothing.
struct Rows {
    void* hidden;
    void* packed; // [gridDim.x, cols]
    const u32* rows;
    u64 pitch; // of hidden
    u32 cols, vectors; // vectors: both sides move by 16 bytes
    u32 padding, unused; // padding: no row
};

template <typename T>
DEVICE void gather(const Rows& p) {
    const u32 row = p.rows[blockIdx.x];
    const T* from = static_cast<const T*>(p.hidden) + row * p.pitch;
    T* to = static_cast<T*>(p.packed) + static_cast<u64>(blockIdx.x) * p.cols;
    if (row == p.padding) {
        for (u32 c = threadIdx.x; c < p.cols; c += blockDim.x) {
            to[c] = from_f32<T>(0.0f);
        }
        return;
    }
    if (p.vectors) {
        for (u32 i = threadIdx.x; i < p.cols / LANES<T>; i += blockDim.x) {
            store_16(to + i * LANES<T>, load_16(from + i * LANES<T>));
        }
        return;
    }
    for (u32 c = threadIdx.x; c < p.cols; c += blockDim.x) {
        to[c] = from[c];
    }
}

template <typename T>
DEVICE void scatter_add(const Rows& p) {
    const u32 row = p.rows[blockIdx.x];
    if (row == p.padding) {
        return;
    }
    T* to = static_cast<T*>(p.hidden) + row * p.pitch;
    const T* from = static_cast<const T*>(p.packed) + static_cast<u64>(blockIdx.x) * p.cols;
    if (p.vectors) {
        for (u32 i = threadIdx.x; i < p.cols / LANES<T>; i += blockDim.x) {
            Vec16<T> sum = load_16(to + i * LANES<T>);
            const Vec16<T> add = load_16(from + i * LANES<T>);
#pragma unroll
            for (u32 l = 0; l < LANES<T>; l++) {
                sum[l] = from_f32<T>(to_f32(sum[l]) + to_f32(add[l]));
            }
            store_16(to + i * LANES<T>, sum);
        }
        return;
    }
    for (u32 c = threadIdx.x; c < p.cols; c += blockDim.x) {
        to[c] = from_f32<T>(to_f32(to[c]) + to_f32(from[c]));
    }
}

// Of one row.
struct RowSums {
    f64 loss, entropy;
};

struct Softmax {
    f32* logits; // [gridDim.x, vocabulary], rows `pitch` apart, aligned to 16
    const u32* targets;
    RowSums* sums;
    u32* correct;
    u64 pitch; // a multiple of 8
    u32 vocabulary, padding; // padding: the target of no row
    f32 smoothing, softcap;
};

// Some of the logits of a row: the largest, the first place that has it, sum of e = exp(z - max),
// sum of e (z - max).
struct Part {
    f32 max;
    u32 argmax;
    f32 sum, weighted;
};

DEVICE Part no_part() { return {-bits_float(0x7f800000u), 0xffffffffu, 0.0f, 0.0f}; }

// The same sums relative to a larger maximum.
DEVICE void raise(Part& part, f32 max) {
    if (part.sum != 0.0f) {
        const f32 shift = part.max - max, scale = expf(shift);
        part.weighted = fmaf(part.sum, shift, part.weighted) * scale;
        part.sum *= scale;
    }
    part.max = max;
}

DEVICE void add(Part& part, f32 z) {
    const f32 shift = z - part.max, e = expf(shift);
    part.sum += e;
    part.weighted = fmaf(e, shift, part.weighted);
}

DEVICE void add_one(Part& part, f32 z, u32 at) {
    if (z > part.max) {
        raise(part, z);
        part.argmax = at;
    }
    add(part, z);
}

DEVICE void add_four(Part& part, Vec16<f32> z, u32 at) {
    const f32 max = fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3]));
    if (max > part.max) {
        raise(part, max);
        part.argmax = at + (z[0] == max ? 0 : z[1] == max ? 1 : z[2] == max ? 2 : 3);
    }
#pragma unroll
    for (u32 l = 0; l < 4; l++) {
        add(part, z[l]);
    }
}

DEVICE Part merge(Part a, Part b) {
    const bool first = a.max > b.max || (a.max == b.max && a.argmax <= b.argmax);
    const u32 argmax = first ? a.argmax : b.argmax;
    const f32 max = first ? a.max : b.max;
    if (max > a.max) {
        raise(a, max);
    }
    if (max > b.max) {
        raise(b, max);
    }
    return {max, argmax, a.sum + b.sum, a.weighted + b.weighted};
}

DEVICE Part warp_merge(Part part) {
#pragma unroll
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) {
        part = merge(part, {shuffle_xor(part.max, mask), shuffle_xor(part.argmax, mask),
                            shuffle_xor(part.sum, mask), shuffle_xor(part.weighted, mask)});
    }
    return part;
}

constexpr u32 SOFTMAX_THREADS = 512;

// All threads call it and receive the same bits.
DEVICE Part block_merge(Part part) {
    SHARED Part parts[SOFTMAX_THREADS / WARP];
    part = warp_merge(part);
    const u32 lane = threadIdx.x % WARP;
    if (lane == 0) {
        parts[threadIdx.x / WARP] = part;
    }
    __syncthreads();
    return warp_merge(lane < blockDim.x / WARP ? parts[lane] : no_part());
}

// The part of a row that this thread reads. CAPPED: its logits are replaced by their capped values.
template <bool CAPPED>
DEVICE Part part_of_row(const Softmax& p, f32* z) {
    Part part = no_part();
    const u32 whole = p.vocabulary / 4 * 4;
    for (u32 v = 4 * threadIdx.x; v < whole; v += 4 * blockDim.x) {
        Vec16<f32> four = load_16(z + v);
        if constexpr (CAPPED) {
#pragma unroll
            for (u32 l = 0; l < 4; l++) {
                four[l] = p.softcap * tanhf(four[l] / p.softcap);
            }
            store_16(z + v, four);
        }
        add_four(part, four, v);
    }
    if (const u32 v = whole + threadIdx.x; v < p.vocabulary) {
        if constexpr (CAPPED) {
            z[v] = p.softcap * tanhf(z[v] / p.softcap);
        }
        add_one(part, z[v], v);
    }
    return part;
}

DEVICE f32 mean_of_row(const f32* z, u32 vocabulary) {
    f32 sum = 0.0f;
    for (u32 v = threadIdx.x; v < vocabulary; v += blockDim.x) {
        sum += z[v];
    }
    return block_sum(sum) / static_cast<f32>(vocabulary);
}

// Writes the row's loss, entropy and hit; returns its statistics to all threads.
template <bool CAPPED>
DEVICE Part statistics(const Softmax& p, f32* z, u32 target) {
    const Part row = block_merge(part_of_row<CAPPED>(p, z));
    // The logits are in cache by now, and the capped ones of all threads are there.
    const f32 mean = p.smoothing > 0.0f ? mean_of_row(z, p.vocabulary) : 0.0f;
    if (threadIdx.x == 0) {
        const f64 log_sum = logf(row.sum);
        const f64 smoothed = static_cast<f64>(p.smoothing) * (static_cast<f64>(z[target]) - mean);
        p.sums[blockIdx.x] = {static_cast<f64>(row.max) - z[target] + log_sum + smoothed,
                              log_sum - static_cast<f64>(row.weighted) / row.sum};
        p.correct[blockIdx.x] = row.argmax == target;
    }
    return row;
}

DEVICE f32* row_of(const Softmax& p) { return p.logits + blockIdx.x * p.pitch; }

// Writes that the row adds nothing, if it is padding; all threads call it.
DEVICE bool is_padding(const Softmax& p, u32 target) {
    if (target != p.padding) {
        return false;
    }
    if (threadIdx.x == 0) {
        p.sums[blockIdx.x] = {0.0, 0.0};
        p.correct[blockIdx.x] = 0;
    }
    return true;
}

template <bool CAPPED>
DEVICE void loss(const Softmax& p) {
    const u32 target = p.targets[blockIdx.x];
    if (!is_padding(p, target)) {
        statistics<CAPPED>(p, row_of(p), target);
    }
}

// The row's logits become softmax - q, where q is one hot but for label smoothing, times the slope of
// the softcap; as f32, or as bf16 from the start of the row on. A bf16 lies where a logit of half its
// index was: all threads read their logits of a round before any writes, and a round writes only where
// this or an earlier one has read.
template <typename G, bool CAPPED>
DEVICE void loss_and_gradient(const Softmax& p) {
    constexpr u32 EACH = LANES<G>;
    f32* z = row_of(p);
    G* gradient = reinterpret_cast<G*>(z);
    const u32 target = p.targets[blockIdx.x];
    if (is_padding(p, target)) {
        for (u32 v = threadIdx.x; v < p.vocabulary; v += blockDim.x) {
            gradient[v] = from_f32<G>(0.0f);
        }
        return;
    }
    const Part row = statistics<CAPPED>(p, z, target);
    const f32 factor = 1.0f / row.sum;
    const f32 cold = p.smoothing / static_cast<f32>(p.vocabulary);
    const f32 hot = 1.0f - p.smoothing + cold;
    for (u32 first = 0; first < p.vocabulary; first += EACH * blockDim.x) {
        const u32 v = first + EACH * threadIdx.x;
        Vec16<G> out;
        // Rows are padded to 16 bytes: what is read and written behind the last logit is padding.
        if (v < p.vocabulary) {
#pragma unroll
            for (u32 i = 0; i < EACH; i += 4) {
                const Vec16<f32> four = load_16(z + v + i);
#pragma unroll
                for (u32 l = 0; l < 4; l++) {
                    const f32 q = v + i + l == target ? hot : cold;
                    f32 d = fmaf(expf(four[l] - row.max), factor, -q);
                    if constexpr (CAPPED) {
                        const f32 tanh = four[l] / p.softcap;
                        d *= 1.0f - tanh * tanh;
                    }
                    out[i + l] = from_f32<G>(d);
                }
            }
        }
        __syncthreads();
        if (v < p.vocabulary) {
            store_16(gradient + v, out);
        }
    }
}

struct Reduce {
    const RowSums* sums;
    const u32* correct;
    const u32* targets;
    void* total; // struct Total
    u32 rows, padding;
};

struct Total {
    f64 loss, entropy;
    u64 correct, count;
};

// One block adds the rows to the total, in an order that depends on their number alone.
DEVICE void reduce(const Reduce& p) {
    RowSums sums = {0.0, 0.0};
    u32 correct = 0, count = 0;
    for (u32 i = threadIdx.x; i < p.rows; i += blockDim.x) {
        sums.loss += p.sums[i].loss;
        sums.entropy += p.sums[i].entropy;
        correct += p.correct[i];
        count += p.targets[i] != p.padding;
    }
    block_sum2(sums.loss, sums.entropy);
    correct = block_sum(correct);
    count = block_sum(count);
    if (threadIdx.x == 0) {
        Total& total = *static_cast<Total*>(p.total);
        total.loss += sums.loss;
        total.entropy += sums.entropy;
        total.correct += correct;
        total.count += count;
    }
}

KERNEL(linear_cross_entropy_gather_f32, 256, Rows, gather<f32>)
KERNEL(linear_cross_entropy_gather_bf16, 256, Rows, gather<bf16>)
KERNEL(linear_cross_entropy_scatter_add_f32, 256, Rows, scatter_add<f32>)
KERNEL(linear_cross_entropy_scatter_add_bf16, 256, Rows, scatter_add<bf16>)
KERNEL(linear_cross_entropy_loss, SOFTMAX_THREADS, Softmax, loss<false>)
KERNEL(linear_cross_entropy_gradient_f32, SOFTMAX_THREADS, Softmax, (loss_and_gradient<f32, false>))
KERNEL(linear_cross_entropy_gradient_bf16, SOFTMAX_THREADS, Softmax, (loss_and_gradient<bf16, false>))
KERNEL(linear_cross_entropy_capped_loss, SOFTMAX_THREADS, Softmax, loss<true>)
KERNEL(linear_cross_entropy_capped_gradient_f32, SOFTMAX_THREADS, Softmax, (loss_and_gradient<f32, true>))
KERNEL(linear_cross_entropy_capped_gradient_bf16, SOFTMAX_THREADS, Softmax, (loss_and_gradient<bf16, true>))
KERNEL(linear_cross_entropy_reduce, 256, Reduce, reduce)
