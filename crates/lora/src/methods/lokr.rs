//! LoKr: a Kronecker product of two small matrices, each of which may be low-rank itself.
//!
//! `W' = W + alpha / r * kron(w1, w2)`, w1 `[out_1, in_1]`, w2 `[out_2, in_2]`, with
//! `out = out_1 out_2` and `in = in_1 in_2`. `rank_dropout` leaves rows of the product out.
//!
//! # Source
//! Yeh et al.: "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation"
//! (2023); PEFT's `tuners/lokr`, which also decides the shapes.

use super::dropout::SumDropout;
use super::matrix::{copy_of, empty, grad, nn, param};
use crate::method::{Init, Keys, Method, Patterned, Place, TensorSpec};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::parts::Draws;
use ferrotune_kernels::{Tensor, View, ViewMut, axpby, kronecker, matmul};
use serde_json::{Map, Value, json};

/// How the factors start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// w1 zero: the adapter does nothing.
    ZeroFirst,
    /// w2 zero, as in LyCORIS.
    ZeroSecond,
    Random,
}

/// LoKr's configuration.
#[derive(Clone, Debug)]
pub(crate) struct Lokr {
    rank: Patterned<usize>,
    alpha: Patterned<f64>,
    decompose_both: bool,
    /// `None` for a factor near the square root.
    decompose_factor: Option<usize>,
    dropout: SumDropout,
    start: Start,
}

/// Sizes of the two factors of one linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    out: [usize; 2],
    inputs: [usize; 2],
    rank: usize,
    /// Whether each factor is low-rank.
    low_rank: [bool; 2],
}

impl Lokr {
    fn shape(&self, site: &Site) -> Result<Shape> {
        let rank = self.rank.of(&site.name)?;
        let out = factorization(site.out_features, self.decompose_factor);
        let inputs = factorization(site.in_features, self.decompose_factor);
        let low = |part: usize| 2 * rank < out[part].max(inputs[part]);
        let low_rank = [self.decompose_both && low(0), low(1)];
        Ok(Shape {
            out,
            inputs,
            rank,
            low_rank,
        })
    }
}

/// Two factors of `dimension`, the smaller first: near `factor`, or near each other without one.
fn factorization(dimension: usize, factor: Option<usize>) -> [usize; 2] {
    if let Some(factor) = factor
        && factor > 0
        && dimension.is_multiple_of(factor)
    {
        return [factor, dimension / factor];
    }
    let limit = factor.unwrap_or(dimension);
    let [mut m, mut n] = [1, dimension];
    let length = m + n;
    while m < n {
        let next = (m + 1..=dimension).find(|candidate| dimension.is_multiple_of(*candidate));
        let Some(next) = next else { break };
        let other = dimension / next;
        if next + other > length || next > limit {
            break;
        }
        [m, n] = [next, other];
    }
    [m.min(n), m.max(n)]
}

impl Method for Lokr {
    const PEFT_TYPE: &'static str = "LOKR";

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        keys.require_off("use_effective_conv2d")?;
        let start = match keys.get("init_weights") {
            None | Some(Value::Bool(true)) => Start::ZeroFirst,
            Some(Value::Bool(false)) => Start::Random,
            Some(Value::String(text)) if text == "lycoris" => Start::ZeroSecond,
            Some(value) => {
                return Err(keys.error(
                    "init_weights",
                    format!("is {value}, expected true, false or \"lycoris\""),
                ));
            }
        };
        let decompose_factor = match keys.get("decompose_factor").map(Value::as_i64) {
            None | Some(Some(-1)) => None,
            Some(Some(factor)) if factor > 0 => Some(factor as usize),
            Some(_) => {
                return Err(keys.error(
                    "decompose_factor",
                    "must be -1 or a whole number of at least 1",
                ));
            }
        };
        let scaled = keys.boolean("rank_dropout_scale", false)?;
        Ok(Self {
            rank: keys.patterned("r", 8, "rank_pattern")?,
            alpha: keys.patterned_number("alpha", 8.0, "alpha_pattern")?,
            decompose_both: keys.boolean("decompose_both", false)?,
            decompose_factor,
            dropout: SumDropout::read(keys, scaled)?,
            start,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("r".into(), json!(self.rank.default));
        keys.insert("alpha".into(), json!(self.alpha.default));
        keys.insert("rank_pattern".into(), self.rank.to_json());
        keys.insert("alpha_pattern".into(), self.alpha.to_json());
        keys.insert("decompose_both".into(), json!(self.decompose_both));
        let factor = self
            .decompose_factor
            .map_or(json!(-1), |factor| json!(factor));
        keys.insert("decompose_factor".into(), factor);
        self.dropout.write(keys);
        keys.insert("rank_dropout_scale".into(), json!(self.dropout.scaled));
        let start = match self.start {
            Start::ZeroFirst => json!(true),
            Start::ZeroSecond => json!("lycoris"),
            Start::Random => json!(false),
        };
        keys.insert("init_weights".into(), start);
    }

    fn describe(&self) -> String {
        format!("LoKr r={} alpha={}", self.rank.default, self.alpha.default)
    }

    fn check(&self, targets: &[&Site]) -> Result<()> {
        let names: Vec<&str> = targets.iter().map(|site| site.name.as_str()).collect();
        self.rank.require_used(&names)?;
        self.alpha.require_used(&names)
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        const NAMES: [[&str; 3]; 2] = [
            ["lokr_w1", "lokr_w1_a", "lokr_w1_b"],
            ["lokr_w2", "lokr_w2_a", "lokr_w2_b"],
        ];
        let shape = self.shape(site)?;
        let mut specs = Vec::new();
        for (part, [whole, a, b]) in NAMES.into_iter().enumerate() {
            let [rows, cols] = [shape.out[part], shape.inputs[part]];
            if shape.low_rank[part] {
                specs.push(TensorSpec::new(a, [rows, shape.rank]));
                specs.push(TensorSpec::new(b, [shape.rank, cols]));
            } else {
                specs.push(TensorSpec::new(whole, [rows, cols]));
            }
        }
        Ok(specs)
    }

    fn init(&self, name: &str, shape: &[usize]) -> Init {
        let zero = match self.start {
            Start::Random => false,
            Start::ZeroFirst => name.ends_with("w1") || name.ends_with("w1_a"),
            Start::ZeroSecond => name.ends_with("w2") || name.ends_with("w2_b"),
        };
        if zero {
            Init::Constant(0.0)
        } else {
            Init::kaiming(shape[1])
        }
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        let shape = self.shape(site)?;
        let first = if shape.low_rank[0] { 2 } else { 1 };
        Ok(Attachment::Weight(Box::new(Update {
            factors: [at.ids[..first].to_vec(), at.ids[first..].to_vec()],
            shape,
            scale: (self.alpha.of(&site.name)? / shape.rank as f64) as f32,
            dropout: self.dropout,
        })))
    }
}

/// LoKr on one linear.
#[derive(Debug)]
struct Update {
    /// One tensor, or A and B, of each factor.
    factors: [Vec<ParamId>; 2],
    shape: Shape,
    scale: f32,
    dropout: SumDropout,
}

impl Update {
    /// Rows and columns of a factor.
    fn factor_shape(&self, part: usize) -> [usize; 2] {
        [self.shape.out[part], self.shape.inputs[part]]
    }

    /// A factor `[rows, cols]`.
    fn factor(&self, params: &FlatBuffer, part: usize, beside: View<'_>) -> Result<Tensor> {
        let ([rows, cols], rank) = (self.factor_shape(part), self.shape.rank);
        match self.factors[part][..] {
            [a, b] => nn(
                param(params, a, [rows, rank], beside),
                param(params, b, [rank, cols], beside),
            ),
            _ => {
                let whole = self.factors[part][0];
                Ok(copy_of(param(params, whole, [rows, cols], beside)))
            }
        }
    }

    /// Adds the gradient `d` of a factor to its tensors.
    fn factor_backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        part: usize,
        d: View<'_>,
    ) -> Result<()> {
        let ([rows, cols], rank) = (self.factor_shape(part), self.shape.rank);
        match self.factors[part][..] {
            [a, b] => {
                let a_view = param(params, a, [rows, rank], d);
                let b_view = param(params, b, [rank, cols], d);
                matmul::nt(grad(grads, a, [rows, rank], d), 1.0, 1.0, d, b_view)?;
                matmul::tn(grad(grads, b, [rank, cols], d), 1.0, 1.0, a_view, d)?;
            }
            _ => {
                let whole = grad(grads, self.factors[part][0], [rows, cols], d);
                axpby::add(1.0, whole, 1.0, d)?;
            }
        }
        Ok(())
    }
}

fn second(factor: &Tensor) -> kronecker::Second<'_> {
    kronecker::Second {
        matrix: factor.view(),
        transposed: false,
    }
}

impl WeightUpdate for Update {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let [w1, w2] = [0, 1].map(|part| self.factor(params, part, weight.as_view()));
        let (w1, w2) = (w1?, w2?);
        Ok(kronecker::add(weight, self.scale, w1.view(), second(&w2))?)
    }

    /// As many as there are by default, and D where rows of it are left out.
    fn temporaries(&self) -> usize {
        2 + usize::from(self.dropout.is_on())
    }

    fn drawn(&self, draws: Draws<'_>) -> Result<Option<Box<dyn WeightUpdate + '_>>> {
        let rows = self.shape.out.iter().product();
        self.dropout.drawn(self, rows, draws)
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        _: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let zeros = |part| {
            let [rows, cols] = self.factor_shape(part);
            let mut zeros = empty(d_weight, rows, cols);
            zeros.view_mut().fill(0.0);
            zeros
        };
        let mut d = zeros(0);
        let w2 = self.factor(params, 1, d_weight)?;
        kronecker::add_first_gradient(d.view_mut(), self.scale, d_weight, second(&w2))?;
        self.factor_backward(params, grads, 0, d.view())?;
        let mut d = zeros(1);
        let w1 = self.factor(params, 0, d_weight)?;
        kronecker::add_second_gradient(d.view_mut(), false, self.scale, d_weight, w1.view())?;
        self.factor_backward(params, grads, 1, d.view())
    }
}

#[cfg(test)]
mod tests {
    use super::factorization;

    #[test]
    fn dimensions_fall_into_pefts_factors() {
        let cases = [
            (256, None, [16, 16]),
            (128, None, [8, 16]),
            (127, None, [1, 127]),
            (128, Some(4), [4, 32]),
            (96, Some(5), [4, 24]),
            (1, None, [1, 1]),
        ];
        for (dimension, factor, expected) in cases {
            assert_eq!(
                factorization(dimension, factor),
                expected,
                "{dimension} {factor:?}"
            );
        }
    }
}
