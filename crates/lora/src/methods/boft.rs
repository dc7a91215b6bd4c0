//! BOFT: inputs rotated in blocks, one butterfly factor after the other; outputs scaled.
//!
//! ```text
//! W'  = s ⊙ (W F_0^T F_1^T ... F_{m-1}^T)        s [out, 1]
//! F_i = P_i D_i P_i^T
//! ```
//!
//! D_i is block-diagonal with the Cayley transforms of the skew parts of `boft_R[i] [blocks, b, b]`. P_i is the
//! identity for i = 0, and else weaves the two halves of every `b 2^i` columns, in pieces of b / 2: a block rotates a piece
//! with the one half of these columns away. Dropout puts the identity in the place of some blocks of one D_i.
//!
//! # Source
//! Liu et al.: "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization" (2023); PEFT's
//! `tuners/boft`, which without its CUDA extension makes one factor whatever the configuration says.

use super::cayley::{Blocks, Rotation, blocks, require_more_than_one, require_one};
use super::dropout::kept;
use super::matrix::{empty, grad, param};
use crate::files::Weights;
use crate::method::{Init, Keys, Method, Place, TensorSpec};
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::parts::Draws;
use ferrotune_kernels::rotation::Source;
use ferrotune_kernels::{Tensor, View, ViewMut, axpby, block_diagonal, hadamard};
use serde_json::{Map, Value, json};
use std::ops::Range;

/// BOFT's configuration.
#[derive(Clone, Debug)]
pub(crate) struct Boft {
    /// 0 where the number of blocks is given.
    block_size: usize,
    block_num: usize,
    factors: usize,
    dropout: f64,
    /// Whether a run asks for it.
    asked: bool,
    init_weights: bool,
}

impl Boft {
    /// Size and number of blocks.
    fn blocks(&self, site: &Site) -> Result<[usize; 2]> {
        let blocks = blocks(
            site,
            ("boft_block_size", self.block_size),
            ("boft_block_num", self.block_num),
        )?;
        self.require_halves(site, blocks)?;
        Ok(blocks)
    }

    /// Refuses blocks that a butterfly factor cannot weave: of an odd size, or too few of them.
    fn require_halves(&self, site: &Site, [size, count]: [usize; 2]) -> Result<()> {
        let doublings = (self.factors - 1) as u32;
        let weaves = 1_usize.checked_shl(doublings);
        let weaves = weaves.is_some_and(|blocks| count.is_multiple_of(blocks));
        if doublings == 0 || (weaves && size.is_multiple_of(2)) {
            return Ok(());
        }
        let most = match size.is_multiple_of(2) {
            true => count.trailing_zeros() + 1,
            false => 1,
        };
        let message = format!(
            "is {}, but the blocks of `{}` are {count}, of {size} inputs: a factor more takes blocks of an even size, and twice \
             as many; at most {most} here",
            self.factors, site.name
        );
        Err(Error::config("boft_n_butterfly_factor", message))
    }
}

impl Method for Boft {
    const PEFT_TYPE: &'static str = "BOFT";
    const BIAS: Option<&'static str> = Some("boft_only");

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let asked = keys.positive("boft_n_butterfly_factor", 1)?;
        let (block_size, block_num) = (
            keys.integer("boft_block_size", 4)?,
            keys.integer("boft_block_num", 0)?,
        );
        let number = ("boft_block_num", block_num);
        require_one(keys, ("boft_block_size", block_size), number, 4)?;
        Ok(Self {
            block_size,
            block_num,
            factors: made(keys)?.unwrap_or(asked),
            dropout: keys.probability("boft_dropout")?,
            asked: keys.are_asked(),
            init_weights: keys.boolean("init_weights", true)?,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("boft_block_size".into(), json!(self.block_size));
        keys.insert("boft_block_num".into(), json!(self.block_num));
        keys.insert("boft_n_butterfly_factor".into(), json!(self.factors));
        keys.insert("boft_dropout".into(), json!(self.dropout));
        keys.insert("init_weights".into(), json!(self.init_weights));
        keys.insert("fan_in_fan_out".into(), json!(false));
    }

    fn describe(&self) -> String {
        let factors = match self.factors {
            1 => String::new(),
            factors => format!(", {factors} factors"),
        };
        match self.block_size {
            0 => format!("BOFT with {} blocks{factors}", self.block_num),
            size => format!("BOFT block size {size}{factors}"),
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
            TensorSpec::new("boft_R", [self.factors, count, size, size]),
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
        let blocks = Blocks {
            size,
            count,
            source: Source::Square,
            rotation: Rotation::Cayley,
            kept: None,
        };
        Ok(Attachment::Weight(Box::new(Butterfly {
            r: at.ids[0],
            s: at.ids[1],
            factors: vec![blocks; self.factors],
            dropout: self.dropout,
        })))
    }
}

/// How many factors the file of an adapter has: PEFT makes one without its CUDA extension, and writes the number that was
/// asked for.
fn made(keys: &Keys<'_>) -> Result<Option<usize>> {
    let Some(directory) = keys.directory() else {
        return Ok(None);
    };
    let weights = Weights::open(directory)?;
    let name = weights.file.names().find(|name| name.ends_with(".boft_R"));
    let shape = name
        .and_then(|name| weights.file.meta(name))
        .map(|meta| &meta.shape);
    let factors = shape.and_then(|shape| shape.first().copied());
    Ok(factors.filter(|factors| *factors > 0))
}

/// BOFT on one linear.
#[derive(Clone, Debug)]
struct Butterfly {
    r: ParamId,
    s: ParamId,
    /// D_0 to D_{m-1}, of the same shape.
    factors: Vec<Blocks>,
    dropout: f64,
}

impl Butterfly {
    /// Shape of the parameters of all factors, below one another.
    fn parameters(&self) -> [usize; 2] {
        let [count, width] = self.factors[0].parameters();
        [self.factors.len() * count, width]
    }

    /// Rows of these that are factor `i`'s.
    fn rows(&self, i: usize) -> Range<usize> {
        let count = self.factors[0].count;
        i * count..(i + 1) * count
    }

    /// `x F_i^T`, with `x P_i`.
    fn rotated_by(&self, i: usize, woven: View<'_>, all: View<'_>) -> Result<Tensor> {
        let rotations = self.factors[i].rotations(all.row_range(self.rows(i)))?;
        let mut rotated = empty(woven, woven.rows(), woven.cols());
        block_diagonal::product(rotated.view_mut(), woven, rotations.view())?;
        Ok(self.unwoven(i, rotated))
    }

    /// What the blocks of each factor but the first read, and what the last leaves.
    fn rotated(&self, params: &FlatBuffer, weight: View<'_>) -> Result<(Vec<Tensor>, Tensor)> {
        let all = param(params, self.r, self.parameters(), weight);
        let mut rotated = self.rotated_by(0, weight, all)?;
        let mut read = Vec::new();
        for i in 1..self.factors.len() {
            let woven = self.woven(i, rotated);
            rotated = self.rotated_by(i, woven.view(), all)?;
            read.push(woven);
        }
        Ok((read, rotated))
    }

    /// `x P_i`.
    fn woven(&self, i: usize, x: Tensor) -> Tensor {
        self.reordered(i, x, |piece, half| {
            (piece, 2 * (piece % half) + piece / half)
        })
    }

    /// `x P_i^T`.
    fn unwoven(&self, i: usize, x: Tensor) -> Tensor {
        self.reordered(i, x, |piece, half| {
            (2 * (piece % half) + piece / half, piece)
        })
    }

    /// `x` with the pieces of every `b 2^i` columns elsewhere: `places` says of a number below all of them, of which so
    /// many are half, which piece goes where.
    fn reordered(
        &self,
        i: usize,
        x: Tensor,
        places: impl Fn(usize, usize) -> (usize, usize),
    ) -> Tensor {
        if i == 0 {
            return x;
        }
        let ([rows, cols], half) = (x.view().shape(), 1 << i);
        let (piece, width) = (self.factors[i].size / 2, self.factors[i].size * half);
        let groups = rows * (cols / width);
        let mut to = empty(x.view(), rows, cols);
        let columns = |number: usize| number * piece..(number + 1) * piece;
        for number in 0..2 * half {
            let (source, target) = places(number, half);
            let from = x.view().reshaped(groups, width).columns(columns(source));
            let to = to.view_mut().reshaped(groups, width);
            to.columns(columns(target)).copy_from(from);
        }
        to
    }
}

impl WeightUpdate for Butterfly {
    fn computes_on_host(&self) -> bool {
        false
    }

    /// What each factor but the first reads, and four on the way back through one.
    fn temporaries(&self) -> usize {
        match self.factors.len() {
            1 => 2,
            several => several + 3,
        }
    }

    /// Blocks of one factor.
    fn drawn(&self, draws: Draws<'_>) -> Result<Option<Box<dyn WeightUpdate + '_>>> {
        let (mut drawn, groups) = (self.clone(), self.factors.len());
        for (group, blocks) in drawn.factors.iter_mut().enumerate() {
            blocks.kept = kept(self.dropout, blocks.count, [group, groups], draws)?;
        }
        Ok(Some(Box::new(drawn)))
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let (_, rotated) = self.rotated(params, weight.as_view())?;
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
        let (n, [rows, cols]) = (self.factors[0].size, weight.shape());
        let (mut read, rotated) = self.rotated(params, weight)?;
        let d_s = grad(grads, self.s, [rows, 1], weight);
        hadamard::add_row_sums(d_s, 1.0, d_weight, rotated.view())?;
        drop(rotated);
        let mut d = empty(weight, rows, cols);
        let s = param(params, self.s, [rows, 1], weight);
        hadamard::add(d.view_mut(), 0.0, 1.0, d_weight, s)?;
        let all = param(params, self.r, self.parameters(), weight);
        for (i, blocks) in self.factors.iter().enumerate().rev() {
            d = self.woven(i, d);
            let read = if i > 0 { read.pop() } else { None };
            let read = read.as_ref().map_or(weight, Tensor::view);
            let parameters = all.row_range(self.rows(i));
            let mut d_rotations = empty(weight, blocks.count * n, n);
            block_diagonal::gradient(d_rotations.view_mut(), d.view(), read)?;
            let to = grad(grads, self.r, self.parameters(), weight).row_range(self.rows(i));
            blocks.add_gradient(to, d_rotations, parameters)?;
            if i > 0 {
                // Of the skew matrix with the other sign the rotation is the transpose.
                let [count, width] = blocks.parameters();
                let mut negative = empty(weight, count, width);
                negative.view_mut().fill(0.0);
                axpby::add(1.0, negative.view_mut(), -1.0, parameters)?;
                let back = blocks.rotations(negative.view())?;
                let mut before = empty(weight, rows, cols);
                block_diagonal::product(before.view_mut(), d.view(), back.view())?;
                d = self.unwoven(i, before);
            }
        }
        Ok(())
    }
}
