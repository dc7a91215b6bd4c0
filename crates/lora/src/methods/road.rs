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

use super::matrix::elements;
use crate::method::{Init, Keys, Method, Place, TensorSpec};
use ferrotune_core::adapter::{Attachment, CustomLinear, Site};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{Tensor, View, ViewMut};
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
        Ok(Attachment::Custom(Box::new(Rotations {
            theta: at.ids[0],
            alpha: at.ids[1],
            variant: self.variant,
            half: self.group / 2,
            out: site.out_features,
        })))
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

    /// A column of outputs, rotated.
    fn rotate(&self, coefficients: &[[f32; 2]], u: &[f32], y: &mut [f32]) {
        for (i, (y, [c, s])) in y.iter_mut().zip(coefficients).enumerate() {
            *y = c * u[i] + s * u[self.pair(i).0];
        }
    }
}

impl CustomLinear for Rotations {
    fn forward(&self, params: &FlatBuffer, _: View<'_>, y: ViewMut<'_>) -> Result<Vec<Tensor>> {
        let [rows, cols] = y.shape();
        let (u, coefficients) = (elements(y.as_view()), self.coefficients(params));
        let mut rotated = vec![0.0; u.len()];
        for (u, y) in u.chunks_exact(cols).zip(rotated.chunks_exact_mut(cols)) {
            self.rotate(&coefficients, u, y);
        }
        y.copy_from(View::from_f32(&rotated, rows, cols));
        Ok(vec![Tensor::from_f32(u, rows, cols)])
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
        let [rows, cols] = dy.shape();
        let (u, gradient, coefficients) = (
            saved[0].to_f32_vec(),
            elements(dy.as_view()),
            self.coefficients(params),
        );
        let mut sums = vec![[0.0_f32; 2]; cols];
        let mut back = vec![0.0; gradient.len()];
        for (row, g) in gradient.chunks_exact(cols).enumerate() {
            let at = row * cols..(row + 1) * cols;
            let (u, back) = (&u[at.clone()], &mut back[at]);
            for (i, sums) in sums.iter_mut().enumerate() {
                let other = self.pair(i).0;
                sums[0] += g[i] * u[i];
                sums[1] += g[i] * u[other];
                back[i] += coefficients[i][0] * g[i];
                back[other] += coefficients[i][1] * g[i];
            }
        }
        dy.copy_from(View::from_f32(&back, rows, cols));
        let (theta, alpha) = (params.get(self.theta), params.get(self.alpha));
        for (i, [d_c, d_s]) in sums.into_iter().enumerate() {
            let ([c, s], d_s) = (self.places(i), self.pair(i).1 * d_s);
            let d_theta = grads.get_mut(self.theta);
            d_theta[c] -= d_c * alpha[c] * theta[c].sin();
            d_theta[s] += d_s * alpha[s] * theta[s].cos();
            let d_alpha = grads.get_mut(self.alpha);
            d_alpha[c] += d_c * theta[c].cos();
            d_alpha[s] += d_s * theta[s].sin();
        }
        Ok(())
    }

    fn merge(
        &self,
        params: &FlatBuffer,
        weight: ViewMut<'_>,
        bias: Option<ViewMut<'_>>,
    ) -> Result<()> {
        let coefficients = self.coefficients(params);
        for matrix in [Some(weight), bias].into_iter().flatten() {
            let [rows, cols] = matrix.shape();
            let before = elements(matrix.as_view());
            // A bias is one row of outputs, a weight one row per output.
            let across = if rows == self.out { cols } else { 1 };
            let mut after = before.clone();
            for (i, [c, s]) in coefficients.iter().enumerate() {
                let other = self.pair(i).0;
                for k in 0..across {
                    after[i * across + k] =
                        c * before[i * across + k] + s * before[other * across + k];
                }
            }
            matrix.copy_from(View::from_f32(&after, rows, cols));
        }
        Ok(())
    }
}
