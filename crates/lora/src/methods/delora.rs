//! DeLoRA: low-rank updates of bounded strength.
//!
//! `W' = W + B diag(λ / (r |A_k| |B_k|)) A diag(n)`, A_k the rows of A `[r, in]`, B_k the columns of B
//! `[out, r]`, norms at least 1e-4, n `[in]` the norms of the base's columns at the start.
//!
//! # Source
//! Bini et al.: "DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation" (2025); PEFT's
//! `tuners/delora`.

use super::matrix::{copy_of, elements, empty, grad, param};
use crate::method::{Init, Keys, Method, Patterned, Place, TensorSpec};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Attachment, LowRankFactors, Site};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::norm_product::{self, Factors};
use ferrotune_kernels::{Tensor, View, axpby, hadamard};
use serde_json::{Map, Value, json};

/// The least norm that is divided by.
const LEAST: f32 = 1e-4;

/// DeLoRA's configuration.
#[derive(Clone, Debug)]
pub(crate) struct Delora {
    rank: Patterned<usize>,
    lambda: Patterned<f64>,
    /// `module_dropout`, which drops elements of the input.
    dropout: f64,
    init_weights: bool,
}

impl Method for Delora {
    const PEFT_TYPE: &'static str = "DELORA";
    const BIAS: Option<&'static str> = Some("delora_only");

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        Ok(Self {
            rank: keys.patterned("r", 8, "rank_pattern")?,
            lambda: keys.patterned_number("delora_lambda", 15.0, "lambda_pattern")?,
            dropout: keys.probability("module_dropout")?,
            init_weights: keys.boolean("init_weights", true)?,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("r".into(), json!(self.rank.default));
        keys.insert("rank_pattern".into(), self.rank.to_json());
        keys.insert("delora_lambda".into(), json!(self.lambda.default));
        keys.insert("lambda_pattern".into(), self.lambda.to_json());
        keys.insert("module_dropout".into(), json!(self.dropout));
        keys.insert("init_weights".into(), json!(self.init_weights));
    }

    fn describe(&self) -> String {
        format!(
            "DeLoRA r={} lambda={}",
            self.rank.default, self.lambda.default
        )
    }

    fn check(&self, targets: &[&Site]) -> Result<()> {
        let names: Vec<&str> = targets.iter().map(|site| site.name.as_str()).collect();
        self.lambda.require_used(&names)?;
        self.rank.require_ranks(targets)
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        let rank = self.rank.of(&site.name)?;
        Ok(vec![
            TensorSpec::new("delora_A", [rank, site.in_features]),
            TensorSpec::new("delora_B", [site.out_features, rank]),
            TensorSpec::new("delora_lambda", [1]),
            TensorSpec::fixed("delora_w_norm", [site.in_features]),
        ])
    }

    fn init(&self, name: &str, shape: &[usize]) -> Init {
        match name.rsplit('_').next() {
            Some("B") if self.init_weights => Init::Constant(0.0),
            Some("A" | "B") => Init::kaiming(shape[1]),
            // Both are set from the base.
            _ => Init::Constant(1.0),
        }
    }

    fn uses_base(&self) -> bool {
        true
    }

    fn base_values(&self, site: &Site, weight: View<'_>) -> Result<Vec<Option<Vec<f32>>>> {
        let lambda = self.lambda.of(&site.name)? as f32;
        let mut squares = vec![0.0_f64; weight.cols()];
        for row in elements(weight).chunks_exact(weight.cols()) {
            squares
                .iter_mut()
                .zip(row)
                .for_each(|(s, w)| *s += f64::from(*w).powi(2));
        }
        let norms = squares.iter().map(|s| s.sqrt() as f32).collect();
        Ok(vec![None, None, Some(vec![lambda]), Some(norms)])
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        Ok(Attachment::Factors(Box::new(Bounded {
            a: at.ids[0],
            b: at.ids[1],
            lambda: at.ids[2],
            norms: at.ids[3],
            shape: [
                site.out_features,
                self.rank.of(&site.name)?,
                site.in_features,
            ],
            dropout: self.dropout as f32,
        })))
    }
}

/// DeLoRA on one linear.
#[derive(Debug)]
struct Bounded {
    a: ParamId,
    b: ParamId,
    lambda: ParamId,
    norms: ParamId,
    /// out, rank, in.
    shape: [usize; 3],
    dropout: f32,
}

impl Bounded {
    /// A and B, on the side of `beside`.
    fn pair<'a>(&self, params: &'a FlatBuffer, beside: View<'_>) -> Factors<'a> {
        let [out, rank, inputs] = self.shape;
        Factors {
            a: param(params, self.a, [rank, inputs], beside),
            b: param(params, self.b, [out, rank], beside),
            least: LEAST,
        }
    }

    fn norms<'a>(&self, params: &'a FlatBuffer, beside: View<'_>) -> View<'a> {
        param(params, self.norms, [1, self.shape[2]], beside)
    }

    /// λ / r times `of [r, 1]`.
    fn strengthened(&self, params: &FlatBuffer, of: View<'_>) -> Result<Tensor> {
        let rank = self.shape[1];
        let mut strengthened = empty(of, rank, 1);
        let lambda = param(params, self.lambda, [1, 1], of);
        hadamard::add(strengthened.view_mut(), 0.0, 1.0 / rank as f32, of, lambda)?;
        Ok(strengthened)
    }
}

/// `1 / (|A_k| |B_k|)` `[r, 1]`.
fn inverses(of: Factors<'_>) -> Result<Tensor> {
    let mut inverses = empty(of.a, of.a.rows(), 1);
    norm_product::inverse(inverses.view_mut(), of)?;
    Ok(inverses)
}

/// `a ∘ b`, of the shape of `a`.
fn product(a: View<'_>, b: View<'_>) -> Result<Tensor> {
    let mut product = empty(a, a.rows(), a.cols());
    hadamard::add(product.view_mut(), 0.0, 1.0, a, b)?;
    Ok(product)
}

impl LowRankFactors for Bounded {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn rank(&self) -> usize {
        self.shape[1]
    }

    fn dropout(&self) -> f32 {
        self.dropout
    }

    fn factors(&self, params: &FlatBuffer) -> Result<[Tensor; 2]> {
        let of = self.pair(params, params.home());
        let scales = self.strengthened(params, inverses(of)?.view())?;
        let mut a = product(of.a, scales.view())?;
        hadamard::scale(a.view_mut(), 0.0, self.norms(params, of.a))?;
        Ok([a, copy_of(of.b)])
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        d_a: View<'_>,
        d_b: View<'_>,
    ) -> Result<()> {
        let ([out, rank, inputs], of) = (self.shape, self.pair(params, d_a));
        let inverses = inverses(of)?;
        let scales = self.strengthened(params, inverses.view())?;
        let d_rows = product(d_a, self.norms(params, d_a))?;
        let to_a = grad(grads, self.a, [rank, inputs], d_a);
        hadamard::add(to_a, 1.0, 1.0, d_rows.view(), scales.view())?;
        axpby::add(1.0, grad(grads, self.b, [out, rank], d_b), 1.0, d_b)?;
        // The scale of each row is λ / r times its inverse.
        let mut d_scales = empty(d_a, rank, 1);
        d_scales.view_mut().fill(0.0);
        hadamard::add_row_sums(d_scales.view_mut(), 1.0, d_rows.view(), of.a)?;
        let d_lambda = grad(grads, self.lambda, [1, 1], d_a);
        let one_of = 1.0 / rank as f32;
        hadamard::add_column_sums(d_lambda, one_of, d_scales.view(), inverses.view())?;
        let d_inverses = self.strengthened(params, d_scales.view())?;
        let to = grads.view_two_mut(self.a, self.b);
        Ok(norm_product::add_inverse_gradients(
            to,
            d_inverses.view(),
            of,
        )?)
    }
}
