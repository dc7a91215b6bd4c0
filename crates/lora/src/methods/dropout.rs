//! Dropout of whole parts of an update, drawn once per optimizer step and linear.
//!
//! Of a sum `W' = W + D`, rows of D are left out, or all of it ([`SumDropout`]); of rotations in blocks, blocks
//! ([`kept`]). PEFT draws anew in every forward; here all micro-batches of a step share a draw.

use super::matrix::empty;
use crate::method::Keys;
use ferrotune_core::Result;
use ferrotune_core::adapter::WeightUpdate;
use ferrotune_core::params::FlatBuffer;
use ferrotune_kernels::parts::{self, Draws};
use ferrotune_kernels::{DType, Tensor, View, ViewMut, hadamard};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// `rank_dropout` and `module_dropout` of LyCORIS.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SumDropout {
    /// Probability that a row of D, which is what PEFT takes for a rank, is left out.
    rows: f64,
    /// Probability that all of D is.
    module: f64,
    /// Whether the rows that stay grow so that their factors are 1 on average over the rows.
    pub(super) scaled: bool,
}

impl SumDropout {
    /// Reads the keys of both probabilities.
    pub(super) fn read(keys: &mut Keys<'_>, scaled: bool) -> Result<Self> {
        Ok(Self {
            rows: keys.probability("rank_dropout")?,
            module: keys.probability("module_dropout")?,
            scaled,
        })
    }

    pub(super) fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("rank_dropout".into(), json!(self.rows));
        keys.insert("module_dropout".into(), json!(self.module));
    }

    /// Whether anything is ever left out.
    pub(super) fn is_on(&self) -> bool {
        self.rows > 0.0 || self.module > 0.0
    }

    /// `update`, which adds a D of `rows` rows to W, as `draws` leave it; `None` where nothing is ever left out.
    pub(super) fn drawn<'a>(
        &self,
        update: &'a dyn WeightUpdate,
        rows: usize,
        draws: Draws<'_>,
    ) -> Result<Option<Box<dyn WeightUpdate + 'a>>> {
        if !self.is_on() {
            return Ok(None);
        }
        let mut factors = Tensor::temporary(&draws.device(), DType::F32, rows, 1);
        let of = parts::Rows {
            rows: self.rows,
            module: self.module,
            scaled: self.scaled,
        };
        parts::rows(factors.view_mut(), draws, of)?;
        Ok(Some(Box::new(Thinned { update, factors })))
    }
}

/// A sum of which each row of D has a factor.
#[derive(Debug)]
struct Thinned<'a> {
    update: &'a dyn WeightUpdate,
    /// `[rows, 1]`.
    factors: Tensor,
}

impl WeightUpdate for Thinned<'_> {
    fn computes_on_host(&self) -> bool {
        self.update.computes_on_host()
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let mut d = empty(weight.as_view(), weight.rows(), weight.cols());
        d.view_mut().fill(0.0);
        self.update.apply(params, d.view_mut())?;
        Ok(hadamard::add(
            weight,
            1.0,
            1.0,
            d.view(),
            self.factors.view(),
        )?)
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let mut d = empty(d_weight, d_weight.rows(), d_weight.cols());
        hadamard::add(d.view_mut(), 0.0, 1.0, d_weight, self.factors.view())?;
        self.update.backward(params, grads, weight, d.view())
    }
}

/// A factor for each of `count` blocks `[count, 1]`, 0 for exactly `p count` of them, rounded down, where `group` is drawn
/// of `groups` alike; `None` where that is none.
pub(super) fn kept(
    p: f64,
    count: usize,
    [group, groups]: [usize; 2],
    draws: Draws<'_>,
) -> Result<Option<Arc<Tensor>>> {
    let left_out = (p * count as f64) as usize;
    if left_out == 0 {
        return Ok(None);
    }
    let mut kept = Tensor::temporary(&draws.device(), DType::F32, count, 1);
    let of = parts::Blocks {
        left_out,
        groups,
        group,
    };
    parts::blocks(kept.view_mut(), draws, of)?;
    Ok(Some(Arc::new(kept)))
}
