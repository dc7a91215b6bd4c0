//! FourierFT: a few trained coefficients of the Fourier transform of the update.
//!
//! `W' = W + scaling * Re(ifft2(S))`, S zero but for `n_frequency` places, drawn once from a seed.
//!
//! # Source
//! Gao et al.: "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform" (2024); PEFT's
//! `tuners/fourierft`.

use super::matrix::{elements, update};
use super::torch_random::TorchRandom;
use crate::method::{Init, Keys, Method, Patterned, Place, TensorSpec};
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{View, ViewMut};
use rustfft::FftPlanner;
use rustfft::num_complex::Complex;
use serde_json::{Map, Value, json};

/// FourierFT's configuration.
#[derive(Clone, Debug)]
pub(crate) struct FourierFt {
    frequencies: Patterned<usize>,
    scaling: f64,
    seed: u64,
    init_weights: bool,
}

impl Method for FourierFt {
    const PEFT_TYPE: &'static str = "FOURIERFT";
    const BIAS: Option<&'static str> = Some("fourierft_only");

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        Ok(Self {
            frequencies: keys.patterned("n_frequency", 1000, "n_frequency_pattern")?,
            scaling: keys.number("scaling", 150.0)?,
            seed: keys.integer("random_loc_seed", 777)? as u64,
            init_weights: keys.boolean("init_weights", false)?,
        })
    }

    fn write(&self, keys: &mut Map<String, Value>) {
        keys.insert("n_frequency".into(), json!(self.frequencies.default));
        keys.insert("n_frequency_pattern".into(), self.frequencies.to_json());
        keys.insert("scaling".into(), json!(self.scaling));
        keys.insert("random_loc_seed".into(), json!(self.seed));
        keys.insert("init_weights".into(), json!(self.init_weights));
        keys.insert("fan_in_fan_out".into(), json!(false));
    }

    fn describe(&self) -> String {
        format!(
            "FourierFT n={} scaling={}",
            self.frequencies.default, self.scaling
        )
    }

    fn check(&self, targets: &[&Site]) -> Result<()> {
        let names: Vec<&str> = targets.iter().map(|site| site.name.as_str()).collect();
        self.frequencies.require_used(&names)
    }

    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>> {
        let (count, len) = (
            self.frequencies.of(&site.name)?,
            site.out_features * site.in_features,
        );
        if count > len {
            let message = format!("is {count}, more than the {len} weights of `{}`", site.name);
            return Err(Error::config("n_frequency", message));
        }
        Ok(vec![TensorSpec::new("fourierft_spectrum", [count])])
    }

    fn init(&self, _: &str, _: &[usize]) -> Init {
        if self.init_weights {
            Init::Constant(0.0)
        } else {
            Init::Normal {
                mean: 0.0,
                std: 1.0,
            }
        }
    }

    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment> {
        let shape = [site.out_features, site.in_features];
        let count = self.frequencies.of(&site.name)?;
        Ok(Attachment::Weight(Box::new(Spectrum {
            spectrum: at.ids[0],
            places: TorchRandom::new(self.seed).permutation(shape[0] * shape[1], count),
            shape,
            scaling: self.scaling as f32,
        })))
    }
}

/// FourierFT on one linear.
#[derive(Debug)]
struct Spectrum {
    spectrum: ParamId,
    /// Of the coefficients in S, row by row.
    places: Vec<usize>,
    shape: [usize; 2],
    scaling: f32,
}

impl Spectrum {
    /// The inverse transform of a matrix over both dimensions, without its factor 1 / (out in): along the
    /// rows, then along the columns.
    fn transform(&self, values: &mut [Complex<f32>]) {
        let [rows, cols] = self.shape;
        let mut planner = FftPlanner::new();
        planner.plan_fft_inverse(cols).process(values);
        let along_columns = planner.plan_fft_inverse(rows);
        let mut column = vec![Complex::default(); rows];
        for c in 0..cols {
            for (r, value) in column.iter_mut().enumerate() {
                *value = values[r * cols + c];
            }
            along_columns.process(&mut column);
            for (r, value) in column.iter().enumerate() {
                values[r * cols + c] = *value;
            }
        }
    }

    fn factor(&self) -> f32 {
        self.scaling / (self.shape[0] * self.shape[1]) as f32
    }
}

impl WeightUpdate for Spectrum {
    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        let [rows, cols] = self.shape;
        let mut values = vec![Complex::default(); rows * cols];
        for (place, value) in self.places.iter().zip(params.get(self.spectrum)) {
            values[*place].re = *value;
        }
        self.transform(&mut values);
        let factor = self.factor();
        update(weight, |r, c, w| w + factor * values[r * cols + c].re);
        Ok(())
    }

    /// The real part of the transform is its own transpose.
    fn backward(
        &self,
        _: &FlatBuffer,
        grads: &mut FlatBuffer,
        _: View<'_>,
        d_weight: View<'_>,
    ) -> Result<()> {
        let mut values: Vec<Complex<f32>> = elements(d_weight)
            .into_iter()
            .map(|d| Complex::new(d, 0.0))
            .collect();
        self.transform(&mut values);
        let factor = self.factor();
        for (place, d) in self.places.iter().zip(grads.get_mut(self.spectrum)) {
            *d += factor * values[*place].re;
        }
        Ok(())
    }
}
