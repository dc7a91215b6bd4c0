//! HiRA: the weight times one plus a low-rank matrix, element by element.
//!
//! `W' = W + W ⊙ (B A)`, with dropout `y = x W^T + dropout(x) (W ⊙ (B A))^T`.
//!
//! # Source
//! Huang et al.: "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models"
//! (2025); PEFT's `tuners/hira`.

use super::matrix::{empty, grad, nn, param};
use crate::files::Weights;
use crate::method::{Init, Keys, Method, Patterned, Place, TensorSpec, tensor_name};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{View, ViewMut, hadamard, matmul};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const A: &str = "hira_A";

/// How A and B start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// A uniform, B zero.
    Kaiming,
    /// A normal, B zero.
    Gaussian,
    /// Both normal.
    Random,
}

/// HiRA's configuration.
#[derive(Clone, Debug)]
pub(crate) struct Hira {
    rank: Patterned<usize>,
    /// Ranks as the adapter's file has them, by the name of A: PEFT 0.21.2 ignores `rank_pattern`, so the file knows.
    stored: Option<BTreeMap<String, usize>>,
    dropout: f64,
    start: Start,
}

impl Hira {
    fn rank(&self, site: &Site) -> Result<usize> {
        let name = tensor_name(&site.name, A);
        let stored = self.stored.as_ref().and_then(|ranks| ranks.get(&name));
        stored.map_or_else(|| self.rank.of(&site.name), |rank| Ok(*rank))
    }
}

fn stored_ranks(directory: &Path) -> Result<BTreeMap<String, usize>> {
    let weights = Weights::open(directory)?;
    let names = weights.file.names().filter(|name| name.ends_with(A));
    let rank = |name: &str| weights.file.meta(name)?.shape.first().copied();
    let ranks = names.filter_map(|name| Some((name.to_owned(), rank(name)?)));
    Ok(ranks.collect())
}

impl Method for Hira {
    const PEFT_TYPE: &'static str = "HIRA";

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let start = match keys.get("init_weights") {
            None | Some(Value::Bool(true)) => Start::Kaiming,
            Some(Value::Bool(false)) => Start::Random,
            Some(Value::String(text)) if text == "gaussian" => Start::Gaussian,
            Some(value) => {
                return Err(keys.error(
                    "init_weights",
                    format!("is {value}, expected true, false or \"gaussian\""),
                ));
            }
        };
        Ok(Self {
            rank: keys.patterned("r", 32, "rank_pattern")?,
            stored: keys.directory().map(stored_ranks).transpose()?,
            dropout: keys.probability("hira_dropout")?,
            start,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("r".into(), json!(self.rank.default));
        keys.insert("rank_pattern".into(), self.rank.to_json());
        let start = match self.start {
            Start::Kaiming => json!(true),
            Start::Gaussian => json!("gaussian"),
            Start::Random => json!(false),
        };
        keys.insert("init_weights".into(), start);
        keys.insert("hira_dropout".into(), json!(self.dropout));
        keys.insert("fan_in_fan_out".into(), json!(false));
    }

    fn describe(&self) -> String {
        format!("HiRA r={}", self.rank.default)
    }

    fn check(&self, targets: &[&Site]) -> Result<()> {
        if self.stored.is_some() {
            return Ok(());
        }
        if !self.rank.pattern.is_empty() {
            tracing::warn!(
                "PEFT 0.21.2 ignores HiRA's `rank_pattern`, and does not load adapters that were trained with one"
            );
        }
        self.rank.require_ranks(targets)
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        let rank = self.rank(site)?;
        Ok(vec![
            TensorSpec::new(A, [rank, site.in_features]),
            TensorSpec::new("hira_B", [site.out_features, rank]),
        ])
    }

    fn init(&self, name: &str, shape: &[usize]) -> Init {
        match (name.ends_with('A'), self.start) {
            (true, Start::Kaiming) => Init::kaiming(shape[1]),
            (true, Start::Gaussian) => Init::Normal {
                mean: 0.0,
                std: 1.0 / shape[0] as f64,
            },
            (_, Start::Random) => Init::Normal {
                mean: 0.0,
                std: 1.0,
            },
            (false, _) => Init::Constant(0.0),
        }
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        let rank = self.rank(site)?;
        let shape = [site.out_features, rank, site.in_features];
        Ok(Attachment::Weight(Box::new(Update {
            a: at.ids[0],
            b: at.ids[1],
            shape,
            dropout: self.dropout as f32,
        })))
    }
}

/// HiRA on one linear.
#[derive(Debug)]
struct Update {
    a: ParamId,
    b: ParamId,
    /// out, rank, in.
    shape: [usize; 3],
    dropout: f32,
}

impl Update {
    fn factors<'a>(&self, params: &'a FlatBuffer, beside: View<'_>) -> [View<'a>; 2] {
        let [out, rank, inputs] = self.shape;
        [
            param(params, self.a, [rank, inputs], beside),
            param(params, self.b, [out, rank], beside),
        ]
    }
}

impl WeightUpdate for Update {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let [a, b] = self.factors(params, weight.as_view());
        let product = nn(b, a)?;
        Ok(hadamard::scale(weight, 1.0, product.view())?)
    }

    fn dropout(&self) -> f32 {
        self.dropout
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        weight: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let ([a, b], [out, rank, inputs]) = (self.factors(params, weight), self.shape);
        let mut d = empty(weight, out, inputs);
        hadamard::add(d.view_mut(), 0.0, 1.0, weight, d_weight)?;
        let d_a = grad(grads, self.a, [rank, inputs], weight);
        matmul::tn(d_a, 1.0, 1.0, b, d.view())?;
        let d_b = grad(grads, self.b, [out, rank], weight);
        Ok(matmul::nt(d_b, 1.0, 1.0, d.view(), a)?)
    }
}
