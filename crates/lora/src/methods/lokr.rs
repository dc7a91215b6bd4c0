//! LoKr: a Kronecker product of two small matrices, each of which may be low-rank itself.
//!
//! `W' = W + alpha / r * kron(w1, w2)`, w1 `[out_1, in_1]`, w2 `[out_2, in_2]`, with
//! `out = out_1 out_2` and `in = in_1 in_2`.
//!
//! # Source
//! Yeh et al.: "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation"
//! (2023); PEFT's `tuners/lokr`, which also decides the shapes.

use super::matrix::{elements, grad, nn, param, update};
use crate::method::{Init, Keys, Method, Patterned, Place, TensorSpec};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{View, ViewMut, matmul};
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
        for key in ["rank_dropout", "module_dropout", "rank_dropout_scale"] {
            keys.training_only(key)?;
        }
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
        Ok(Self {
            rank: keys.patterned("r", 8, "rank_pattern")?,
            alpha: keys.patterned_number("alpha", 8.0, "alpha_pattern")?,
            decompose_both: keys.boolean("decompose_both", false)?,
            decompose_factor,
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
}

impl Update {
    /// A factor `[rows, cols]`, row by row.
    fn factor(&self, params: &FlatBuffer, part: usize) -> Result<Vec<f32>> {
        let Shape {
            out, inputs, rank, ..
        } = self.shape;
        match self.factors[part][..] {
            [a, b] => {
                let [a, b] = [
                    param(params, a, out[part], rank),
                    param(params, b, rank, inputs[part]),
                ];
                Ok(nn(a, b)?.to_f32_vec())
            }
            _ => Ok(params.get(self.factors[part][0]).to_vec()),
        }
    }

    /// Adds the gradient `d` of a factor to its tensors.
    fn factor_backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        part: usize,
        d: &[f32],
    ) -> Result<()> {
        let Shape {
            out, inputs, rank, ..
        } = self.shape;
        let [rows, cols] = [out[part], inputs[part]];
        let d = View::from_f32(d, rows, cols);
        match self.factors[part][..] {
            [a, b] => {
                let (a_view, b_view) = (param(params, a, rows, rank), param(params, b, rank, cols));
                matmul::nt(grad(grads, a, rows, rank), 1.0, 1.0, d, b_view)?;
                matmul::tn(grad(grads, b, rank, cols), 1.0, 1.0, a_view, d)?;
            }
            _ => super::matrix::add(grads.get_mut(self.factors[part][0]), &d.to_f32_vec()),
        }
        Ok(())
    }
}

impl WeightUpdate for Update {
    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let (first, second) = (self.factor(params, 0)?, self.factor(params, 1)?);
        let Shape {
            out: [_, rows],
            inputs: [cols_1, cols],
            ..
        } = self.shape;
        update(weight, |r, c, w| {
            w + self.scale
                * first[r / rows * cols_1 + c / cols]
                * second[r % rows * cols + c % cols]
        });
        Ok(())
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        _: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let (first, second) = (self.factor(params, 0)?, self.factor(params, 1)?);
        let Shape {
            out: [_, rows],
            inputs: [cols_1, cols],
            ..
        } = self.shape;
        let (mut d_first, mut d_second) = (vec![0.0; first.len()], vec![0.0; second.len()]);
        let width = d_weight.cols();
        for (r, row) in elements(d_weight).chunks_exact(width).enumerate() {
            for (c, d) in row.iter().enumerate() {
                let (i, j) = (r / rows * cols_1 + c / cols, r % rows * cols + c % cols);
                d_first[i] += self.scale * d * second[j];
                d_second[j] += self.scale * d * first[i];
            }
        }
        self.factor_backward(params, grads, 0, &d_first)?;
        self.factor_backward(params, grads, 1, &d_second)
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
