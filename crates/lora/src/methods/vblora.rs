//! VB-LoRA: low-rank factors put together from vectors of one bank that all modules share.
//!
//! Every piece of A `[r, in]` and B `[out, r]` of the bank's vector length is a mean of the `topk`
//! vectors with the largest logits, weighted by their softmax.
//!
//! # Source
//! Li et al.: "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks" (2024); PEFT's
//! `tuners/vblora`.

use super::matrix::elements;
use crate::method::{Init, Keys, Method, Place, TensorSpec};
use ferrotune_core::adapter::{Attachment, LowRankFactors, Site};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{Tensor, View};
use serde_json::{Map, Value, json};

const BANK: &str = "vblora_vector_bank";

/// VB-LoRA's configuration.
#[derive(Clone, Debug)]
pub(crate) struct VbLora {
    rank: usize,
    vectors: usize,
    length: usize,
    topk: usize,
    dropout: f32,
    bank_bound: f64,
    logits_std: f64,
}

impl Method for VbLora {
    const PEFT_TYPE: &'static str = "VBLORA";

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        keys.require_off("save_only_topk_weights")?;
        let (vectors, topk) = (
            keys.positive("num_vectors", 256)?,
            keys.positive("topk", 2)?,
        );
        if topk > vectors {
            return Err(keys.error(
                "topk",
                format!("is {topk}, more than the {vectors} vectors of `num_vectors`"),
            ));
        }
        Ok(Self {
            rank: keys.positive("r", 4)?,
            vectors,
            length: keys.positive("vector_length", 256)?,
            topk,
            dropout: keys.probability("vblora_dropout")?,
            bank_bound: keys.number("init_vector_bank_bound", 0.02)?,
            logits_std: keys.number("init_logits_std", 0.1)?,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("r".into(), json!(self.rank));
        keys.insert("num_vectors".into(), json!(self.vectors));
        keys.insert("vector_length".into(), json!(self.length));
        keys.insert("topk".into(), json!(self.topk));
        keys.insert("vblora_dropout".into(), json!(self.dropout));
        keys.insert("init_vector_bank_bound".into(), json!(self.bank_bound));
        keys.insert("init_logits_std".into(), json!(self.logits_std));
        keys.insert("save_only_topk_weights".into(), json!(false));
        keys.insert("bias".into(), json!("none"));
        keys.insert("fan_in_fan_out".into(), json!(false));
    }

    fn describe(&self) -> String {
        format!(
            "VB-LoRA r={} with {} vectors of {}",
            self.rank, self.vectors, self.length
        )
    }

    fn shared(&self) -> Vec<TensorSpec> {
        vec![TensorSpec::new(BANK, [self.vectors, self.length])]
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        let [out, inputs] = [site.out_features, site.in_features];
        if !out.is_multiple_of(self.length) || !inputs.is_multiple_of(self.length) {
            let message = format!(
                "is {}, which must divide both dimensions of `{}`, {out} x {inputs}",
                self.length, site.name
            );
            return Err(Error::config("vector_length", message));
        }
        Ok(vec![
            TensorSpec::new(
                "vblora_logits_A",
                [self.rank, inputs / self.length, self.vectors],
            ),
            TensorSpec::new(
                "vblora_logits_B",
                [out / self.length, self.rank, self.vectors],
            ),
        ])
    }

    fn init(&self, name: &str, _: &[usize]) -> Init {
        if name.ends_with(BANK) {
            Init::Uniform(self.bank_bound)
        } else {
            Init::Normal {
                mean: 0.0,
                std: self.logits_std,
            }
        }
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        Ok(Attachment::Factors(Box::new(Composed {
            logits: [at.ids[0], at.ids[1]],
            bank: at.shared[0],
            shape: [site.out_features, self.rank, site.in_features],
            vectors: self.vectors,
            length: self.length,
            topk: self.topk,
            dropout: self.dropout,
        })))
    }
}

/// VB-LoRA on one linear.
#[derive(Debug)]
struct Composed {
    logits: [ParamId; 2],
    bank: ParamId,
    /// out, rank, in.
    shape: [usize; 3],
    vectors: usize,
    length: usize,
    topk: usize,
    dropout: f32,
}

impl Composed {
    /// The vectors of a piece, by the largest logits, and their weights.
    fn chosen(&self, logits: &[f32]) -> Vec<(usize, f32)> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        order.truncate(self.topk);
        let largest = order.first().map_or(0.0, |&i| logits[i]);
        let weights: Vec<f32> = order.iter().map(|&i| (logits[i] - largest).exp()).collect();
        let total: f32 = weights.iter().sum();
        order
            .into_iter()
            .zip(weights.into_iter().map(|w| w / total))
            .collect()
    }

    /// Where element `e` of piece `i` stands: of A, row by row; of B, whose pieces run down a column.
    fn place(&self, part: usize, i: usize, e: usize) -> usize {
        let rank = self.shape[1];
        match part {
            0 => i * self.length + e,
            _ => (i / rank * self.length + e) * rank + i % rank,
        }
    }

    fn factor(&self, params: &FlatBuffer, part: usize) -> Vec<f32> {
        let (logits, bank) = (params.get(self.logits[part]), params.get(self.bank));
        let mut values = vec![0.0; logits.len() / self.vectors * self.length];
        for (i, logits) in logits.chunks_exact(self.vectors).enumerate() {
            for (vector, weight) in self.chosen(logits) {
                for e in 0..self.length {
                    values[self.place(part, i, e)] += weight * bank[vector * self.length + e];
                }
            }
        }
        values
    }

    fn factor_backward(&self, params: &FlatBuffer, grads: &mut FlatBuffer, part: usize, d: &[f32]) {
        let (logits, bank) = (params.get(self.logits[part]), params.get(self.bank));
        for (i, logits) in logits.chunks_exact(self.vectors).enumerate() {
            let piece: Vec<f32> = (0..self.length)
                .map(|e| d[self.place(part, i, e)])
                .collect();
            let chosen = self.chosen(logits);
            // d(weight) of each chosen vector, then through the softmax.
            let dots: Vec<f32> = chosen
                .iter()
                .map(|(vector, _)| {
                    let vector = &bank[vector * self.length..(vector + 1) * self.length];
                    piece.iter().zip(vector).map(|(d, v)| d * v).sum()
                })
                .collect();
            let mean: f32 = chosen
                .iter()
                .zip(&dots)
                .map(|((_, weight), dot)| weight * dot)
                .sum();
            for ((vector, weight), dot) in chosen.iter().zip(&dots) {
                grads.get_mut(self.logits[part])[i * self.vectors + vector] +=
                    weight * (dot - mean);
                let target =
                    &mut grads.get_mut(self.bank)[vector * self.length..(vector + 1) * self.length];
                target
                    .iter_mut()
                    .zip(&piece)
                    .for_each(|(t, d)| *t += weight * d);
            }
        }
    }
}

impl LowRankFactors for Composed {
    fn rank(&self) -> usize {
        self.shape[1]
    }

    fn dropout(&self) -> f32 {
        self.dropout
    }

    fn factors(&self, params: &FlatBuffer) -> Result<[Tensor; 2]> {
        let [out, rank, inputs] = self.shape;
        Ok([
            Tensor::from_f32(self.factor(params, 0), rank, inputs),
            Tensor::from_f32(self.factor(params, 1), out, rank),
        ])
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        d_a: View<'_>,
        d_b: View<'_>,
    ) -> Result<()> {
        self.factor_backward(params, grads, 0, &elements(d_a));
        self.factor_backward(params, grads, 1, &elements(d_b));
        Ok(())
    }
}
