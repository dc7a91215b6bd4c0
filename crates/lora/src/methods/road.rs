//! RoAd: pairs of outputs rotated and scaled.
//!
//! Outputs are taken in groups; the first half of a group is paired with the second. With
//! `c = α cos θ` and `s = α sin θ`, `y_1 = c_1 u_1 - s_1 u_2` and `y_2 = c_2 u_2 + s_2 u_1`, u being
//! `x W^T + b`. Variant 1 shares θ and α within a pair, 2 has one of each per output, 4 has others for
//! c than for s.
//!
//! # Source
//! Liao et al.: "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
//! Composability" (2024); PEFT's `tuners/road`.

use super::matrix::{copy_of, device_of, elements, empty};
use crate::method::{Init, Keys, Method, Place, TensorSpec};
use ferrotune_core::adapter::{Attachment, CustomLinear, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{Tensor, View, ViewMut, block_diagonal};
use serde_json::{Map, Value, json};

const VARIANTS: [&str; 3] = ["road_1", "road_2", "road_4"];

/// RoAd's configuration.
#[derive(Clone, Debug)]
pub(crate) struct Road {
    variant: &'static str,
    group: usize,
    init_weights: bool,
}

impl Method for Road {
    const PEFT_TYPE: &'static str = "ROAD";

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let group = keys.positive("group_size", 64)?;
        if !group.is_multiple_of(2) {
            return Err(keys.error("group_size", format!("is {group}, expected an even number")));
        }
        Ok(Self {
            variant: keys.choice("variant", &VARIANTS)?,
            group,
            init_weights: keys.boolean("init_weights", true)?,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("variant".into(), json!(self.variant));
        keys.insert("group_size".into(), json!(self.group));
        keys.insert("init_weights".into(), json!(self.init_weights));
    }

    fn describe(&self) -> String {
        format!("RoAd {} group size {}", self.variant, self.group)
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        let out = site.out_features;
        if !out.is_multiple_of(self.group) {
            let message = format!(
                "is {}, which must divide the {out} outputs of `{}`",
                self.group, site.name
            );
            return Err(Error::config("group_size", message));
        }
        let len = match self.variant {
            "road_1" => out / 2,
            "road_2" => out,
            _ => 2 * out,
        };
        Ok(vec![
            TensorSpec::new("road_theta", [len]),
            TensorSpec::new("road_alpha", [len]),
        ])
    }

    fn init(&self, name: &str, _: &[usize]) -> Init {
        let mean = if name.ends_with("alpha") { 1.0 } else { 0.0 };
        if self.init_weights {
            Init::Constant(mean as f32)
        } else {
            Init::Normal { mean, std: 0.5 }
        }
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        let rotations = Box::new(Rotations {
            theta: at.ids[0],
            alpha: at.ids[1],
            variant: self.variant,
            half: self.group / 2,
            out: site.out_features,
        });
        // The outputs of the head are never there as a whole.
        Ok(match site.output_head {
            true => Attachment::Weight(rotations),
            false => Attachment::Custom(rotations),
        })
    }
}

/// RoAd on one linear.
#[derive(Debug)]
struct Rotations {
    theta: ParamId,
    alpha: ParamId,
    variant: &'static str,
    /// Half of a group.
    half: usize,
    out: usize,
}

impl Rotations {
    /// Which θ and α make c and s of output `i`.
    fn places(&self, i: usize) -> [usize; 2] {
        let group = 2 * self.half;
        let (of, within) = (i / group, i % group);
        match self.variant {
            "road_1" => [of * self.half + within % self.half; 2],
            "road_2" => [i; 2],
            _ => [2 * of * group + within, (2 * of + 1) * group + within],
        }
    }

    /// The other output of the pair, and the sign of s.
    fn pair(&self, i: usize) -> (usize, f32) {
        if i % (2 * self.half) < self.half {
            (i + self.half, -1.0)
        } else {
            (i - self.half, 1.0)
        }
    }

    /// c and signed s of every output.
    fn coefficients(&self, params: &FlatBuffer) -> Vec<[f32; 2]> {
        let (theta, alpha) = (params.get(self.theta), params.get(self.alpha));
        let of = |i: usize| {
            let [c, s] = self.places(i);
            [
                alpha[c] * theta[c].cos(),
                self.pair(i).1 * alpha[s] * theta[s].sin(),
            ]
        };
        (0..self.out).map(of).collect()
    }

    /// What the outputs are multiplied with, or its transpose: the blocks of a block-diagonal matrix below one
    /// another, `[out, group]`, on the side of `beside`.
    fn matrix(&self, params: &FlatBuffer, transposed: bool, beside: View<'_>) -> Tensor {
        let group = 2 * self.half;
        let mut values = vec![0.0; self.out * group];
        for (i, [c, s]) in self.coefficients(params).into_iter().enumerate() {
            let other = self.pair(i).0;
            values[i * group + i % group] = c;
            let (row, column) = if transposed { (other, i) } else { (i, other) };
            values[row * group + column % group] = s;
        }
        Tensor::from_f32(values, self.out, group).to_device(&device_of(beside))
    }

    /// Rotates a weight, which has one row per output, or a bias, which is one row of outputs.
    fn rotate_outputs(&self, params: &FlatBuffer, matrix: ViewMut<'_>) {
        let [rows, cols] = matrix.shape();
        let before = elements(matrix.as_view());
        let across = if rows == self.out { cols } else { 1 };
        let mut after = before.clone();
        for (i, [c, s]) in self.coefficients(params).into_iter().enumerate() {
            let other = self.pair(i).0;
            for k in 0..across {
                after[i * across + k] = c * before[i * across + k] + s * before[other * across + k];
            }
        }
        matrix.copy_from(View::from_f32(&after, rows, cols));
    }

    /// Adds what output `i` says of θ and α: `sums` are those of its gradient times it, and times the other of its
    /// pair.
    fn add_gradients(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        i: usize,
        [own, other]: [f32; 2],
    ) {
        let (theta, alpha) = (params.get(self.theta), params.get(self.alpha));
        let ([c, s], sign) = (self.places(i), self.pair(i).1);
        let (d_c, d_s) = (own, sign * other);
        let d_theta = grads.get_mut(self.theta);
        d_theta[c] -= d_c * alpha[c] * theta[c].sin();
        d_theta[s] += d_s * alpha[s] * theta[s].cos();
        let d_alpha = grads.get_mut(self.alpha);
        d_alpha[c] += d_c * theta[c].cos();
        d_alpha[s] += d_s * theta[s].sin();
    }
}

/// Writes to `y` what it holds times a block-diagonal matrix; returns what it held, f32.
fn rotate(mut y: ViewMut<'_>, matrix: &Tensor) -> Result<Tensor> {
    let before = copy_of(y.as_view());
    let mut rotated = empty(before.view(), y.rows(), y.cols());
    block_diagonal::product(rotated.view_mut(), before.view(), matrix.view())?;
    y.reborrow().copy_from(rotated.view());
    Ok(before)
}

impl CustomLinear for Rotations {
    fn forward(&self, params: &FlatBuffer, _: View<'_>, y: ViewMut<'_>) -> Result<Vec<Tensor>> {
        let matrix = self.matrix(params, false, y.as_view());
        Ok(vec![rotate(y, &matrix)?])
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        _: View<'_>,
        saved: &[Tensor],
        dy: ViewMut<'_>,
        _: Option<ViewMut<'_>>,
    ) -> Result<()> {
        let group = 2 * self.half;
        let matrix = self.matrix(params, true, dy.as_view());
        let dy = rotate(dy, &matrix)?;
        let mut sums = empty(dy.view(), self.out, group);
        block_diagonal::gradient(sums.view_mut(), dy.view(), saved[0].view())?;
        let sums = elements(sums.view());
        for (i, sums) in sums.chunks_exact(group).enumerate() {
            let other = self.pair(i).0;
            self.add_gradients(params, grads, i, [sums[i % group], sums[other % group]]);
        }
        Ok(())
    }

    fn merge(
        &self,
        params: &FlatBuffer,
        weight: ViewMut<'_>,
        bias: Option<ViewMut<'_>>,
    ) -> Result<()> {
        for matrix in [Some(weight), bias].into_iter().flatten() {
            self.rotate_outputs(params, matrix);
        }
        Ok(())
    }
}

/// The same of the rows of the weight, where there is no bias.
impl WeightUpdate for Rotations {
    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        self.rotate_outputs(params, weight);
        Ok(())
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let (weight, d_weight, cols) = (elements(weight), elements(d_weight), weight.cols());
        let product = |of: usize, with: usize| -> f32 {
            let row = |i: usize| i * cols..(i + 1) * cols;
            let pairs = d_weight[row(of)].iter().zip(&weight[row(with)]);
            pairs
                .map(|(d, w)| f64::from(*d) * f64::from(*w))
                .sum::<f64>() as f32
        };
        for i in 0..self.out {
            let sums = [product(i, i), product(i, self.pair(i).0)];
            self.add_gradients(params, grads, i, sums);
        }
        Ok(())
    }
}
