//! A model's logits, loss, hidden states and the gradient of every base weight.

use super::case::{Case, dtype_of, inputs, scalar};
use super::compare::{Comparison, peak, relative_error};
use super::complete;
use super::padded::PaddedBatch;
use ferrotune_core::data::PackedBatch;
use ferrotune_core::full::FullFineTuning;
use ferrotune_core::io::{ModelFiles, SafetensorsFile};
use ferrotune_core::model::{DecoderConfig, HfConfig, Mode, Model, Pass};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::trainer::attach;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::linear_cross_entropy::Accumulator;
use ferrotune_kernels::{DType, Tensor, Workspace};
use std::borrow::Cow;

/// f32 logits, hidden states and loss.
pub(super) const FORWARD: f64 = 1e-5;
/// f32 gradients.
pub(super) const GRADIENT: f64 = 1e-4;
/// How far bf16 may be from f32, in units of the error that PyTorch's bf16 has.
pub(super) const BF16_FACTOR: f64 = 2.0;

pub(super) fn compare(case: &Case) -> Result<Comparison> {
    let expected = SafetensorsFile::open(case.path("expected.safetensors"))?;
    let padded = inputs(&SafetensorsFile::open(case.path("inputs.safetensors"))?, "")?;
    let dtype = dtype_of(&ModelFiles::open(&case.directory)?.shards()[0]);
    let ours = Recomputed::new(case, &padded, dtype)?;
    complete::arch(case, &expected, ours.grads.layout())?;
    let mut comparison = Comparison::default();
    compare_generations(&mut comparison, case)?;
    let judge = Judge {
        expected: &expected,
        case,
    };
    judge.tensor(&mut comparison, "logits", "logits", &padded, &ours)?;
    judge.numbers(&mut comparison, &ours)?;
    Ok(comparison)
}

/// A base of other cases, of which logits and loss alone were recorded, in f32 over weights of any dtype.
pub(super) fn compare_base(case: &Case) -> Result<Comparison> {
    let expected = SafetensorsFile::open(case.path("expected.safetensors"))?;
    let padded = inputs(&SafetensorsFile::open(case.path("inputs.safetensors"))?, "")?;
    let ours = Recomputed::new(case, &padded, DType::F32)?;
    let logits = select(&expected, "logits", &padded, &ours.places)?;
    let mut comparison = Comparison::default();
    compare_generations(&mut comparison, case)?;
    comparison.tensor("logits", "logits", &ours.logits, &logits, FORWARD);
    comparison.number(
        "loss",
        "loss",
        ours.loss,
        scalar(&expected, "loss")?,
        FORWARD,
    );
    Ok(comparison)
}

/// The same model in the keys of Transformers 4, where the case has them.
pub(super) fn compare_generations(comparison: &mut Comparison, case: &Case) -> Result<()> {
    let older = case.path("config_v4.json");
    if older.is_file() {
        let [newer, older] = [case.path("config.json"), older]
            .map(|path| DecoderConfig::from_hf(&HfConfig::open_file(&path)?));
        comparison.exact("config", "config_v4.json", newer? == older?);
    }
    Ok(())
}

/// What our engine makes of the case.
struct Recomputed {
    logits: Vec<f32>,
    states: Vec<Tensor>,
    loss: f64,
    grads: FlatBuffer,
    places: Vec<usize>,
}

impl Recomputed {
    fn new(case: &Case, padded: &PaddedBatch, dtype: DType) -> Result<Self> {
        let config = DecoderConfig::open(&case.directory)?;
        let files = ModelFiles::open(&case.directory)?;
        let (attachments, mut params) = attach(&config, &FullFineTuning)?;
        params.move_to(&case.device);
        let model = Model::load(&config, attachments, &files, &mut params, dtype)?;
        let (batch, places) = padded.pack();
        let workspace = Workspace::on(case.device.clone(), batch.tokens());
        let pass = Pass {
            workspace: &workspace,
            dtype,
            mode: Mode::Eval,
        };
        let logits = judged_rows(&model, &model.logits(pass, &params, &batch)?, &batch);
        let states = model.hidden_states(pass, &params, &batch)?;
        let (loss, grads) = mean_gradient(&model, pass, &params, &batch)?;
        Ok(Self {
            logits,
            states,
            loss,
            grads,
            places,
        })
    }
}

/// The logits that were recorded: those of all tokens, or of what a classifier reads.
pub(super) fn judged_rows(model: &Model, logits: &Tensor, batch: &PackedBatch) -> Vec<f32> {
    let rows = |range| logits.view().row_range(range).to_f32_vec();
    match &model.config().classifier {
        None => rows(0..batch.tokens()),
        Some(classifier) => {
            let read = classifier.rows(batch).into_iter();
            read.flat_map(|row| rows(row as usize..row as usize + 1))
                .collect()
        }
    }
}

/// Mean loss over the trained tokens, and its gradient.
pub(super) fn mean_gradient(
    model: &Model,
    pass: Pass<'_>,
    params: &FlatBuffer,
    batch: &PackedBatch,
) -> Result<(f64, FlatBuffer)> {
    let mut grads = FlatBuffer::zeros_on(params.layout(), params.device());
    let mut sums = Accumulator::new(pass.workspace.device());
    model.loss_and_gradients(pass, params, &mut grads, batch, &mut sums)?;
    let sums = sums.read()?;
    let count = sums.count.max(1) as f64;
    grads
        .as_mut_slice()
        .iter_mut()
        .for_each(|g| *g = (f64::from(*g) / count) as f32);
    Ok((sums.loss / count, grads))
}

/// Compares one case with its recorded numbers.
struct Judge<'a> {
    expected: &'a SafetensorsFile,
    case: &'a Case,
}

impl Judge<'_> {
    /// Logits and hidden states, at the places that are not padding.
    fn tensor(
        &self,
        comparison: &mut Comparison,
        quantity: &str,
        name: &str,
        padded: &PaddedBatch,
        ours: &Recomputed,
    ) -> Result<()> {
        let places = &ours.places;
        self.activation(comparison, quantity, name, padded, places, &ours.logits)?;
        for (k, state) in ours.states.iter().enumerate() {
            let name = format!("hidden.{}", k + 1);
            if self.expected.meta(&name).is_some() {
                let state = state.to_f32_vec();
                self.activation(comparison, "hidden", &name, padded, places, &state)?;
            }
        }
        Ok(())
    }

    fn activation(
        &self,
        comparison: &mut Comparison,
        quantity: &str,
        name: &str,
        padded: &PaddedBatch,
        places: &[usize],
        ours: &[f32],
    ) -> Result<()> {
        let recorded = select(self.expected, name, padded, places)?;
        if let Some(twin) = self.fp32_name(name) {
            let reference = select(self.expected, &twin, padded, places)?;
            self.bf16(comparison, quantity, name, ours, &recorded, &reference);
        } else if quantity == "logits" || !self.is_bf16() {
            let scale = recorded
                .iter()
                .fold(0.0_f64, |m, v| m.max(f64::from(v.abs())));
            let floor = self
                .case
                .number(&["fp32_vs_fp64", "logits_max_abs"])
                .unwrap_or(0.0)
                / scale;
            comparison.tensor(quantity, name, ours, &recorded, FORWARD.max(2.0 * floor));
        }
        Ok(())
    }

    /// Loss and gradients.
    fn numbers(&self, comparison: &mut Comparison, ours: &Recomputed) -> Result<()> {
        let loss = [scalar(self.expected, "loss")? as f32];
        if let Some(reference) = self.fp32("loss")? {
            self.bf16(
                comparison,
                "loss",
                "loss",
                &[ours.loss as f32],
                &loss,
                &reference,
            );
        } else {
            let floor = self.case.number(&["fp32_vs_fp64", "loss"]).unwrap_or(0.0)
                / f64::from(loss[0]).abs();
            comparison.number(
                "loss",
                "loss",
                ours.loss,
                f64::from(loss[0]),
                FORWARD.max(2.0 * floor),
            );
        }
        let floor = self
            .case
            .number(&["fp32_vs_fp64", "grad_max_rel"])
            .unwrap_or(0.0);
        let tolerance = GRADIENT.max(2.0 * floor);
        let largest = largest_gradient(self.expected, "grad.")?;
        let names: Vec<String> = self.expected.names().map(str::to_owned).collect();
        for name in names {
            if let Some(parameter) = name.strip_prefix("grad.") {
                let ours = self.gradient(ours, parameter)?;
                let recorded = self.expected.read_f32(&name)?;
                match self.fp32(&name)? {
                    Some(reference) => {
                        self.bf16(comparison, "grad", &name, &ours, &recorded, &reference);
                    }
                    None => {
                        comparison.gradient("grad", &name, (&ours, &recorded), largest, tolerance);
                    }
                }
            } else if let (Some(parameter), false) =
                (name.strip_prefix("gradnorm."), self.is_bf16())
            {
                let norm = norm(&self.gradient(ours, parameter)?);
                let recorded = scalar(self.expected, &name)?;
                let pair = (&[norm as f32][..], &[recorded as f32][..]);
                comparison.gradient("gradnorm", &name, pair, largest, tolerance);
            }
        }
        Ok(())
    }

    /// In the order of the file, as it was recorded.
    fn gradient<'a>(&self, ours: &'a Recomputed, parameter: &str) -> Result<Cow<'a, [f32]>> {
        let id = ours.grads.layout().find(parameter).ok_or_else(|| {
            Error::data(
                self.expected.path(),
                None,
                format!("`grad.{parameter}` names no parameter of the model"),
            )
        })?;
        Ok(ours.grads.file_values(id))
    }

    /// Name of the recorded f32 twin of a quantity of a bf16 case.
    fn fp32_name(&self, name: &str) -> Option<String> {
        let twin = match name.split_once('.') {
            Some((head, tail)) => format!("{head}_fp32.{tail}"),
            None => format!("{name}_fp32"),
        };
        self.expected.meta(&twin).map(|_| twin)
    }

    /// The recorded f32 twin itself.
    fn fp32(&self, name: &str) -> Result<Option<Vec<f32>>> {
        self.fp32_name(name)
            .map(|twin| self.expected.read_f32(&twin))
            .transpose()
    }

    fn is_bf16(&self) -> bool {
        self.expected.meta("logits_fp32").is_some()
    }

    fn bf16(
        &self,
        c: &mut Comparison,
        quantity: &str,
        name: &str,
        ours: &[f32],
        theirs: &[f32],
        reference: &[f32],
    ) {
        let (ours, theirs) = (
            relative_error(ours, reference),
            relative_error(theirs, reference),
        );
        c.beside_peer(quantity, name, ours, theirs, BF16_FACTOR);
    }
}

/// The largest value of the gradients recorded behind `prefix`.
pub(super) fn largest_gradient(file: &SafetensorsFile, prefix: &str) -> Result<f64> {
    let names = file.names().filter(|name| name.starts_with(prefix));
    names
        .map(|name| Ok(peak(&file.read_f32(name)?)))
        .try_fold(0.0, |largest, peak: Result<f64>| Ok(peak?.max(largest)))
}

/// Rows of the recorded `[rows, cols, width]` at `places`; of a classifier's `[rows, classes]`, all.
pub(super) fn select(
    file: &SafetensorsFile,
    name: &str,
    padded: &PaddedBatch,
    places: &[usize],
) -> Result<Vec<f32>> {
    select_behind(file, name, padded, places, 0)
}

/// [`select`] where `before` more columns stand before those of the batch.
pub(super) fn select_behind(
    file: &SafetensorsFile,
    name: &str,
    padded: &PaddedBatch,
    places: &[usize],
    before: usize,
) -> Result<Vec<f32>> {
    let shape = file.meta(name).map(|m| m.shape.clone()).unwrap_or_default();
    if let ([rows, _], true) = (&shape[..], padded.classes.is_some())
        && *rows == padded.rows
    {
        return file.read_f32(name);
    }
    let [rows, cols, width] = shape[..] else {
        let message = format!("`{name}` is {shape:?}, expected [rows, columns, width]");
        return Err(Error::data(file.path(), None, message));
    };
    if [rows, cols] != [padded.rows, before + padded.cols] {
        let message = format!(
            "`{name}` is of {rows} x {cols} tokens, the inputs of {} x {}",
            padded.rows, padded.cols
        );
        return Err(Error::data(file.path(), None, message));
    }
    let values = file.read_f32(name)?;
    let place = |p: usize| p / padded.cols * cols + before + p % padded.cols;
    Ok(places
        .iter()
        .map(|&p| place(p))
        .flat_map(|p| values[p * width..(p + 1) * width].iter().copied())
        .collect())
}

/// Euclidean norm.
pub(super) fn norm(values: &[f32]) -> f64 {
    values
        .iter()
        .map(|v| f64::from(*v).powi(2))
        .sum::<f64>()
        .sqrt()
}
