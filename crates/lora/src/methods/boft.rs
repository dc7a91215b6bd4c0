//! BOFT with one butterfly factor: inputs rotated in blocks, outputs scaled.
//!
//! `W' = s ⊙ (W R^T)`, R block-diagonal with the Cayley transforms of the skew parts of
//! `boft_R [1, blocks, b, b]`, s `[out, 1]`. Dropout puts the identity in the place of some of them.
//!
//! # Source
//! Liu et al.: "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization" (2023); PEFT's
//! `tuners/boft`, which has more than one factor with its CUDA extension only.

use super::cayley::{Blocks, Rotation, blocks, require_more_than_one, require_one};
use super::dropout::left_out;
use super::matrix::{empty, grad, param};
use crate::method::{Init, Keys, Method, Place, TensorSpec};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::rng::Stream;
use ferrotune_kernels::rotation::Source;
use ferrotune_kernels::{Tensor, View, ViewMut, block_diagonal, hadamard};
use serde_json::{Map, Value, json};

/// BOFT's configuration.
#[derive(Clone, Debug)]
pub(crate) struct Boft {
    /// 0 where the number of blocks is given.
    block_size: usize,
    block_num: usize,
    dropout: f64,
    /// Whether a run asks for it.
    asked: bool,
    init_weights: bool,
}

impl Boft {
    /// Size and number of blocks.
    fn blocks(&self, site: &Site) -> Result<[usize; 2]> {
        blocks(
            site,
            ("boft_block_size", self.block_size),
            ("boft_block_num", self.block_num),
        )
    }
}

impl Method for Boft {
    const PEFT_TYPE: &'static str = "BOFT";
    const BIAS: Option<&'static str> = Some("boft_only");

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let factor = keys.positive("boft_n_butterfly_factor", 1)?;
        if factor > 1 {
            return Err(keys.error(
                "boft_n_butterfly_factor",
                format!("is {factor}, expected 1: more factors need PEFT's CUDA extension"),
            ));
        }
        let (block_size, block_num) = (
            keys.integer("boft_block_size", 4)?,
            keys.integer("boft_block_num", 0)?,
        );
        let number = ("boft_block_num", block_num);
        require_one(keys, ("boft_block_size", block_size), number, 4)?;
        Ok(Self {
            block_size,
            block_num,
            dropout: keys.probability("boft_dropout")?,
            asked: keys.are_asked(),
            init_weights: keys.boolean("init_weights", true)?,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("boft_block_size".into(), json!(self.block_size));
        keys.insert("boft_block_num".into(), json!(self.block_num));
        keys.insert("boft_n_butterfly_factor".into(), json!(1));
        keys.insert("boft_dropout".into(), json!(self.dropout));
        keys.insert("init_weights".into(), json!(self.init_weights));
        keys.insert("fan_in_fan_out".into(), json!(false));
    }

    fn describe(&self) -> String {
        match self.block_size {
            0 => format!("BOFT with {} blocks", self.block_num),
            size => format!("BOFT block size {size}"),
        }
    }

    fn check(&self, targets: &[&Site]) -> Result<()> {
        let given = match self.block_size {
            0 => ("boft_block_num", self.block_num),
            size => ("boft_block_size", size),
        };
        let mut asked = targets.iter().filter(|_| self.asked);
        asked.try_for_each(|site| require_more_than_one(site, self.blocks(site)?[0], given))
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        let [size, count] = self.blocks(site)?;
        Ok(vec![
            TensorSpec::new("boft_R", [1, count, size, size]),
            TensorSpec::new("boft_s", [site.out_features, 1]),
        ])
    }

    fn init(&self, name: &str, _: &[usize]) -> Init {
        let mean = if name.ends_with("boft_s") { 1.0 } else { 0.0 };
        if self.init_weights {
            Init::Constant(mean as f32)
        } else {
            Init::Normal { mean, std: 0.1 }
        }
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        let [size, count] = self.blocks(site)?;
        Ok(Attachment::Weight(Box::new(Butterfly {
            r: at.ids[0],
            s: at.ids[1],
            blocks: Blocks {
                size,
                count,
                source: Source::Square,
                rotation: Rotation::Cayley,
                left_out: Vec::new(),
            },
            dropout: self.dropout,
        })))
    }
}

/// BOFT on one linear.
#[derive(Clone, Debug)]
struct Butterfly {
    r: ParamId,
    s: ParamId,
    blocks: Blocks,
    dropout: f64,
}

impl Butterfly {
    /// `W R^T`.
    fn rotated(&self, params: &FlatBuffer, weight: View<'_>) -> Result<Tensor> {
        let mut rotated = empty(weight, weight.rows(), weight.cols());
        let parameters = param(params, self.r, self.blocks.parameters(), weight);
        let rotations = self.blocks.rotations(parameters)?;
        block_diagonal::product(rotated.view_mut(), weight, rotations.view())?;
        Ok(rotated)
    }
}

impl WeightUpdate for Butterfly {
    /// What is left out is drawn on the host.
    fn computes_on_host(&self) -> bool {
        self.dropout > 0.0
    }

    fn drawn(&self, draws: Stream) -> Option<Box<dyn WeightUpdate + '_>> {
        let mut drawn = self.clone();
        drawn.blocks.left_out = left_out(self.dropout, self.blocks.count, draws)?;
        Some(Box::new(drawn))
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let rotated = self.rotated(params, weight.as_view())?;
        let s = param(params, self.s, [weight.rows(), 1], rotated.view());
        Ok(hadamard::add(weight, 0.0, 1.0, rotated.view(), s)?)
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let (n, [rows, cols]) = (self.blocks.size, weight.shape());
        let rotated = self.rotated(params, weight)?;
        let d_s = grad(grads, self.s, [rows, 1], weight);
        hadamard::add_row_sums(d_s, 1.0, d_weight, rotated.view())?;
        let mut d = empty(weight, rows, cols);
        let s = param(params, self.s, [rows, 1], weight);
        hadamard::add(d.view_mut(), 0.0, 1.0, d_weight, s)?;
        let mut d_rotations = empty(weight, self.blocks.count * n, n);
        block_diagonal::gradient(d_rotations.view_mut(), d.view(), weight)?;
        let shape = self.blocks.parameters();
        let parameters = param(params, self.r, shape, weight);
        let to = grad(grads, self.r, shape, weight);
        self.blocks.add_gradient(to, d_rotations, parameters)
    }
}
