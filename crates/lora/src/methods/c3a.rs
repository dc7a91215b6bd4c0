//! C3A: a block-circulant matrix is added to the weight.
//!
//! With `c3a_kernel [out / b, in / b, b]`,
//! `W'[m b + i, n b + j] = W[m b + i, n b + j] + kernel[m, n, (j - i) mod b] / in`.
//!
//! # Source
//! Chen et al.: "Parameter-Efficient Fine-Tuning via Circular Convolution" (2024); PEFT's `tuners/c3a`.

use super::matrix::{grad, param};
use crate::method::{Init, Keys, Method, Patterned, Place, TensorSpec};
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::circulant::{self, Order};
use ferrotune_kernels::{View, ViewMut};
use serde_json::{Map, Value, json};

/// How the kernel starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    Zero,
    Gaussian,
    Kaiming,
    Xavier,
}

/// C3A's configuration.
#[derive(Clone, Debug)]
pub(crate) struct C3a {
    block_size: Patterned<usize>,
    start: Start,
    as_peft: bool,
}

impl Method for C3a {
    const PEFT_TYPE: &'static str = "C3A";
    const BIAS: Option<&'static str> = Some("c3a_only");

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let start = match keys.get("init_weights") {
            Some(Value::Bool(true)) => Start::Zero,
            None | Some(Value::Bool(false)) => Start::Xavier,
            Some(Value::String(text)) if text == "gaussian" => Start::Gaussian,
            Some(Value::String(text)) if text == "kaiming_uniform" => Start::Kaiming,
            Some(Value::String(text)) if text == "xavier_uniform" => Start::Xavier,
            Some(value) => {
                let expected =
                    "true, false, \"gaussian\", \"kaiming_uniform\" or \"xavier_uniform\"";
                return Err(keys.error("init_weights", format!("is {value}, expected {expected}")));
            }
        };
        Ok(Self {
            block_size: keys.patterned("block_size", 256, "block_size_pattern")?,
            start,
            as_peft: keys.as_peft(),
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("block_size".into(), json!(self.block_size.default));
        keys.insert("block_size_pattern".into(), self.block_size.to_json());
        let start = match self.start {
            Start::Zero => json!(true),
            Start::Gaussian => json!("gaussian"),
            Start::Kaiming => json!("kaiming_uniform"),
            Start::Xavier => json!("xavier_uniform"),
        };
        keys.insert("init_weights".into(), start);
    }

    fn describe(&self) -> String {
        format!("C3A block size {}", self.block_size.default)
    }

    fn check(&self, targets: &[&Site]) -> Result<()> {
        let names: Vec<&str> = targets.iter().map(|site| site.name.as_str()).collect();
        self.block_size.require_used(&names)
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        let (b, [out, inputs]) = (
            self.block_size.of(&site.name)?,
            [site.out_features, site.in_features],
        );
        if !out.is_multiple_of(b) || !inputs.is_multiple_of(b) {
            let message = format!(
                "is {b}, which must divide both dimensions of `{}`, {out} x {inputs}",
                site.name
            );
            return Err(Error::config("block_size", message));
        }
        Ok(vec![TensorSpec::new(
            "c3a_kernel",
            [out / b, inputs / b, b],
        )])
    }

    fn init(&self, _: &str, shape: &[usize]) -> Init {
        let [out, inputs] = [shape[0] * shape[2], shape[1] * shape[2]];
        match self.start {
            Start::Zero => Init::Constant(0.0),
            Start::Gaussian => Init::Normal {
                mean: 0.0,
                std: 1.0,
            },
            Start::Kaiming => Init::kaiming(inputs),
            Start::Xavier => Init::Uniform((6.0 / (inputs + out) as f64).sqrt()),
        }
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        let block = self.block_size.of(&site.name)?;
        Ok(Attachment::Weight(Box::new(Circulant {
            kernel: at.ids[0],
            block,
            inputs: site.in_features,
            as_peft: self.as_peft,
        })))
    }
}

/// C3A on one linear.
#[derive(Debug)]
struct Circulant {
    kernel: ParamId,
    block: usize,
    inputs: usize,
    as_peft: bool,
}

impl Circulant {
    fn add(&self, params: &FlatBuffer, weight: ViewMut<'_>, order: Order) -> Result<()> {
        let shape = [weight.rows() / self.block, self.inputs];
        let kernel = param(params, self.kernel, shape, weight.as_view());
        Ok(circulant::add(
            weight,
            self.scale(),
            kernel,
            self.block,
            order,
        )?)
    }

    fn scale(&self) -> f32 {
        1.0 / self.inputs as f32
    }
}

impl WeightUpdate for Circulant {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        self.add(params, weight, Order::Circulant)
    }

    fn apply_for_input_gradient(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        // PEFT takes the element of i + j instead of j - i.
        let order = if self.as_peft {
            Order::Reflected
        } else {
            Order::Circulant
        };
        self.add(params, weight, order)
    }

    fn backward(
        &self,
        _: &FlatBuffer,
        grads: &mut FlatBuffer,
        _: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let shape = [d_weight.rows() / self.block, self.inputs];
        let d_kernel = grad(grads, self.kernel, shape, d_weight);
        Ok(circulant::add_gradient(
            d_kernel,
            self.scale(),
            d_weight,
            self.block,
        )?)
    }
}
