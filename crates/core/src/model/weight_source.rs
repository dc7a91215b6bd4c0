//! Where base weights come from, and which tensors a model wants of there.

use super::classifier::HEAD_WEIGHT;
use super::config::DecoderConfig;
use super::plan::ModelPlan;
use crate::adapter::SiteKind;
use crate::io::{ModelFiles, SafetensorsFile, is_buffer};
use crate::{Error, Result, suggest};
use ferrotune_kernels::dequantise::Quantised;
use ferrotune_kernels::{DType, Tensor, View, ViewMut, rng};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Where base weights come from.
pub trait WeightSource {
    /// Refuses unless exactly the tensors of `plan` can be read.
    ///
    /// # Errors
    /// [`Error::Model`] naming a missing, extra or misshapen tensor, or a head that is stored beside the
    /// embedding it is tied to and is another one, before anything is read.
    fn check(&self, plan: &ModelPlan) -> Result<()>;

    /// Reads tensor `name` into `to`, converting the dtype, or what its codes stand for. A vector is one row.
    ///
    /// # Errors
    /// If it cannot be read.
    fn read(&self, name: &str, to: ViewMut<'_>) -> Result<()>;

    /// The file that tensor `name` is read from; empty if there is none.
    fn place(&self, name: &str) -> &Path {
        let _ = name;
        Path::new("")
    }

    /// Whether linears multiply what it has as bytes (`LLM.int8()`).
    fn multiplies_bytes(&self) -> bool {
        false
    }

    /// Reads matrix `name` into host memory where the source has it as codes; else `None`.
    ///
    /// # Errors
    /// If it cannot be read.
    fn read_quantised(&self, name: &str) -> Result<Option<Quantised>> {
        let _ = name;
        Ok(None)
    }
}

/// Random weights of any shape, for benchmarks and tests: normal with Transformers'
/// `initializer_range` of 0.02, norms one.
#[derive(Clone, Copy, Debug)]
pub struct RandomWeights {
    /// Seed of every tensor, together with its name.
    pub seed: u64,
}

impl WeightSource for RandomWeights {
    fn check(&self, _: &ModelPlan) -> Result<()> {
        Ok(())
    }

    fn read(&self, name: &str, to: ViewMut<'_>) -> Result<()> {
        let [rows, cols] = to.shape();
        let mut values = vec![1.0; rows * cols];
        let is_norm = rows == 1 && name.ends_with(".weight");
        if !is_norm {
            let mut stream = rng::Stream::new(rng::key_for(self.seed, name));
            // A sum of four uniforms is close enough to a normal, and quick for a billion draws.
            let std = 0.02 * 3.0_f32.sqrt() / 2.0_f32.powi(16);
            for value in &mut values {
                let bits = stream.bits();
                let sum: i32 = (0..4).map(|i| i32::from((bits >> (16 * i)) as i16)).sum();
                *value = sum as f32 * std;
            }
        }
        to_rows(to, &values);
        Ok(())
    }
}

/// A language model that is to be a classifier: the weights of `rest`, and a head of random ones.
#[derive(Clone, Copy)]
pub struct NewHead<'a> {
    /// Where all but the head comes from.
    pub rest: &'a dyn WeightSource,
    /// The head; its values are drawn by name.
    pub head: RandomWeights,
}

impl NewHead<'_> {
    /// Whether `files` lack the head of a classifier.
    #[must_use]
    pub fn is_needed(config: &DecoderConfig, files: &ModelFiles) -> bool {
        config.classifier.is_some() && files.meta(HEAD_WEIGHT).is_none()
    }
}

impl WeightSource for NewHead<'_> {
    fn check(&self, plan: &ModelPlan) -> Result<()> {
        // What is tied is not looked for.
        let mut stored = plan.clone();
        stored.sites[plan.head.0].tied_to = Some(plan.embedding);
        self.rest.check(&stored)
    }

    fn read(&self, name: &str, to: ViewMut<'_>) -> Result<()> {
        match name {
            HEAD_WEIGHT => self.head.read(name, to),
            _ => self.rest.read(name, to),
        }
    }

    fn place(&self, name: &str) -> &Path {
        self.rest.place(name)
    }

    fn multiplies_bytes(&self) -> bool {
        self.rest.multiplies_bytes()
    }

    fn read_quantised(&self, name: &str) -> Result<Option<Quantised>> {
        match name {
            HEAD_WEIGHT => Ok(None),
            _ => self.rest.read_quantised(name),
        }
    }
}

impl WeightSource for ModelFiles {
    fn check(&self, plan: &ModelPlan) -> Result<()> {
        let file = self
            .shards()
            .first()
            .map_or(Path::new(""), SafetensorsFile::path);
        let transposed = plan.sites.iter().filter(|site| site.stored_transposed);
        let transposed: BTreeSet<String> = transposed.map(|site| site.tensor("weight")).collect();
        let own = expected_tensors(plan).into_iter().map(|(name, mut shape)| {
            // Codes are of the linear, however its values lie.
            if transposed.contains(&name) && self.quantised_bytes(&name).is_some() {
                shape.reverse();
            }
            (self.own_name(&name).to_owned(), shape)
        });
        let own: Vec<_> = own.collect();
        let mut found = self.weight_shapes();
        // Some programs save a bias of zeros beside every packed weight.
        for name in self.zero_biases()? {
            if !own.iter().any(|(own, _)| *own == name) {
                found.remove(name.as_str());
            }
        }
        check_tensors(file, &own, &found)?;
        let head = plan.site(plan.head);
        match head.tied_to.map(|id| plan.site(id)) {
            Some(embedding) => {
                self.require_tied(&head.tensor("weight"), &embedding.tensor("weight"))
            }
            None => Ok(()),
        }
    }

    fn read(&self, name: &str, to: ViewMut<'_>) -> Result<()> {
        let Some(codes) = Self::read_quantised(self, name)? else {
            return self.read_rows_into(name, to);
        };
        let [rows, cols] = codes.shape();
        let mut values = Tensor::zeros(DType::F32, rows, cols);
        codes.dequantise(values.view_mut())?;
        to.copy_from(values.view());
        Ok(())
    }

    fn place(&self, name: &str) -> &Path {
        self.file_of(name)
    }

    fn multiplies_bytes(&self) -> bool {
        self.quantisation() == Some("int8")
    }

    fn read_quantised(&self, name: &str) -> Result<Option<Quantised>> {
        Self::read_quantised(self, name)
    }
}

pub(super) fn to_rows(to: ViewMut<'_>, values: &[f32]) {
    let [rows, cols] = to.shape();
    to.copy_from(View::from_f32(values, rows, cols));
}

/// Names and shapes of every tensor of the checkpoint, from the plan alone.
fn expected_tensors(plan: &ModelPlan) -> Vec<(String, Vec<usize>)> {
    let mut expected = Vec::new();
    for site in plan.owners().chain(&plan.left_out) {
        let weight = match site.kind {
            SiteKind::Norm => vec![site.out_features],
            _ if site.stored_transposed => vec![site.in_features, site.out_features],
            SiteKind::Linear | SiteKind::Embedding => vec![site.out_features, site.in_features],
        };
        expected.push((site.tensor("weight"), weight));
        if site.bias {
            expected.push((site.tensor("bias"), vec![site.out_features]));
        }
    }
    expected
}

/// Compares what a checkpoint has with what a model needs: missing, extra, misshapen.
fn check_tensors(
    file: &Path,
    expected: &[(String, Vec<usize>)],
    found: &BTreeMap<&str, &[usize]>,
) -> Result<()> {
    for (name, shape) in expected {
        match found.get(name.as_str()) {
            None => {
                let hint = suggest::did_you_mean(name, found.keys().copied());
                return Err(Error::model(
                    file,
                    format!(
                        "tensor `{name}` is missing{hint}; config.json and weights must belong together"
                    ),
                ));
            }
            Some(got) if *got != shape.as_slice() => {
                return Err(Error::model(
                    file,
                    format!("tensor `{name}` has shape {got:?}, config.json makes it {shape:?}"),
                ));
            }
            Some(_) => {}
        }
    }
    let wanted = |name: &str| expected.iter().any(|(n, _)| n == name);
    // A tied head may be stored once more.
    let ignorable = |name: &str| is_buffer(name) || name == "lm_head.weight";
    match found.keys().find(|name| !wanted(name) && !ignorable(name)) {
        None => Ok(()),
        Some(extra) => Err(Error::model(
            file,
            format!(
                "tensor `{extra}` belongs to nothing in this architecture; config.json and weights must belong together"
            ),
        )),
    }
}
