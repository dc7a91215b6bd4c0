//! FourierFT: a few trained coefficients of the Fourier transform of the update.
//!
//! `W' = W + scaling * Re(ifft2(S))`, S zero but for `n_frequency` places, drawn once from a seed.
//!
//! # Source
//! Gao et al.: "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform" (2024); PEFT's
//! `tuners/fourierft`.

use super::matrix::{elements, empty, grad, nn, param, update};
use super::torch_random::TorchRandom;
use crate::method::{Init, Keys, Method, OnGpus, Patterned, Place, TensorSpec};
use ferrotune_core::adapter::{Attachment, Site, WeightUpdate};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::cuda::CudaDevice;
use ferrotune_kernels::{Device, Tensor, View, ViewMut, hadamard, matmul};
use rayon::prelude::*;
use rustfft::FftPlanner;
use rustfft::num_complex::Complex;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// FourierFT's configuration.
#[derive(Clone, Debug)]
pub(crate) struct FourierFt {
    frequencies: Patterned<usize>,
    scaling: f64,
    seed: u64,
    init_weights: bool,
    /// Of the linears that were asked for, by shape and number of frequencies.
    bases: Arc<Mutex<BTreeMap<BasisKey, Arc<Basis>>>>,
}

/// Rows, columns, frequencies.
type BasisKey = [usize; 3];

impl Method for FourierFt {
    const PEFT_TYPE: &'static str = "FOURIERFT";
    const BIAS: Option<&'static str> = Some("fourierft_only");

    fn read(keys: &mut Keys<'_>) -> Result<Self> {
        Ok(Self {
            frequencies: keys.patterned("n_frequency", 1000, "n_frequency_pattern")?,
            scaling: keys.number("scaling", 150.0)?,
            seed: keys.integer("random_loc_seed", 777)? as u64,
            init_weights: keys.boolean("init_weights", false)?,
            bases: Arc::default(),
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
            basis: self.basis(shape, count),
            scaling: self.scaling as f32,
        })))
    }
}

impl FourierFt {
    fn basis(&self, shape: [usize; 2], count: usize) -> Arc<Basis> {
        let mut bases = self.bases.lock().unwrap_or_else(PoisonError::into_inner);
        let basis = bases.entry([shape[0], shape[1], count]).or_insert_with(|| {
            let places = TorchRandom::new(self.seed).permutation(shape[0] * shape[1], count);
            Arc::new(Basis {
                places,
                shape,
                waves: OnGpus::default(),
            })
        });
        Arc::clone(basis)
    }
}

/// Where the coefficients of linears of one shape are.
#[derive(Debug)]
struct Basis {
    /// In S, row by row.
    places: Vec<usize>,
    shape: [usize; 2],
    /// On a GPU, see [`Basis::waves`].
    waves: OnGpus<[Tensor; 2]>,
}

impl Basis {
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

    /// `[out, 2 n]` and `[in, 2 n]` on a GPU: the real part of the transform is the product of the first, scaled by
    /// the coefficients, and the second, transposed. `cos(a + b) = cos a cos b - sin a sin b`.
    fn waves(&self, gpu: &Arc<CudaDevice>) -> &[Tensor; 2] {
        self.waves.get(gpu, || {
            let [rows, cols] = self.shape;
            let down: Vec<usize> = self.places.iter().map(|place| place / cols).collect();
            let along: Vec<usize> = self.places.iter().map(|place| place % cols).collect();
            [wave(rows, &down, -1.0), wave(cols, &along, 1.0)]
                .map(|tensor| tensor.to_device(&Device::Cuda(Arc::clone(gpu))))
        })
    }
}

/// `[length, 2 n]`: cosines of the frequencies, then their sines times `sign`.
fn wave(length: usize, frequencies: &[usize], sign: f64) -> Tensor {
    let count = frequencies.len();
    let mut values = vec![0.0; length * 2 * count];
    values
        .par_chunks_mut(2 * count)
        .enumerate()
        .for_each(|(at, row)| {
            let (cosines, sines) = row.split_at_mut(count);
            for ((frequency, cosine), sine) in frequencies.iter().zip(cosines).zip(sines) {
                let turns = (frequency * at % length) as f64 / length as f64;
                let (s, c) = (std::f64::consts::TAU * turns).sin_cos();
                (*cosine, *sine) = (c as f32, (sign * s) as f32);
            }
        });
    Tensor::from_f32(values, length, 2 * count)
}

/// FourierFT on one linear: a fast transform on the host, a product on a GPU.
#[derive(Debug)]
struct Spectrum {
    spectrum: ParamId,
    basis: Arc<Basis>,
    scaling: f32,
}

impl Spectrum {
    fn factor(&self) -> f32 {
        let [rows, cols] = self.basis.shape;
        self.scaling / (rows * cols) as f32
    }

    /// The coefficients, or their gradient, once for cosines and once for sines.
    fn halves(&self) -> [Range<usize>; 2] {
        let count = self.basis.places.len();
        [0..count, count..2 * count]
    }

    fn apply_on_gpu(
        &self,
        params: &FlatBuffer,
        weight: ViewMut<'_>,
        gpu: &Arc<CudaDevice>,
    ) -> Result<()> {
        let [left, right] = self.basis.waves(gpu);
        let count = self.basis.places.len();
        let spectrum = param(params, self.spectrum, [1, count], weight.as_view());
        let mut scaled = empty(weight.as_view(), left.rows(), 2 * count);
        for half in self.halves() {
            let to = scaled.view_mut().columns(half.clone());
            hadamard::add(to, 0.0, 1.0, left.view().columns(half), spectrum)?;
        }
        Ok(matmul::nt(
            weight,
            1.0,
            self.factor(),
            scaled.view(),
            right.view(),
        )?)
    }

    fn backward_on_gpu(
        &self,
        grads: &mut FlatBuffer,
        d_weight: View<'_>,
        gpu: &Arc<CudaDevice>,
    ) -> Result<()> {
        let [left, right] = self.basis.waves(gpu);
        let d = nn(d_weight, right.view())?;
        for half in self.halves() {
            let to = grad(grads, self.spectrum, [1, half.len()], d_weight);
            let (d, left) = (d.view().columns(half.clone()), left.view().columns(half));
            hadamard::add_column_sums(to, self.factor(), d, left)?;
        }
        Ok(())
    }
}

impl WeightUpdate for Spectrum {
    fn computes_on_host(&self) -> bool {
        false
    }

    fn apply(&self, params: &FlatBuffer, weight: ViewMut<'_>) -> Result<()> {
        if let Some(gpu) = weight.as_view().device().map(Arc::clone) {
            return self.apply_on_gpu(params, weight, &gpu);
        }
        let [rows, cols] = self.basis.shape;
        let mut values = vec![Complex::default(); rows * cols];
        for (place, value) in self.basis.places.iter().zip(params.get(self.spectrum)) {
            values[*place].re = *value;
        }
        self.basis.transform(&mut values);
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
        if let Some(gpu) = d_weight.device() {
            return self.backward_on_gpu(grads, d_weight, gpu);
        }
        let mut values: Vec<Complex<f32>> = elements(d_weight)
            .into_iter()
            .map(|d| Complex::new(d, 0.0))
            .collect();
        self.basis.transform(&mut values);
        let factor = self.factor();
        let places = self.basis.places.iter();
        for (place, d) in places.zip(grads.get_mut(self.spectrum)) {
            *d += factor * values[*place].re;
        }
        Ok(())
    }
}
