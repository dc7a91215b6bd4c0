//! VeRA: random projections that all modules share, and two trained vectors per module.
//!
//! `y = x W^T + (λ_b ⊙ B (λ_d ⊙ A x))`, A `[r, in]` and B `[out, r]` the first columns and rows of
//! matrices as large as the largest target.
//!
//! # Source
//! Kopiczko et al.: "VeRA: Vector-based Random Matrix Adaptation" (2023); PEFT's `tuners/vera`.

use super::matrix::{empty, grad, param};
use super::torch_random::TorchRandom;
use crate::files::Weights;
use crate::method::{Frozen, Init, Keys, Method, Place, Placed, TensorSpec};
use ferrotune_core::adapter::{Attachment, LowRankFactors, Site};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{Tensor, View, hadamard};
use serde_json::{Map, Value, json};
use std::sync::Arc;

const A: &str = "vera_A";
const B: &str = "vera_B";

/// VeRA's configuration.
#[derive(Clone, Debug)]
pub(crate) struct Vera {
    rank: usize,
    key: u64,
    save_projection: bool,
    dropout: f64,
    d_initial: f64,
    init_weights: bool,
    /// From the file of the adapter, where it has them.
    projections: Option<[Arc<Tensor>; 2]>,
}

impl Method for Vera {
    const PEFT_TYPE: &'static str = "VERA";
    const BIAS: Option<&'static str> = Some("vera_only");

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let save_projection = keys.boolean("save_projection", true)?;
        let projections = match keys.directory() {
            Some(directory) if save_projection => Some(read_projections(directory)?),
            _ => None,
        };
        Ok(Self {
            rank: keys.positive("r", 256)?,
            key: keys.integer("projection_prng_key", 0)? as u64,
            save_projection,
            dropout: keys.probability("vera_dropout")?,
            d_initial: keys.number("d_initial", 0.1)?,
            init_weights: keys.boolean("init_weights", true)?,
            projections,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("r".into(), json!(self.rank));
        keys.insert("projection_prng_key".into(), json!(self.key));
        keys.insert("save_projection".into(), json!(self.save_projection));
        keys.insert("vera_dropout".into(), json!(self.dropout));
        keys.insert("d_initial".into(), json!(self.d_initial));
        keys.insert("init_weights".into(), json!(self.init_weights));
        keys.insert("fan_in_fan_out".into(), json!(false));
    }

    fn describe(&self) -> String {
        format!("VeRA r={}", self.rank)
    }

    fn frozen(&self, targets: &[&Site]) -> Result<Frozen> {
        let largest =
            |of: fn(&Site) -> usize| targets.iter().map(|site| of(site)).max().unwrap_or(0);
        let (inputs, outputs) = (largest(|s| s.in_features), largest(|s| s.out_features));
        let [a, b] = match &self.projections {
            Some(projections) => projections.clone(),
            None => {
                let mut random = TorchRandom::new(self.key);
                let mut draw = |rows, cols| Arc::new(random.kaiming(rows, cols));
                [draw(self.rank, inputs), draw(outputs, self.rank)]
            }
        };
        if a.rows() != self.rank || b.cols() != self.rank || a.cols() < inputs || b.rows() < outputs
        {
            let message = format!(
                "{A} is {:?} and {B} is {:?}, expected at least [{}, {inputs}] and [{outputs}, {}]",
                [a.rows(), a.cols()],
                [b.rows(), b.cols()],
                self.rank,
                self.rank
            );
            return Err(Error::config("r", message));
        }
        Ok(Frozen::new([(A, a), (B, b)]))
    }

    fn saved_frozen(&self) -> Vec<&'static str> {
        if self.save_projection {
            vec![A, B]
        } else {
            Vec::new()
        }
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        Ok(vec![
            TensorSpec::new("vera_lambda_b", [site.out_features]),
            TensorSpec::new("vera_lambda_d", [self.rank]),
        ])
    }

    fn init(&self, name: &str, _: &[usize]) -> Init {
        match (name.ends_with("_b"), self.init_weights) {
            (true, true) => Init::Constant(0.0),
            (true, false) => Init::Constant(1.0),
            (false, true) => Init::Constant(self.d_initial as f32),
            (false, false) => Init::Normal {
                mean: 0.0,
                std: 1.0,
            },
        }
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        Ok(Attachment::Factors(Box::new(Factors {
            lambda_b: at.ids[0],
            lambda_d: at.ids[1],
            a: at.frozen.placed(A),
            b: at.frozen.placed(B),
            shape: [site.out_features, self.rank, site.in_features],
            dropout: self.dropout as f32,
        })))
    }
}

fn read_projections(directory: &std::path::Path) -> Result<[Arc<Tensor>; 2]> {
    let weights = Weights::open(directory)?;
    let read = |ending: &str| {
        let name = format!("base_model.{ending}");
        let shape = weights
            .file
            .meta(&name)
            .map_or_else(Vec::new, |meta| meta.shape.clone());
        let values = weights.read(&name, &shape)?;
        match shape[..] {
            [rows, cols] => Ok(Arc::new(Tensor::from_f32(values, rows, cols))),
            _ => Err(Error::adapter(
                &weights.path,
                format!("`{name}` has shape {shape:?}, expected two dimensions"),
            )),
        }
    };
    Ok([read(A)?, read(B)?])
}

/// VeRA on one linear.
#[derive(Debug)]
struct Factors {
    lambda_b: ParamId,
    lambda_d: ParamId,
    /// `[r, at least in]` and `[at least out, r]`.
    a: Arc<Placed>,
    b: Arc<Placed>,
    /// out, r, in.
    shape: [usize; 3],
    dropout: f32,
}

impl Factors {
    /// The projections of this linear.
    fn projections(&self, beside: View<'_>) -> [View<'_>; 2] {
        let [out, _, inputs] = self.shape;
        [
            self.a.beside(beside).columns(0..inputs),
            self.b.beside(beside).row_range(0..out),
        ]
    }
}

impl LowRankFactors for Factors {
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
        let [a, b] = self.projections(params.home());
        let scaled = |values: View<'_>, id| -> Result<Tensor> {
            let [rows, cols] = values.shape();
            let mut scaled = empty(values, rows, cols);
            let lambda = param(params, id, [rows, 1], values);
            hadamard::add(scaled.view_mut(), 0.0, 1.0, values, lambda)?;
            Ok(scaled)
        };
        Ok([scaled(a, self.lambda_d)?, scaled(b, self.lambda_b)?])
    }

    fn backward(
        &self,
        _: &FlatBuffer,
        grads: &mut FlatBuffer,
        d_a: View<'_>,
        d_b: View<'_>,
    ) -> Result<()> {
        let [a, b] = self.projections(d_a);
        for (id, d, values) in [(self.lambda_d, d_a, a), (self.lambda_b, d_b, b)] {
            let d_lambda = grad(grads, id, [d.rows(), 1], d);
            hadamard::add_row_sums(d_lambda, 1.0, d, values)?;
        }
        Ok(())
    }
}
