//! DeLoRA: low-rank updates of bounded strength.
//!
//! `W' = W + B diag(λ / (r |A_k| |B_k|)) A diag(n)`, A_k the rows of A `[r, in]`, B_k the columns of B
//! `[out, r]`, norms at least 1e-4, n `[in]` the norms of the base's columns at the start.
//!
//! # Source
//! Bini et al.: "DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation" (2025); PEFT's
//! `tuners/delora`.

use super::matrix::elements;
use crate::method::{Init, Keys, Method, Patterned, Place, TensorSpec};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Attachment, LowRankFactors, Site};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::{Tensor, View};
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

/// Norms of the rows of A and of the columns of B, as they are divided by.
struct Lengths {
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Bounded {
    fn lengths(&self, params: &FlatBuffer) -> Lengths {
        let [_, rank, inputs] = self.shape;
        let (a, b) = (params.get(self.a), params.get(self.b));
        let norm = |values: &mut dyn Iterator<Item = f32>| {
            values.map(|v| v * v).sum::<f32>().sqrt().max(LEAST)
        };
        Lengths {
            a: a.chunks_exact(inputs)
                .map(|row| norm(&mut row.iter().copied()))
                .collect(),
            b: (0..rank)
                .map(|k| norm(&mut b.iter().skip(k).step_by(rank).copied()))
                .collect(),
        }
    }

    /// What each pair of A_k and B_k is multiplied by.
    fn scales(&self, params: &FlatBuffer, lengths: &Lengths) -> Vec<f32> {
        let strength = params.get(self.lambda)[0] / self.shape[1] as f32;
        lengths
            .a
            .iter()
            .zip(&lengths.b)
            .map(|(a, b)| strength / (a * b))
            .collect()
    }
}

impl LowRankFactors for Bounded {
    fn rank(&self) -> usize {
        self.shape[1]
    }

    fn dropout(&self) -> f32 {
        self.dropout
    }

    fn factors(&self, params: &FlatBuffer) -> Result<[Tensor; 2]> {
        let [out, rank, inputs] = self.shape;
        let scales = self.scales(params, &self.lengths(params));
        let norms = params.get(self.norms);
        let rows = params.get(self.a).chunks_exact(inputs).zip(&scales);
        let a = rows
            .flat_map(|(row, scale)| row.iter().zip(norms).map(move |(a, n)| scale * a * n))
            .collect();
        Ok([
            Tensor::from_f32(a, rank, inputs),
            Tensor::from_f32(params.get(self.b).to_vec(), out, rank),
        ])
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        d_a: View<'_>,
        d_b: View<'_>,
    ) -> Result<()> {
        let [out, rank, inputs] = self.shape;
        let lengths = self.lengths(params);
        let scales = self.scales(params, &lengths);
        let (a, b, norms) = (
            params.get(self.a),
            params.get(self.b),
            params.get(self.norms),
        );
        let d_a = elements(d_a);
        // d(scale_k) through the scaled rows of A.
        let mut d_scales = vec![0.0_f32; rank];
        let target = grads.get_mut(self.a);
        for k in 0..rank {
            let at = k * inputs..(k + 1) * inputs;
            for ((target, (d, a)), n) in target[at.clone()]
                .iter_mut()
                .zip(d_a[at.clone()].iter().zip(&a[at]))
                .zip(norms)
            {
                *target += d * scales[k] * n;
                d_scales[k] += d * a * n;
            }
        }
        super::matrix::add(grads.get_mut(self.b), &elements(d_b));
        // scale_k = lambda / (r |A_k| |B_k|)
        let lambda = params.get(self.lambda)[0];
        let along: Vec<f32> = d_scales
            .iter()
            .zip(&scales)
            .map(|(d, scale)| d * scale)
            .collect();
        grads.get_mut(self.lambda)[0] += along.iter().sum::<f32>() / lambda;
        for k in 0..rank {
            if lengths.a[k] > LEAST {
                let factor = along[k] / (lengths.a[k] * lengths.a[k]);
                let at = k * inputs..(k + 1) * inputs;
                let target = &mut grads.get_mut(self.a)[at.clone()];
                target
                    .iter_mut()
                    .zip(&a[at])
                    .for_each(|(t, a)| *t -= factor * a);
            }
            if lengths.b[k] > LEAST {
                let factor = along[k] / (lengths.b[k] * lengths.b[k]);
                let target = grads.get_mut(self.b);
                (0..out).for_each(|row| target[row * rank + k] -= factor * b[row * rank + k]);
            }
        }
        Ok(())
    }
}
