//! Dropout of whole parts of an update, drawn once per optimizer step and linear.
//!
//! Of a sum `W' = W + D`, rows of D are left out, or all of it ([`SumDropout`]); of rotations in blocks, blocks
//! ([`left_out`]). PEFT draws anew in every forward; here all micro-batches of a step share a draw.

use super::matrix::{device_of, empty};
use crate::method::Keys;
use ferrotune_core::Result;
use ferrotune_core::adapter::WeightUpdate;
use ferrotune_core::params::FlatBuffer;
use ferrotune_kernels::rng::Stream;
use ferrotune_kernels::{Tensor, View, ViewMut, hadamard};
use serde_json::{Map, Value, json};

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

    /// Whether there is any; what is left out is drawn on the host.
    pub(super) fn is_on(&self) -> bool {
        self.rows > 0.0 || self.module > 0.0
    }

    /// `update`, which adds a D of `rows` rows to W, as `draws` leave it; `None` where nothing is ever left out.
    pub(super) fn drawn<'a>(
        &self,
        update: &'a dyn WeightUpdate,
        rows: usize,
        draws: Stream,
    ) -> Option<Box<dyn WeightUpdate + 'a>> {
        if !self.is_on() {
            return None;
        }
        let factors = self.factors(rows, draws);
        Some(Box::new(Thinned { update, factors }))
    }

    /// A factor for each row of D.
    fn factors(&self, rows: usize, mut draws: Stream) -> Vec<f32> {
        let mut stays = |p: f64| draws.uniform() >= p;
        let module = stays(self.module);
        let kept: Vec<bool> = (0..rows).map(|_| module && stays(self.rows)).collect();
        let count = kept.iter().filter(|kept| **kept).count();
        let factor = match self.scaled && module && count > 0 {
            true => rows as f32 / count as f32,
            false => 1.0,
        };
        let of = |kept| if kept { factor } else { 0.0 };
        kept.into_iter().map(of).collect()
    }
}

/// A sum of which each row of D has a factor.
#[derive(Debug)]
struct Thinned<'a> {
    update: &'a dyn WeightUpdate,
    factors: Vec<f32>,
}

impl Thinned<'_> {
    /// `D` with its factors, added to `beta out`.
    fn scale(&self, out: ViewMut<'_>, beta: f32, d: View<'_>) -> Result<()> {
        let factors = Tensor::from_f32(self.factors.clone(), self.factors.len(), 1);
        let factors = factors.to_device(&device_of(d));
        Ok(hadamard::add(out, beta, 1.0, d, factors.view())?)
    }
}

impl WeightUpdate for Thinned<'_> {
    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let mut d = empty(weight.as_view(), weight.rows(), weight.cols());
        d.view_mut().fill(0.0);
        self.update.apply(params, d.view_mut())?;
        self.scale(weight, 1.0, d.view())
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let mut d = empty(d_weight, d_weight.rows(), d_weight.cols());
        self.scale(d.view_mut(), 0.0, d_weight)?;
        self.update.backward(params, grads, weight, d.view())
    }
}

/// Which of `count` blocks are left out: exactly `p count` of them, rounded down; none where that is 0.
pub(super) fn left_out(p: f64, count: usize, mut draws: Stream) -> Option<Vec<bool>> {
    let out = (p * count as f64) as usize;
    if out == 0 {
        return None;
    }
    let mut blocks: Vec<bool> = (0..count).map(|block| block < out).collect();
    draws.shuffle(&mut blocks);
    Some(blocks)
}
