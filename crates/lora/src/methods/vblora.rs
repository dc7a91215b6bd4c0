//! VB-LoRA: low-rank factors put together from vectors of one bank that all modules share.
//!
//! Every piece of A `[r, in]` and B `[out, r]` of the bank's vector length is a mean of the `topk`
//! vectors with the largest logits, weighted by their softmax.
//!
//! # Source
//! Li et al.: "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks" (2024); PEFT's
//! `tuners/vblora`.

use super::matrix::{empty, grad, param};
use crate::files::Weights;
use crate::fit::{GivenRank, require_rank};
use crate::method::{Init, Keys, Method, Place, TensorSpec};
use ferrotune_core::adapter::{Attachment, LowRankFactors, Site};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::vector_bank::{self, Along, Composition};
use ferrotune_kernels::{Tensor, View};
use serde_json::{Map, Value, json};

const BANK: &str = "vblora_vector_bank";
const INDICES: &str = "_topk_indices";
const WEIGHTS: &str = "_topk_weights";
/// The logit of a vector that is not chosen: its weight is 0.
const NOT_CHOSEN: f32 = -1e30;

/// VB-LoRA's configuration.
#[derive(Clone, Debug)]
pub(crate) struct VbLora {
    rank: usize,
    /// Whether a run asks for it.
    asked: bool,
    vectors: usize,
    length: usize,
    topk: usize,
    dropout: f64,
    bank_bound: f64,
    logits_std: f64,
    /// Whether files hold the chosen vectors and their weights in the place of logits.
    only_topk: bool,
}

impl Method for VbLora {
    const PEFT_TYPE: &'static str = "VBLORA";
    const BIAS: Option<&'static str> = Some("vblora_only");

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let only_topk = keys.boolean("save_only_topk_weights", false)?;
        if only_topk && keys.directory().is_none() {
            let message =
                "is true: a checkpoint of weights alone could not be trained further; leave it out";
            return Err(keys.error("save_only_topk_weights", message));
        }
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
            asked: keys.are_asked(),
            vectors,
            length: keys.positive("vector_length", 256)?,
            topk,
            dropout: keys.probability("vblora_dropout")?,
            bank_bound: keys.number("init_vector_bank_bound", 0.02)?,
            logits_std: keys.number("init_logits_std", 0.1)?,
            only_topk,
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
        keys.insert("fan_in_fan_out".into(), json!(false));
    }

    fn describe(&self) -> String {
        format!(
            "VB-LoRA r={} with {} vectors of {}",
            self.rank, self.vectors, self.length
        )
    }

    fn check(&self, targets: &[&Site]) -> Result<()> {
        let mut asked = targets.iter().filter(|_| self.asked);
        asked.try_for_each(|site| require_rank(site, GivenRank::of_all("r", self.rank)))
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

    fn stored_as(&self, name: &str) -> Vec<String> {
        if !self.only_topk || name.ends_with(BANK) {
            return vec![name.to_owned()];
        }
        let ending = |ending| format!("{name}{ending}");
        [INDICES, WEIGHTS].map(ending).into()
    }

    fn read_tensor(&self, file: &Weights, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        match &self.stored_as(name)[..] {
            [indices, weights] => self.logits_of(file, [indices, weights], shape),
            _ => file.read(name, shape),
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
            dropout: self.dropout as f32,
        })))
    }
}

impl VbLora {
    /// Logits of which a softmax over the chosen vectors gives their weights. All but the last weight are stored; it is
    /// what the others leave of 1.
    fn logits_of(
        &self,
        file: &Weights,
        [indices, weights]: [&String; 2],
        shape: &[usize],
    ) -> Result<Vec<f32>> {
        let pieces = [shape[0], shape[1]];
        let of = |count: usize| [pieces[0], pieces[1], count];
        let chosen = file.read_indices(indices, &of(self.topk), self.vectors)?;
        let weights = file.read(weights, &of(self.topk - 1))?;
        let mut logits = vec![NOT_CHOSEN; shape.iter().product()];
        for (piece, logits) in logits.chunks_exact_mut(self.vectors).enumerate() {
            let own = &weights[piece * (self.topk - 1)..(piece + 1) * (self.topk - 1)];
            let last = 1.0 - own.iter().sum::<f32>();
            let chosen = &chosen[piece * self.topk..(piece + 1) * self.topk];
            for (vector, weight) in chosen.iter().zip(own.iter().chain([&last])) {
                logits[*vector] = weight.max(0.0).ln().max(NOT_CHOSEN);
            }
        }
        Ok(logits)
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
    /// What A and B are put together from: rows of A, columns of B.
    fn parts<'a>(&self, params: &'a FlatBuffer, beside: View<'_>) -> [Composition<'a>; 2] {
        let bank = param(params, self.bank, [self.vectors, self.length], beside);
        let pieces = self.pieces();
        let part = |number: usize, along| Composition {
            logits: param(params, self.logits[number], pieces[number], beside),
            bank,
            topk: self.topk,
            along,
        };
        [part(0, Along::Rows), part(1, Along::Columns)]
    }

    /// Shapes of the logits of A and B.
    fn pieces(&self) -> [[usize; 2]; 2] {
        let [out, rank, inputs] = self.shape;
        [inputs, out].map(|side| [rank * side / self.length, self.vectors])
    }
}

impl LowRankFactors for Composed {
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
        let ([out, rank, inputs], beside) = (self.shape, params.home());
        let mut factors = [[rank, inputs], [out, rank]].map(|[r, c]| empty(beside, r, c));
        for (factor, of) in factors.iter_mut().zip(self.parts(params, beside)) {
            vector_bank::compose(factor.view_mut(), of)?;
        }
        Ok(factors)
    }

    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        d_a: View<'_>,
        d_b: View<'_>,
    ) -> Result<()> {
        let (pieces, bank) = (self.pieces(), [self.vectors, self.length]);
        let parts = self.parts(params, d_a);
        for (number, (d, of)) in [d_a, d_b].into_iter().zip(parts).enumerate() {
            let d_logits = grad(grads, self.logits[number], pieces[number], d);
            vector_bank::add_logits_gradient(d_logits, d, of)?;
            vector_bank::add_bank_gradient(grad(grads, self.bank, bank, d), d, of)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{copy_of, edit_config, golden, llama_sites};
    use ferrotune_core::io::{FileDType, SafetensorsFile, TensorData, write_safetensors};
    use ferrotune_core::params::ParamLayoutBuilder;
    use std::borrow::Cow;
    use std::collections::BTreeMap;
    use std::path::Path;

    const FILE: &str = "adapter_model.safetensors";

    /// The factors of every linear of the adapter in `directory`.
    fn factors(directory: &Path) -> Result<Vec<Vec<f32>>> {
        let adapter = crate::testing::load(directory)?;
        let mut builder = ParamLayoutBuilder::new();
        let attached = adapter.attach(&llama_sites(2), &mut builder)?;
        let mut params = FlatBuffer::zeros(&builder.build()?);
        adapter.load(&mut params, directory)?;
        let factors = attached.iter().flat_map(|(_, attachment)| {
            let Attachment::Factors(method) = attachment else {
                panic!("factors")
            };
            method.factors(&params).expect("made")
        });
        Ok(factors.map(|tensor| tensor.to_f32_vec()).collect())
    }

    /// The adapter as `save_only_topk_weights` has it.
    fn write_chosen(directory: &Path, first: u8) {
        let (topk, vectors) = (2, 16);
        let recorded = SafetensorsFile::open(golden("vblora").join("adapter").join(FILE));
        let recorded = recorded.expect("fixture");
        let mut tensors: BTreeMap<String, TensorData<'_>> = BTreeMap::new();
        for name in recorded.names() {
            let (values, shape) = (recorded.read_f32(name), recorded.meta(name));
            let (values, shape) = (values.expect("f32"), shape.expect("there").shape.clone());
            if name.ends_with(BANK) {
                assert_eq!(shape[0], vectors);
                let bytes = bytemuck::cast_slice(&values).to_vec();
                let (dtype, bytes) = (FileDType::F32, Cow::Owned(bytes));
                let bank = TensorData {
                    dtype,
                    shape,
                    bytes,
                };
                tensors.insert(name.into(), bank);
                continue;
            }
            let (mut indices, mut weights) = (Vec::new(), Vec::new());
            for logits in values.chunks_exact(vectors) {
                let mut order: Vec<usize> = (0..vectors).collect();
                order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
                let terms = [order[0], order[1]].map(|i| logits[i].exp());
                indices.extend([order[0] as u8, order[1] as u8]);
                weights.push(terms[0] / (terms[0] + terms[1]));
            }
            indices[0] = first.max(indices[0]);
            let of = |last: usize| vec![shape[0], shape[1], last];
            let chosen = TensorData {
                dtype: FileDType::U8,
                shape: of(topk),
                bytes: Cow::Owned(indices),
            };
            tensors.insert(format!("{name}{INDICES}"), chosen);
            let bytes = bytemuck::cast_slice(&weights).to_vec();
            let weights = TensorData {
                dtype: FileDType::F32,
                shape: of(topk - 1),
                bytes: Cow::Owned(bytes),
            };
            tensors.insert(format!("{name}{WEIGHTS}"), weights);
        }
        write_safetensors(&directory.join(FILE), &tensors, &BTreeMap::new()).expect("writable");
        edit_config(directory, "save_only_topk_weights", json!(true));
    }

    #[test]
    fn the_chosen_vectors_and_their_weights_are_the_adapter() {
        let copy = copy_of("vblora");
        let whole = factors(copy.path()).expect("fixture");
        write_chosen(copy.path(), 0);
        for (chosen, whole) in factors(copy.path()).expect("read").iter().zip(&whole) {
            for (a, b) in chosen.iter().zip(whole) {
                assert!((a - b).abs() <= 1e-6, "{a} {b}");
            }
        }
        write_chosen(copy.path(), 200);
        let error = factors(copy.path())
            .expect_err("no such vector")
            .to_string();
        assert!(error.contains(INDICES) && error.contains("200"), "{error}");
        let asked = json!({"peft_type": "VBLORA", "save_only_topk_weights": true});
        let asked = asked.as_object().expect("an object");
        let error = crate::PeftConfig::from_config("peft_config", asked).expect_err("trains");
        assert!(
            error.to_string().contains("save_only_topk_weights"),
            "{error}"
        );
    }
}
