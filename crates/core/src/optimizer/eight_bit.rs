//! Moments as bytes with a scale for every 256 of them.

use super::elementwise::{BLOCK, JOB, MOST_MOMENTS, Moment, Rule, scaled};
use super::{Elementwise, OnGpu, Optimizer, StateSpec, StateType, StateValues, Step, Tensor};
use crate::Result;
use ferrotune_kernels::dequantise::{ByteCodec, dynamic_map};
use ferrotune_kernels::optimizer::{Rule as Kernel, SCALAR_BYTES};
use rayon::prelude::*;

/// Tensors of fewer elements keep f32 moments, as `min_8bit_size` has it.
const LEAST: usize = 4096;

/// How the byte for a value is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The nearest entry of the map.
    Nearest,
    /// In a table of 65536 steps from -1 to 1, as bitsandbytes does on a CPU: beside small steps of the map it
    /// misses the nearest entry.
    Steps,
}

/// A [`Rule`] whose moments are bytes: entries of the dynamic map over the largest magnitude of a block of 256.
///
/// # Source
/// Dettmers et al.: "8-bit Optimizers via Block-wise Quantization" (2022); bitsandbytes 0.50,
/// `optimizer_update_8bit_blockwise`.
#[derive(Debug)]
pub struct EightBit<R> {
    plain: Elementwise<R>,
    lookup: Lookup,
    signed: ByteCodec,
    unsigned: ByteCodec,
}

impl<R: Rule> EightBit<R> {
    /// `rule` in 8 bits.
    pub fn new(rule: R, lookup: Lookup) -> Self {
        let codec = |signed| match lookup {
            Lookup::Nearest => ByteCodec::new(dynamic_map(signed)),
            Lookup::Steps => ByteCodec::in_steps(dynamic_map(signed)),
        };
        Self {
            plain: Elementwise(rule),
            lookup,
            signed: codec(true),
            unsigned: codec(false),
        }
    }

    fn codec(&self, moment: Moment) -> &ByteCodec {
        if moment.signed {
            &self.signed
        } else {
            &self.unsigned
        }
    }
}

/// Some whole blocks of a tensor: values, gradient, and of each moment bytes and scales.
type Job<'a> = (&'a mut [f32], &'a [f32], Vec<(&'a mut [u8], &'a mut [f32])>);

impl<R: Rule> Optimizer for EightBit<R> {
    fn state(&self, shape: &[usize]) -> Vec<StateSpec> {
        let len: usize = shape.iter().product();
        if len < LEAST {
            return self.plain.state(shape);
        }
        let both = |moment: Moment| {
            let bytes = StateSpec {
                name: moment.name.to_owned(),
                dtype: StateType::U8,
                shape: shape.to_vec(),
            };
            [
                bytes,
                StateSpec::f32(format!("{}_absmax", moment.name), [len.div_ceil(BLOCK)]),
            ]
        };
        self.plain.0.moments().into_iter().flat_map(both).collect()
    }

    fn update(&self, tensor: Tensor<'_>, state: &mut [StateValues], step: Step) -> Result<()> {
        if tensor.values.len() < LEAST {
            return self.plain.update(tensor, state, step);
        }
        let scalars = self.plain.0.scalars(step);
        let moments = self.plain.0.moments();
        let codecs: Vec<&ByteCodec> = moments.iter().map(|&m| self.codec(m)).collect();
        let scale = tensor.grad.scale;
        let mut parts: Vec<_> = state
            .chunks_exact_mut(2)
            .filter_map(|pair| match pair {
                [bytes, scales] => {
                    let scales = scales.f32_mut().chunks_mut(JOB / BLOCK);
                    Some(bytes.u8_mut().chunks_mut(JOB).zip(scales))
                }
                _ => None,
            })
            .collect();
        let jobs: Vec<Job<'_>> = tensor
            .values
            .chunks_mut(JOB)
            .zip(tensor.grad.values.chunks(JOB))
            .map(|(values, grad)| {
                let moments = parts.iter_mut().filter_map(Iterator::next);
                (values, grad, moments.collect())
            })
            .collect();
        jobs.into_par_iter()
            .for_each(|job| update_blocks::<R>(&scalars, &codecs, scale, job));
        Ok(())
    }

    /// As Transformers' Trainer tells bitsandbytes to.
    fn for_tables(&self) -> Option<&dyn Optimizer> {
        Some(&self.plain)
    }

    fn on_gpu(&self) -> Option<&dyn OnGpu> {
        (self.lookup == Lookup::Nearest).then_some(self)
    }
}

impl<R: Rule> OnGpu for EightBit<R> {
    fn kernel(&self) -> Kernel {
        R::KERNEL
    }

    fn moments(&self) -> Vec<Moment> {
        self.plain.moments()
    }

    fn keeps_bytes(&self, len: usize) -> bool {
        len >= LEAST
    }

    fn scalars(&self, step: Step) -> [u8; SCALAR_BYTES] {
        self.plain.scalars(step)
    }
}

fn update_blocks<R: Rule>(
    scalars: &R::Scalars,
    codecs: &[&ByteCodec],
    scale: f32,
    (values, grad, mut moments): Job<'_>,
) {
    let blocks = values.chunks_mut(BLOCK).zip(grad.chunks(BLOCK));
    for (at, (values, grad)) in blocks.enumerate() {
        let mut decoded = [[0.0; BLOCK]; MOST_MOMENTS];
        let elements = at * BLOCK..at * BLOCK + values.len();
        for ((to, codec), (bytes, scales)) in decoded.iter_mut().zip(codecs).zip(&moments) {
            codec.decode(&bytes[elements.clone()], scales[at], to);
        }
        let mut slices = decoded.each_mut().map(|moment| &mut moment[..values.len()]);
        let gradient = scaled(grad, scale);
        R::update(
            scalars,
            values,
            &gradient[..grad.len()],
            &mut slices[..codecs.len()],
        );
        for ((from, codec), (bytes, scales)) in slices.iter().zip(codecs).zip(&mut moments) {
            scales[at] = codec.encode(from, &mut bytes[elements.clone()]);
        }
    }
}
