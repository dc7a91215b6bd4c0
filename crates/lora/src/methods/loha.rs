//! LoHa: the elementwise product of two low-rank matrices.
//!
//! `W' = W + alpha / r * (w1_a w1_b) ⊙ (w2_a w2_b)`. `rank_dropout` leaves rows of the sum's second part out, and
//! the others grow by as much.
//!
//! # Source
//! Hyeon-Woo et al.: "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
//! Learning" (2021); PEFT's `tuners/loha`.

use super::dropout::SumDropout;
use super::matrix::{empty, grad, nn, param};
use crate::method::{Init, Keys, Method, Patterned, Place, TensorSpec};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::parts::Draws;
use ferrotune_kernels::{Tensor, View, ViewMut, hadamard, matmul};
use serde_json::{Map, Value, json};

/// LoHa's configuration.
#[derive(Clone, Debug)]
pub(crate) struct Loha {
    rank: Patterned<usize>,
    alpha: Patterned<f64>,
    dropout: SumDropout,
    init_weights: bool,
}

impl Method for Loha {
    const PEFT_TYPE: &'static str = "LOHA";

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        keys.require_off("use_effective_conv2d")?;
        Ok(Self {
            rank: keys.patterned("r", 8, "rank_pattern")?,
            alpha: keys.patterned_number("alpha", 8.0, "alpha_pattern")?,
            dropout: SumDropout::read(keys, true)?,
            init_weights: keys.boolean("init_weights", true)?,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("r".into(), json!(self.rank.default));
        keys.insert("alpha".into(), json!(self.alpha.default));
        keys.insert("rank_pattern".into(), self.rank.to_json());
        keys.insert("alpha_pattern".into(), self.alpha.to_json());
        self.dropout.write(keys);
        keys.insert("init_weights".into(), json!(self.init_weights));
    }

    fn describe(&self) -> String {
        format!("LoHa r={} alpha={}", self.rank.default, self.alpha.default)
    }

    fn check(&self, targets: &[&Site]) -> Result<()> {
        let names: Vec<&str> = targets.iter().map(|site| site.name.as_str()).collect();
        self.alpha.require_used(&names)?;
        self.rank.require_ranks(targets)
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        let rank = self.rank.of(&site.name)?;
        let (a, b) = ([site.out_features, rank], [rank, site.in_features]);
        let shapes = [
            ("hada_w1_a", a),
            ("hada_w1_b", b),
            ("hada_w2_a", a),
            ("hada_w2_b", b),
        ];
        Ok(shapes
            .map(|(ending, shape)| TensorSpec::new(ending, shape))
            .into())
    }

    fn init(&self, name: &str, shape: &[usize]) -> Init {
        if self.init_weights && name.ends_with("w2_b") {
            return Init::Constant(0.0);
        }
        Init::kaiming(shape[1])
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        let rank = self.rank.of(&site.name)?;
        Ok(Attachment::Weight(Box::new(Update {
            factors: [[at.ids[0], at.ids[1]], [at.ids[2], at.ids[3]]],
            shape: [site.out_features, rank, site.in_features],
            scale: (self.alpha.of(&site.name)? / rank as f64) as f32,
            dropout: self.dropout,
        })))
    }
}

/// LoHa on one linear.
#[derive(Debug)]
struct Update {
    factors: [[ParamId; 2]; 2],
    /// out, rank, in.
    shape: [usize; 3],
    scale: f32,
    dropout: SumDropout,
}

impl Update {
    fn factors<'a>(
        &self,
        params: &'a FlatBuffer,
        [a, b]: [ParamId; 2],
        beside: View<'_>,
    ) -> [View<'a>; 2] {
        let [out, rank, inputs] = self.shape;
        [
            param(params, a, [out, rank], beside),
            param(params, b, [rank, inputs], beside),
        ]
    }

    /// `w1_a w1_b` or `w2_a w2_b`.
    fn product(&self, params: &FlatBuffer, ids: [ParamId; 2], beside: View<'_>) -> Result<Tensor> {
        let [a, b] = self.factors(params, ids, beside);
        nn(a, b)
    }
}

impl WeightUpdate for Update {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let [first, second] = self.factors;
        let first = self.product(params, first, weight.as_view())?;
        let second = self.product(params, second, weight.as_view())?;
        Ok(hadamard::add(
            weight,
            1.0,
            self.scale,
            first.view(),
            second.view(),
        )?)
    }

    /// As many as there are by default, and D where rows of it are left out.
    fn temporaries(&self) -> usize {
        2 + usize::from(self.dropout.is_on())
    }

    fn drawn(&self, draws: Draws<'_>) -> Result<Option<Box<dyn WeightUpdate + '_>>> {
        self.dropout.drawn(self, self.shape[0], draws)
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        _: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let ([out, rank, inputs], [first, second]) = (self.shape, self.factors);
        let mut d = empty(d_weight, out, inputs);
        for (ids, other) in [(first, second), (second, first)] {
            let other = self.product(params, other, d_weight)?;
            hadamard::add(d.view_mut(), 0.0, self.scale, d_weight, other.view())?;
            let [a, b] = self.factors(params, ids, d_weight);
            let d_a = grad(grads, ids[0], [out, rank], d_weight);
            matmul::nt(d_a, 1.0, 1.0, d.view(), b)?;
            let d_b = grad(grads, ids[1], [rank, inputs], d_weight);
            matmul::tn(d_b, 1.0, 1.0, a, d.view())?;
        }
        Ok(())
    }
}
