//! RandLoRA: full-rank updates as sums of random low-rank ones, weighted by trained diagonals.
//!
//! With `A [r, 1, min]` and `B [max, bases, r]` random and shared (min and max the smaller and the larger
//! dimension), λ `[r, bases]` and γ `[bases, min]` trained, `M = B' A'`: B' `[max, bases r]` is B with its
//! last two dimensions as one, A' `[r bases, min]` has the rows `λ[k, b] A[k] ⊙ γ[b]`, k first. (So PEFT
//! pairs them; the paper has the same order on both sides.) `W' = W + alpha / r * M`, or its transpose
//! where the outputs are fewer than the inputs.
//!
//! # Source
//! Albert et al.: "RandLoRA: Full-rank parameter-efficient fine-tuning of large models" (2025); PEFT's
//! `tuners/randlora`.

use super::matrix::{empty, grad, nn, param, tn};
use super::torch_random::TorchRandom;
use crate::files::Weights;
use crate::method::{Frozen, Init, Keys, Method, Place, Placed, TensorSpec};
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::khatri_rao::{self, Operands};
use ferrotune_kernels::{Tensor, View, ViewMut, matmul};
use half::bf16;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::Arc;

const A: &str = "randlora_A";
const B: &str = "randlora_B";

/// How many of the projections' elements are not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Density {
    Dense,
    /// One in three.
    Sparse,
    /// One in √(smaller dimension).
    VerySparse,
}

/// RandLoRA's configuration.
#[derive(Clone, Debug)]
pub(crate) struct RandLora {
    rank: usize,
    alpha: f64,
    key: u64,
    save_projection: bool,
    density: Density,
    dropout: f64,
    init_weights: bool,
    /// From the file of the adapter, where it has them.
    projections: Option<[Arc<Tensor>; 2]>,
}

/// The larger and the smaller dimension.
fn dimensions(site: &Site) -> [usize; 2] {
    let [out, inputs] = [site.out_features, site.in_features];
    [out.max(inputs), out.min(inputs)]
}

impl Method for RandLora {
    const PEFT_TYPE: &'static str = "RANDLORA";
    const BIAS: Option<&'static str> = Some("randlora_only");

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let rank = keys.positive("r", 32)?;
        let density = match (
            keys.boolean("sparse", false)?,
            keys.boolean("very_sparse", false)?,
        ) {
            (_, true) => Density::VerySparse,
            (true, false) => Density::Sparse,
            (false, false) => Density::Dense,
        };
        let save_projection = keys.boolean("save_projection", true)?;
        let projections = match keys.directory() {
            Some(directory) if save_projection => Some(read_projections(directory, rank)?),
            _ => None,
        };
        Ok(Self {
            rank,
            alpha: keys.number("randlora_alpha", 640.0)?,
            key: keys.integer("projection_prng_key", 0)? as u64,
            save_projection,
            density,
            dropout: keys.probability("randlora_dropout")?,
            init_weights: keys.boolean("init_weights", true)?,
            projections,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("r".into(), json!(self.rank));
        keys.insert("randlora_alpha".into(), json!(self.alpha));
        keys.insert("projection_prng_key".into(), json!(self.key));
        keys.insert("save_projection".into(), json!(self.save_projection));
        keys.insert("sparse".into(), json!(self.density == Density::Sparse));
        keys.insert(
            "very_sparse".into(),
            json!(self.density == Density::VerySparse),
        );
        keys.insert("randlora_dropout".into(), json!(self.dropout));
        keys.insert("init_weights".into(), json!(self.init_weights));
        keys.insert("fan_in_fan_out".into(), json!(false));
    }

    fn describe(&self) -> String {
        format!("RandLoRA r={} alpha={}", self.rank, self.alpha)
    }

    /// A `[r, min]`, B `[max, bases r]`.
    fn frozen(&self, targets: &[&Site]) -> Result<Frozen> {
        let largest =
            |of: fn(&Site) -> usize| targets.iter().map(|site| of(site)).max().unwrap_or(0);
        let (out, inputs) = (largest(|s| s.out_features), largest(|s| s.in_features));
        let [max, min] = [out.max(inputs), out.min(inputs)];
        let bases = min.div_ceil(self.rank);
        let [a, b] = match &self.projections {
            Some(projections) => projections.clone(),
            None => self.draw([max, min], bases).map(Arc::new),
        };
        if a.rows() != self.rank || a.cols() < min || b.rows() < max || b.cols() < bases * self.rank
        {
            let message = format!(
                "is {}, but {A} is {:?} and {B} {:?}, expected at least [{}, {min}] and [{max}, {}]",
                self.rank,
                [a.rows(), a.cols()],
                [b.rows(), b.cols()],
                self.rank,
                bases * self.rank
            );
            return Err(Error::config("r", message));
        }
        Ok(Frozen::new([(A, a), (B, b)]))
    }

    fn saved_frozen(&self) -> Vec<&'static str> {
        if self.save_projection {
            vec![A, B]
        } else {
            Vec::new()
        }
    }

    fn frozen_shape(&self, ending: &str, [rows, cols]: [usize; 2]) -> Vec<usize> {
        if ending == A {
            vec![rows, 1, cols]
        } else {
            vec![rows, cols / self.rank, self.rank]
        }
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        let [_, min] = dimensions(site);
        let bases = min.div_ceil(self.rank);
        Ok(vec![
            TensorSpec::new("randlora_lambda", [self.rank, bases]),
            TensorSpec::new("randlora_gamma", [bases, min]),
        ])
    }

    fn init(&self, name: &str, shape: &[usize]) -> Init {
        match (name.ends_with("gamma"), self.init_weights) {
            (true, _) => Init::Constant(1.0 / shape.iter().copied().max().unwrap_or(1) as f32),
            (false, true) => Init::Constant(0.0),
            (false, false) => Init::Normal {
                mean: 0.0,
                std: 1.0,
            },
        }
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        let ([max, min], rank) = (dimensions(site), self.rank);
        Ok(Attachment::Weight(Box::new(Bases {
            lambda: at.ids[0],
            gamma: at.ids[1],
            a: at.frozen.placed(A),
            b: at.frozen.placed(B),
            max,
            rank,
            bases: min.div_ceil(rank),
            min,
            transposed: site.out_features < site.in_features,
            scale: (self.alpha / rank as f64) as f32,
            dropout: self.dropout as f32,
        })))
    }
}

impl RandLora {
    /// A `[r, min]` and B `[max, bases r]` as PEFT draws them with torch's generator: uniform in bf16, or sparse signs in
    /// f32; each divided by its standard deviation.
    fn draw(&self, [max, min]: [usize; 2], bases: usize) -> [Tensor; 2] {
        let rank = self.rank;
        let mut random = TorchRandom::new(self.key);
        let one_in = match self.density {
            Density::Dense => {
                let a = random.kaiming_bf16(min, rank * min);
                // One base after the other, `[max, r]` each.
                let mut b = vec![0.0; max * bases * rank];
                for base in 0..bases {
                    let drawn = random.kaiming_bf16(rank, max * rank);
                    for (row, values) in drawn.chunks_exact(rank).enumerate() {
                        let first = (row * bases + base) * rank;
                        b[first..first + rank].copy_from_slice(values);
                    }
                }
                let [a, b] = [a, b].map(|values| {
                    let rounded = |value: f32| bf16::from_f32(value).to_f32();
                    let std = rounded(standard_deviation(&values));
                    values.iter().map(|v| rounded(v / std)).collect()
                });
                return [
                    Tensor::from_f32(a, rank, min),
                    Tensor::from_f32(b, max, bases * rank),
                ];
            }
            Density::Sparse => 3.0,
            Density::VerySparse => (min as f64).sqrt(),
        };
        let [few, many] = [0.5 / one_in, 1.0 - 0.5 / one_in].map(|share| share as f32);
        [[rank, min], [max, bases * rank]].map(|[rows, cols]| {
            let signs = (0..rows * cols).map(|_| match random.uniform(0.0, 1.0) {
                unit if unit < few => -1.0,
                unit if unit > many => 1.0,
                _ => 0.0,
            });
            let signs: Vec<f32> = signs.collect();
            let std = standard_deviation(&signs);
            let values = signs.iter().map(|sign| sign / std).collect();
            Tensor::from_f32(values, rows, cols)
        })
    }
}

/// As torch's `std`, of a sample.
fn standard_deviation(values: &[f32]) -> f32 {
    let count = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
    let squares = values.iter().map(|v| (f64::from(*v) - mean).powi(2));
    (squares.sum::<f64>() / (count - 1.0)).sqrt() as f32
}

fn read_projections(directory: &Path, rank: usize) -> Result<[Arc<Tensor>; 2]> {
    let weights = Weights::open(directory)?;
    let read = |ending: &str| -> Result<Arc<Tensor>> {
        let name = format!("base_model.{ending}");
        let shape = weights
            .file
            .meta(&name)
            .map_or_else(Vec::new, |meta| meta.shape.clone());
        let values = weights.read(&name, &shape)?;
        match shape[..] {
            [rows, 1, cols] if ending == A && rows == rank => {
                Ok(Arc::new(Tensor::from_f32(values, rows, cols)))
            }
            [rows, bases, last] if ending == B && last == rank => {
                Ok(Arc::new(Tensor::from_f32(values, rows, bases * last)))
            }
            _ => Err(Error::adapter(
                &weights.path,
                format!("`{name}` has shape {shape:?}, which is none for rank {rank}"),
            )),
        }
    };
    Ok([read(A)?, read(B)?])
}

/// RandLoRA on one linear.
#[derive(Debug)]
struct Bases {
    lambda: ParamId,
    gamma: ParamId,
    /// `[r, at least min]`.
    a: Arc<Placed>,
    /// `[at least max, at least bases r]`.
    b: Arc<Placed>,
    max: usize,
    rank: usize,
    bases: usize,
    min: usize,
    transposed: bool,
    scale: f32,
    dropout: f32,
}

impl Bases {
    /// B', `[max, bases r]`.
    fn projection(&self, beside: View<'_>) -> View<'_> {
        let b = self.b.beside(beside).row_range(0..self.max);
        b.columns(0..self.bases * self.rank)
    }

    /// What A' is made of; transposed, it is `[min, bases r]`.
    fn operands<'a>(&'a self, params: &'a FlatBuffer, beside: View<'_>) -> Operands<'a> {
        let (rank, bases, min) = (self.rank, self.bases, self.min);
        Operands {
            a: self.a.beside(beside).columns(0..min),
            g: param(params, self.gamma, [bases, min], beside),
            scale: param(params, self.lambda, [1, rank * bases], beside),
        }
    }
}

impl WeightUpdate for Bases {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let beside = weight.as_view();
        let b = self.projection(beside);
        let mut a = empty(beside, self.min, self.bases * self.rank);
        khatri_rao::product(a.view_mut(), self.operands(params, beside))?;
        let [left, right] = if self.transposed {
            [a.view(), b]
        } else {
            [b, a.view()]
        };
        Ok(matmul::nt(weight, 1.0, self.scale, left, right)?)
    }

    fn dropout(&self) -> f32 {
        self.dropout
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        _: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let b = self.projection(d_weight);
        let d = if self.transposed {
            nn(d_weight, b)?
        } else {
            tn(d_weight, b)?
        };
        let (of, shape) = (self.operands(params, d_weight), [self.bases, self.min]);
        let d_lambda = grad(grads, self.lambda, [1, self.rank * self.bases], d_weight);
        khatri_rao::add_scale_gradient(d_lambda, self.scale, d.view(), of)?;
        let d_gamma = grad(grads, self.gamma, shape, d_weight);
        Ok(khatri_rao::add_second_gradient(
            d_gamma,
            self.scale,
            d.view(),
            of,
        )?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(density: Density) -> [Vec<f32>; 2] {
        let method = RandLora {
            rank: 3,
            alpha: 1.0,
            key: 3,
            save_projection: false,
            density,
            dropout: 0.0,
            init_weights: true,
            projections: None,
        };
        method.draw([5, 4], 2).map(|drawn| drawn.to_f32_vec())
    }

    /// Of `RandLoraModel` in PEFT 0.21.2 with torch 2.15, `projection_prng_key: 3`.
    #[test]
    fn projections_are_those_of_peft() {
        let [a, b] = drawn(Density::Dense);
        let theirs = [
            -1.5,
            -1.195_312_5,
            -0.648_437_5,
            -1.429_687_5,
            -0.085_937_5,
            -1.328_125,
            0.824_218_75,
            0.738_281_25,
            0.285_156_25,
            1.179_687_5,
            -0.148_437_5,
            0.906_25,
        ];
        assert_eq!(a, theirs);
        // The first three rows, of two bases each.
        let theirs = [
            -1.1875,
            -0.333_984_38,
            -1.515_625,
            0.339_843_75,
            -1.289_062_5,
            -1.3125,
            -0.137_695_31,
            -1.101_562_5,
            1.531_25,
            -0.808_593_75,
            1.031_25,
            -1.226_562_5,
            1.179_687_5,
            1.273_437_5,
            0.503_906_25,
            -1.531_25,
            -1.468_75,
            -0.832_031_25,
        ];
        assert_eq!(b[..theirs.len()], theirs);

        let [a, b] = drawn(Density::Sparse);
        let (s, t) = (1.608_799_3, 1.543_878_8);
        assert_eq!(a, [-s, -s, 0.0, -s, 0.0, -s, 0.0, 0.0, 0.0, s, 0.0, 0.0]);
        assert_eq!(b[..6], [-t, 0.0, -t, 0.0, 0.0, t]);
        let [a, b] = drawn(Density::VerySparse);
        let (s, t) = (1.261_095_3, 1.351_936_1);
        assert_eq!(a, [-s, -s, 0.0, -s, 0.0, -s, s, 0.0, 0.0, s, 0.0, s]);
        assert_eq!(b[..6], [-t, 0.0, -t, 0.0, -t, t]);
    }

    #[test]
    fn a_value_that_rounds_to_the_upper_bound_is_the_lower_one() {
        let values = TorchRandom::new(0).kaiming_bf16(8, 768);
        let bound = 0.353_515_63;
        assert_eq!(values[332], -bound);
        assert!(values.iter().all(|value| (-bound..bound).contains(value)));
    }
}
