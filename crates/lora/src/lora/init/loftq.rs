//! LoftQ: the base is quantised, and A and B start at what that loses of it.
//!
//! `Q = quantise(W - B A)` and `B A` = the leading singular values of `W - Q`, in turn, from B A = 0. The model
//! is then `Q + scale * (A/√scale) (B/√scale)`.
//!
//! A base of values holds those of nf4 in blocks of 64, or of int8 by rows, afterwards; a base in 4 bits stays
//! in its own format, and needs the weights it was made of.
//!
//! # Source
//! Li et al.: "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models" (2023); PEFT's
//! `loftq_utils.py`, which leaves out the scale, so that its start is this one where alpha is the rank.

use super::start::Factors;
use super::{Linear, pissa, site};
use crate::method::Keys;
use ferrotune_core::adapter::BaseWeights;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::decompose::{Matrix, Svd};
use ferrotune_kernels::dequantise::{FourBitFormat, FourBitType, Int8};
use ferrotune_kernels::{DType, Tensor, View, matmul};
use rayon::prelude::*;
use serde_json::{Value, json};

/// PEFT's `loftq_config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoftqConfig {
    /// `loftq_bits`: 4 or 8.
    pub bits: usize,
    /// `loftq_iter`: how often base and factors are fitted to each other, at least 1.
    pub iterations: usize,
}

impl Default for LoftqConfig {
    fn default() -> Self {
        Self {
            bits: 4,
            iterations: 1,
        }
    }
}

impl LoftqConfig {
    pub(super) fn read(keys: &mut Keys<'_>) -> Result<Self> {
        let default = Self::default();
        let bits = keys.integer("loftq_bits", default.bits)?;
        if ![4, 8].contains(&bits) {
            let message = format!("is {bits}, expected 4 (nf4) or 8 (int8)");
            return Err(keys.error("loftq_bits", message));
        }
        Ok(Self {
            bits,
            iterations: keys.positive("loftq_iter", default.iterations)?,
        })
    }

    pub(super) fn to_value(self) -> Value {
        json!({"loftq_bits": self.bits, "loftq_iter": self.iterations})
    }

    /// The values that the codes of `weight` stand for.
    fn quantised(self, weight: &Tensor) -> Result<Tensor> {
        let mut values = Tensor::zeros(DType::F32, weight.rows(), weight.cols());
        if self.bits == 8 {
            Int8::quantise(weight.view())?.dequantise(values.view_mut())?;
        } else {
            let format = FourBitFormat {
                quant_type: FourBitType::Nf4,
                block: FourBitFormat::BLOCK,
                double_quant: false,
            };
            format
                .quantise(weight.view())?
                .dequantise(values.view_mut())?;
        }
        Ok(values)
    }
}

/// Quantises the weights of `linears` in the base, and returns what A and B start at.
pub(super) fn start(
    config: LoftqConfig,
    linears: &[Linear],
    base: &mut dyn BaseWeights,
) -> Result<Vec<Factors>> {
    let sites = linears.iter().map(|linear| site(base, &linear.module));
    let sites = sites.collect::<Result<Vec<_>>>()?;
    let bits: Vec<Option<usize>> = sites.iter().map(|&site| base.code_bits(site)).collect();
    if let Some(held) = bits.iter().flatten().find(|bits| **bits != config.bits) {
        let message = format!(
            "loftq_bits is {}, and the base is held in {held} bits; set loftq_bits: {held}",
            config.bits
        );
        return Err(Error::config("loftq_config", message));
    }
    let in_codes: Vec<bool> = bits.iter().map(Option::is_some).collect();
    let weights = sites
        .iter()
        .zip(&in_codes)
        .map(|(&site, codes)| match codes {
            true => base.original(site),
            false => base.read(site),
        });
    let weights: Vec<Tensor> = weights.collect::<Result<_>>()?;
    let mut rests = weights.clone();
    let mut found = Vec::new();
    for round in 1..=config.iterations {
        let mut values: Vec<Tensor> = rests
            .par_iter()
            .zip(&in_codes)
            .map(|(rest, codes)| match codes {
                // The base itself says what its codes stand for.
                true => Ok(rest.clone()),
                false => config.quantised(rest),
            })
            .collect::<Result<_>>()?;
        for ((value, &site), _) in values
            .iter_mut()
            .zip(&sites)
            .zip(&in_codes)
            .filter(|(_, c)| **c)
        {
            base.replace(site, value.view())?;
            *value = base.read(site)?;
        }
        let products: Vec<(Factors, Tensor)> = linears
            .par_iter()
            .zip(weights.par_iter().zip(&values))
            .map(|(linear, (weight, value))| lost(linear, weight, value))
            .collect::<Result<_>>()?;
        let (factors, next): (Vec<Factors>, Vec<Tensor>) = products.into_iter().unzip();
        (found, rests) = (factors, next);
        if round == config.iterations {
            for ((value, &site), codes) in values.iter().zip(&sites).zip(&in_codes) {
                if !codes {
                    base.replace(site, value.view())?;
                }
            }
        }
    }
    Ok(found)
}

/// A and B of what `value` has lost of `weight`, and the weight without their product.
fn lost(linear: &Linear, weight: &Tensor, value: &Tensor) -> Result<(Factors, Tensor)> {
    let mut lost = weight.to_f32_vec();
    let values = value.to_f32_vec();
    lost.iter_mut().zip(&values).for_each(|(w, q)| *w -= q);
    let [out, inputs] = linear.shape;
    let svd: Svd = Matrix::of(View::from_f32(&lost, out, inputs)).svd()?;
    let factors = pissa::of_svd(svd.range(0..linear.rank), linear.scale);
    let mut rest = weight.clone();
    let a = View::from_f32(&factors.a, linear.rank, inputs);
    let b = View::from_f32(&factors.b, out, linear.rank);
    matmul::nn(rest.view_mut(), 1.0, -linear.scale, b, a)?;
    Ok((factors, rest))
}
