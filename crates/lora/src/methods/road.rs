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

use super::matrix::{device_of, empty, param};
use crate::method::{Init, Keys, Method, Place, TensorSpec};
use ferrotune_core::adapter::{Attachment, CustomLinear, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::pair_rotation::{self, Angles, Axis, Pairs, Per};
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
        let len = self.pairs().angles(out);
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
            pairs: self.pairs(),
            out: site.out_features,
        });
        // The outputs of the head are never there as a whole.
        Ok(match site.output_head {
            true => Attachment::Weight(rotations),
            false => Attachment::Custom(rotations),
        })
    }
}

impl Road {
    fn pairs(&self) -> Pairs {
        let per = match self.variant {
            "road_1" => Per::Pair,
            "road_2" => Per::Column,
            _ => Per::Coefficient,
        };
        Pairs {
            group: self.group,
            per,
        }
    }
}

/// RoAd on one linear.
#[derive(Debug)]
struct Rotations {
    theta: ParamId,
    alpha: ParamId,
    pairs: Pairs,
    out: usize,
}

impl Rotations {
    fn angles<'a>(&self, params: &'a FlatBuffer, beside: View<'_>) -> Angles<'a> {
        let shape = [1, self.pairs.angles(self.out)];
        Angles {
            theta: param(params, self.theta, shape, beside),
            alpha: param(params, self.alpha, shape, beside),
        }
    }

    /// Rotates outputs, which are columns, or rows of the weight.
    fn rotate(
        &self,
        params: &FlatBuffer,
        outputs: ViewMut<'_>,
        axis: Axis,
        transposed: bool,
    ) -> Result<()> {
        let mut coefficients = empty(outputs.as_view(), 2, self.out);
        let angles = self.angles(params, outputs.as_view());
        pair_rotation::coefficients(coefficients.view_mut(), angles, self.pairs)?;
        let of = coefficients.view();
        Ok(pair_rotation::rotate(
            outputs, of, self.pairs, axis, transposed,
        )?)
    }

    /// Adds the gradients of the angles, from that of what was made of `outputs`.
    fn add_gradients(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        d: View<'_>,
        outputs: View<'_>,
        axis: Axis,
    ) -> Result<()> {
        let count = self.pairs.angles(self.out);
        let to = grads.view_two_mut(self.theta, self.alpha);
        let to = to.map(|angles| angles.reshaped(1, count));
        let angles = self.angles(params, d);
        Ok(pair_rotation::add_gradients(
            to, d, outputs, angles, self.pairs, axis,
        )?)
    }
}

impl CustomLinear for Rotations {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn kept_columns(&self) -> usize {
        self.out
    }

    fn forward(&self, params: &FlatBuffer, _: View<'_>, y: ViewMut<'_>) -> Result<Vec<Tensor>> {
        let [rows, cols] = y.shape();
        let mut base = Tensor::temporary(&device_of(y.as_view()), y.dtype(), rows, cols);
        base.view_mut().copy_from(y.as_view());
        self.rotate(params, y, Axis::Columns, false)?;
        Ok(vec![base])
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
        let base = saved[0].view();
        self.add_gradients(params, grads, dy.as_view(), base, Axis::Columns)?;
        self.rotate(params, dy, Axis::Columns, true)
    }

    fn merge(
        &self,
        params: &FlatBuffer,
        weight: ViewMut<'_>,
        bias: Option<ViewMut<'_>>,
    ) -> Result<()> {
        if let Some(bias) = bias {
            self.rotate(params, bias, Axis::Columns, false)?;
        }
        self.apply(params, weight)
    }
}

/// The same of the rows of the weight, where there is no bias.
impl WeightUpdate for Rotations {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        self.rotate(params, weight, Axis::Rows, false)
    }

    fn temporaries(&self) -> usize {
        0
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        self.add_gradients(params, grads, d_weight, weight, Axis::Rows)
    }
}
