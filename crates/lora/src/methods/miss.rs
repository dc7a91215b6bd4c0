//! MiSS: one trained strip, added to every block of columns of the weight.
//!
//! With `miss_block [r, out]`, `W'[o, c] = W[o, c] + block[c mod r, o]`. The variant `mini` repeats a
//! narrower strip `[r, mini_r]` along the outputs; `bat` has blocks `[out / r, r, r]` and
//! `W'_ij = W_ij + W_ij B_i + B_i` for the r x r blocks of the weight.
//!
//! # Source
//! Kang et al.: "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure"
//! (2024); PEFT's `tuners/miss`.

use super::matrix::{changed_on_host, elements, empty, grad, nn, on_host, param, tn, update};
use crate::method::{Init, Keys, Method, Place, TensorSpec};
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{Tensor, View, ViewMut, kronecker};
use serde_json::{Map, Value, json};

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
    fn block<'a>(&self, params: &'a FlatBuffer, i: usize) -> View<'a> {
        let n = self.rank;
        View::from_f32(&params.get(self.block)[i * n * n..(i + 1) * n * n], n, n)
    }
}

impl WeightUpdate for Bat {
    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        changed_on_host(weight, |weight| self.apply_on_host(params, weight))
    }

    fn backward(
        &self,
        _: &FlatBuffer,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        on_host(weight, |weight| {
            on_host(d_weight, |d_weight| {
                self.backward_on_host(grads, weight, d_weight)
            })
        })
    }
}

impl Bat {
    fn apply_on_host(&self, params: &FlatBuffer, mut weight: ViewMut<'_>) -> Result<()> {
        let (n, [rows, cols]) = (self.rank, weight.shape());
        for i in 0..rows / n {
            let b = self.block(params, i);
            let b_values = b.to_f32_vec();
            for j in 0..cols / n {
                let part = weight
                    .reborrow()
                    .row_range(i * n..(i + 1) * n)
                    .columns(j * n..(j + 1) * n);
                let before = part.as_view().to_f32_vec();
                let product = nn(View::from_f32(&before, n, n), b)?.to_f32_vec();
                update(part, |r, c, w| w + product[r * n + c] + b_values[r * n + c]);
            }
        }
        Ok(())
    }

    fn backward_on_host(
        &self,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let (n, [rows, cols]) = (self.rank, weight.shape());
        for i in 0..rows / n {
            let target = &mut grads.get_mut(self.block)[i * n * n..(i + 1) * n * n];
            for j in 0..cols / n {
                let part = |view: View<'_>| {
                    elements(
                        view.row_range(i * n..(i + 1) * n)
                            .columns(j * n..(j + 1) * n),
                    )
                };
                let (w, d) = (part(weight), part(d_weight));
                let through = tn(View::from_f32(&w, n, n), View::from_f32(&d, n, n))?.to_f32_vec();
                super::matrix::add(target, &through);
                super::matrix::add(target, &d);
            }
        }
        Ok(())
    }
}
