// only sm_90a
// Varlen causal attention on Hopper. The sources before this one: work.cuh, mma.cuh, forward.cuh and
// backward.cuh of the folder above, engine.cuh, loads.cuh, forward.cuh, backward.cuh. Warpgroups and tile sizes are
// chosen so that accumulators stay in registers, else the compiler lets no product run on, and dynamic
// shared memory within 227 KiB; mod.rs repeats them.

using Forward = Wgmma<(WIDTH == 64 ? 3 : 2), 128>;
using BackwardQ = Wgmma<(WIDTH == 64 ? 3 : 2), (WIDTH == 64 ? 64 : 96)>;
using BackwardKv = Wgmma<2, (WIDTH == 64 ? 96 : 64)>;

KERNEL(attention_forward_wgmma, Forward::ALL_THREADS, Attention, forward_async<Copies<Forward>>)
KERNEL(attention_backward_q_wgmma, BackwardQ::ALL_THREADS, Attention, backward_q_async<Copies<BackwardQ>>)
KERNEL(attention_backward_kv_wgmma, BackwardKv::ALL_THREADS, Attention, backward_kv_async<Copies<BackwardKv>>)
KERNEL(attention_forward_tma, Forward::ALL_THREADS, MappedAttention, forward_async<Boxes<Forward>>)
KERNEL(attention_backward_q_tma, BackwardQ::ALL_THREADS, MappedAttention, backward_q_async<Boxes<BackwardQ>>)
KERNEL(attention_backward_kv_tma, BackwardKv::ALL_THREADS, MappedAttention, backward_kv_async<Boxes<BackwardKv>>)
