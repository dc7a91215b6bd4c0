//! MiSS: one trained strip, added to every block of columns of the weight.
//!
//! With `miss_block [r, out]`, `W'[o, c] = W[o, c] + block[c mod r, o]`. The variant `mini` repeats a
//! narrower strip `[r, mini_r]` along the outputs; `bat` has blocks `[out / r, r, r]` and
//! `W'_ij = W_ij + W_ij B_i + B_i` for the r x r blocks of the weight.
//!
//! # Source
//! Kang et al.: "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure"
//! (2024); PEFT's `tuners/miss`.

use super::matrix::{copy_of, empty, grad, nn, param};
use crate::method::{Init, Keys, Method, Place, TensorSpec};
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{Tensor, View, ViewMut, axpby, kronecker, matmul};
use serde_json::{Map, Value, json};
use std::ops::Range;

/// What `init_weights` chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Plain,
    /// Starts at random.
    Random,
    Bat,
    Mini,
}

/// MiSS' configuration.
#[derive(Clone, Debug)]
pub(crate) struct Miss {
    rank: usize,
    mini_rank: usize,
    dropout: f64,
    variant: Variant,
}

impl Miss {
    /// Columns of the strip at `site`.
    fn width(&self, site: &Site) -> usize {
        if self.variant == Variant::Mini {
            self.mini_rank
        } else {
            site.out_features
        }
    }

    fn require_fit(&self, site: &Site) -> Result<()> {
        let [rank, out, inputs] = [self.rank, site.out_features, site.in_features];
        let wrong = match self.variant {
            _ if rank > inputs => format!("is {rank}, more than the {inputs} inputs"),
            Variant::Bat if inputs % rank > 0 || out % rank > 0 => {
                format!("is {rank}, which must divide [{out}, {inputs}] for \"bat\"")
            }
            _ => String::new(),
        };
        if !wrong.is_empty() {
            return Err(Error::config("r", format!("{wrong} of `{}`", site.name)));
        }
        if self.variant == Variant::Mini && out % self.mini_rank > 0 {
            let message = format!(
                "is {}, which must divide the {out} outputs of `{}`",
                self.mini_rank, site.name
            );
            return Err(Error::config("mini_r", message));
        }
        Ok(())
    }
}

impl Method for Miss {
    const PEFT_TYPE: &'static str = "MISS";
    const BIAS: Option<&'static str> = Some("MiSS_only");

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let variant = match keys.get("init_weights") {
            None | Some(Value::Bool(true)) => Variant::Plain,
            Some(Value::Bool(false)) => Variant::Random,
            Some(Value::String(text)) if text == "bat" => Variant::Bat,
            Some(Value::String(text)) if text == "mini" => Variant::Mini,
            Some(value) => {
                return Err(keys.error(
                    "init_weights",
                    format!("is {value}, expected true, false, \"bat\" or \"mini\""),
                ));
            }
        };
        let dropout = keys.probability("miss_dropout")?;
        if variant == Variant::Bat && dropout > 0.0 && keys.are_asked() {
            let message =
                format!("is {dropout}: \"bat\" has no dropout, in PEFT either; leave it out");
            return Err(keys.error("miss_dropout", message));
        }
        Ok(Self {
            rank: keys.positive("r", 64)?,
            mini_rank: keys.positive("mini_r", 1)?,
            dropout,
            variant,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("r".into(), json!(self.rank));
        keys.insert("mini_r".into(), json!(self.mini_rank));
        let variant = match self.variant {
            Variant::Plain => json!(true),
            Variant::Random => json!(false),
            Variant::Bat => json!("bat"),
            Variant::Mini => json!("mini"),
        };
        keys.insert("init_weights".into(), variant);
        keys.insert("miss_dropout".into(), json!(self.dropout));
    }

    fn describe(&self) -> String {
        format!("MiSS r={}", self.rank)
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        self.require_fit(site)?;
        let shape = match self.variant {
            Variant::Bat => vec![site.out_features / self.rank, self.rank, self.rank],
            _ => vec![self.rank, self.width(site)],
        };
        Ok(vec![TensorSpec::new("miss_block", shape)])
    }

    fn init(&self, _: &str, shape: &[usize]) -> Init {
        match self.variant {
            Variant::Random => Init::kaiming(shape[1]),
            _ => Init::Constant(0.0),
        }
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        let (block, rank) = (at.ids[0], self.rank);
        Ok(Attachment::Weight(match self.variant {
            Variant::Bat => Box::new(Bat { block, rank }),
            _ => Box::new(Strip {
                block,
                rank,
                width: self.width(site),
                dropout: self.dropout as f32,
            }),
        }))
    }
}

/// The same strip on every block of columns.
#[derive(Debug)]
struct Strip {
    block: ParamId,
    rank: usize,
    width: usize,
    dropout: f32,
}

impl Strip {
    /// Ones, one for each copy of the strip over a weight like this.
    fn copies(&self, weight: View<'_>) -> Tensor {
        let [rows, cols] = weight.shape();
        let mut ones = empty(weight, rows.div_ceil(self.width), cols.div_ceil(self.rank));
        ones.view_mut().fill(1.0);
        ones
    }
}

impl WeightUpdate for Strip {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let copies = self.copies(weight.as_view());
        let shape = [self.rank, self.width];
        let strip = kronecker::Second {
            matrix: param(params, self.block, shape, weight.as_view()),
            transposed: true,
        };
        Ok(kronecker::add(weight, 1.0, copies.view(), strip)?)
    }

    fn dropout(&self) -> f32 {
        self.dropout
    }

    fn backward(
        &self,
        _: &FlatBuffer,
        grads: &mut FlatBuffer,
        _: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let copies = self.copies(d_weight);
        let d = grad(grads, self.block, [self.rank, self.width], d_weight);
        Ok(kronecker::add_second_gradient(
            d,
            true,
            1.0,
            d_weight,
            copies.view(),
        )?)
    }
}

/// A block for each row of blocks of the weight.
#[derive(Debug)]
struct Bat {
    block: ParamId,
    rank: usize,
}

impl Bat {
    /// Ones, one for each block in a row of blocks.
    fn ones(&self, weight: View<'_>) -> Tensor {
        let mut ones = empty(weight, 1, weight.cols() / self.rank);
        ones.view_mut().fill(1.0);
        ones
    }

    /// B, one block below the other.
    fn shape(&self, weight: View<'_>) -> [usize; 2] {
        [weight.rows(), self.rank]
    }

    /// The rows of each row of blocks.
    fn rows(&self, weight: View<'_>) -> impl Iterator<Item = Range<usize>> {
        let n = self.rank;
        (0..weight.rows() / n).map(move |i| i * n..(i + 1) * n)
    }
}

impl WeightUpdate for Bat {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn apply(&self, params: &FlatBuffer, mut weight: ViewMut<'_>) -> Result<()> {
        let (n, before) = (self.rank, copy_of(weight.as_view()));
        let (before, cols) = (before.view(), weight.cols());
        let blocks = param(params, self.block, self.shape(before), before);
        let ones = self.ones(before);
        for rows in self.rows(before) {
            let block = blocks.row_range(rows.clone());
            // Each row of a block of W, one below the other.
            let product = nn(before.row_range(rows.clone()).reshaped(cols, n), block)?;
            let mut to = weight.reborrow().row_range(rows);
            axpby::add(1.0, to.reborrow(), 1.0, product.view().reshaped(n, cols))?;
            let second = kronecker::Second {
                matrix: block,
                transposed: false,
            };
            kronecker::add(to, 1.0, ones.view(), second)?;
        }
        Ok(())
    }

    fn backward(
        &self,
        _: &FlatBuffer,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let (n, cols) = (self.rank, weight.cols());
        let (weight, d_weight) = (copy_of(weight), copy_of(d_weight));
        let (weight, d_weight) = (weight.view(), d_weight.view());
        let ones = self.ones(d_weight);
        let mut d_blocks = grad(grads, self.block, self.shape(weight), d_weight);
        for rows in self.rows(weight) {
            let mut d_block = d_blocks.reborrow().row_range(rows.clone());
            let [w, d] = [weight, d_weight].map(|of| of.row_range(rows.clone()));
            let (w, tall) = (w.reshaped(cols, n), d.reshaped(cols, n));
            matmul::tn(d_block.reborrow(), 1.0, 1.0, w, tall)?;
            kronecker::add_second_gradient(d_block, false, 1.0, d, ones.view())?;
        }
        Ok(())
    }
}
