// Varlen causal attention. The sources before this one: work.cuh, mma.cuh, fma.cuh, forward.cuh,
// backward.cuh. Rows per warp and tile sizes are chosen so that no accumulator leaves registers and
// that dynamic shared memory stays within 99 KiB; mod.rs repeats them.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr u32 FORWARD_COLUMNS = WIDTH <= 64 ? 64 : 32;
constexpr u32 BACKWARD_COLUMNS = WIDTH == 128 ? 16 : 32;
#else
constexpr u32 FORWARD_COLUMNS = WIDTH == 128 ? 48 : WIDTH == 256 ? 32 : 64;
constexpr u32 BACKWARD_COLUMNS = 32;
#endif

using ForwardMma = Mma<(WIDTH <= 128 ? 2 : 1), FORWARD_COLUMNS>;
using BackwardQMma = Mma<(WIDTH <= 128 ? 2 : 1), BACKWARD_COLUMNS>;
using BackwardKvMma = Mma<(WIDTH <= 64 ? 2 : 1), BACKWARD_COLUMNS>;
constexpr u32 STAGES = WIDTH <= 128 ? 2 : 1;
constexpr u32 KV_TEAMS = WIDTH <= 128 ? 2 : 1;

// dk and dv of one block fit the registers together up to WIDTH 128; beyond, grid.z = 2 makes one each.
template <typename Engine, u32 STAGES, u32 TEAMS>
DEVICE void backward_kv(const Attention& p) {
    if constexpr (WIDTH <= 128 || Engine::ROWS == 1) {
        backward_kv<Engine, STAGES, TEAMS, true, true>(p);
    } else if (blockIdx.z == 0) {
        backward_kv<Engine, STAGES, TEAMS, true, false>(p);
    } else {
        backward_kv<Engine, STAGES, TEAMS, false, true>(p);
    }
}

KERNEL(attention_forward_bf16, 128, Attention, forward<ForwardMma>)
KERNEL(attention_forward_f32, 128, Attention, forward<Fma>)
KERNEL(attention_backward_delta, 128, Attention, backward_delta)
KERNEL(attention_backward_q_bf16, 128, Attention, (backward_q<BackwardQMma, STAGES>))
KERNEL(attention_backward_q_f32, 128, Attention, (backward_q<Fma, 2>))
KERNEL(attention_backward_kv_bf16, KV_TEAMS * THREADS, Attention, (backward_kv<BackwardKvMma, STAGES, KV_TEAMS>))
KERNEL(attention_backward_kv_f32, 128, Attention, (backward_kv<Fma, 2, 1>))
