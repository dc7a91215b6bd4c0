//! A recorded training run: loss and gradient norm of each step, and the final weights.

use super::arch::GRADIENT;
use super::case::{Case, dtype_of, inputs, longest, read_json};
use super::compare::{Comparison, relative_error};
use ferrotune_core::adapter::Adapter;
use ferrotune_core::data::PackedBatch;
use ferrotune_core::full::FullFineTuning;
use ferrotune_core::io::{ModelFiles, SafetensorsFile};
use ferrotune_core::lr_schedule::LrSchedule;
use ferrotune_core::model::{DecoderConfig, ModelPlan};
use ferrotune_core::optimizer::OptimizerChoice;
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::process_group::Solo;
use ferrotune_core::trainer::{Trainer, TrainerOptions};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::DType;
use ferrotune_kernels::adamw::AdamW;
use ferrotune_lora::{AdapterBase, LoraFa, LoraPlus};
use serde_json::Value;
use std::collections::BTreeMap;

pub(super) fn compare(case: &Case) -> Result<Comparison> {
    reject_unknown(case)?;
    let steps = read_steps(case)?;
    check_accumulation(case, &steps)?;
    let dtype = dtype_of(&ModelFiles::open(&case.base()?)?.shards()[0]);
    let mut trainer = trainer(case, &steps, dtype)?;
    // A run in bf16 is compared through its distance from the same run in f32.
    let exact = (dtype != DType::F32).then(|| self::trainer(case, &steps, DType::F32));
    let mut exact = exact.transpose()?;
    let schedule = schedule(case)?;
    let recorded = read_json(&case.path("steps.json"))?;
    let recorded = recorded.as_array().map(Vec::as_slice).unwrap_or_default();
    let mut comparison = Comparison::default();
    comparison.number(
        "steps",
        "steps",
        steps.len() as f64,
        recorded.len() as f64,
        0.5,
    );
    for (step, (batches, recorded)) in steps.iter().zip(recorded).enumerate() {
        let rate = schedule.lr(step as u64);
        let report = trainer.step(batches, rate)?;
        let exact = exact.as_mut().map(|exact| exact.step(batches, rate));
        let exact = exact.transpose()?;
        let name = format!("step {}", step + 1);
        let theirs = |key: &str| {
            recorded
                .get(key)
                .and_then(Value::as_f64)
                .unwrap_or(f64::NAN)
        };
        let ours = [("loss", report.loss()), ("grad_norm", report.grad_norm)];
        let exact = exact.map(|exact| [exact.loss(), exact.grad_norm]);
        for (i, (key, ours)) in ours.into_iter().enumerate() {
            let theirs = theirs(key);
            match exact.map(|exact| exact[i]) {
                None => comparison.number(key, &name, ours, theirs, GRADIENT),
                Some(exact) => {
                    let [ours, theirs] = [ours, theirs].map(|value| (value / exact - 1.0).abs());
                    comparison.beside_peer(key, &name, ours, theirs, BF16);
                }
            }
        }
        comparison.number(
            "num_items",
            &name,
            report.trained_tokens as f64,
            theirs("num_items"),
            0.0,
        );
        let rates = recorded
            .get("lr_before_step")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        comparison.number(
            "lr groups",
            &name,
            1.0,
            f64::from(u8::from(!rates.is_empty())),
            0.0,
        );
        compare_rates(
            case,
            &trainer,
            &name,
            report.learning_rate,
            &rates,
            &mut comparison,
        );
    }
    compare_final(case, &trainer, exact.as_ref(), &mut comparison)?;
    Ok(comparison)
}

/// Compares the learning rate of every tensor of every recorded group.
fn compare_rates(
    case: &Case,
    trainer: &Trainer,
    name: &str,
    learning_rate: f64,
    rates: &[Value],
    comparison: &mut Comparison,
) {
    let groups = case.json.get("param_groups").and_then(Value::as_array);
    let layout = trainer.params().layout();
    for (group, rate) in groups.into_iter().flatten().zip(rates) {
        let theirs = rate.as_f64().unwrap_or(f64::NAN);
        let members = group.get("params").and_then(Value::as_array);
        for member in members.into_iter().flatten().filter_map(Value::as_str) {
            let member = member
                .replace(".modules_to_save", "")
                .replace(".default", "")
                .replace("_magnitude_vector.weight", "_magnitude_vector");
            let id = layout.find(&member);
            let scale = id.map_or(f64::NAN, |id| layout.segment(id).spec.lr_scale);
            let label = format!("{name} {member}");
            comparison.number("lr", &label, learning_rate * scale, theirs, 1e-6);
        }
    }
}

/// How much farther from f32 than the recorded run one in bf16 may be.
const BF16: f64 = 2.0;
/// Keys of case.json that change nothing, or that are read here.
const KNOWN: [&str; 19] = [
    "kind",
    "name",
    "base",
    "seed",
    "full_finetune",
    "optimizer",
    "grad_accum",
    "micro_batch",
    "scheduler",
    "loraplus_ratio",
    "lora_fa",
    "label_smoothing",
    "param_groups",
    "loss",
    "calls",
    "hand_vs_trainer",
    "note",
    "versions",
    "peft_type",
];
/// Keys of its optimizer.
const OPTIMIZER: [&str; 6] = [
    "name",
    "lr",
    "weight_decay",
    "betas",
    "eps",
    "clip_grad_norm",
];

/// Options of a recorded run that this engine does not have yet must not pass as if they were off.
fn reject_unknown(case: &Case) -> Result<()> {
    let refuse = |key: &str, value: &Value| {
        Err(Error::config(
            key,
            format!(
                "is {value} in {}; not supported",
                case.path("case.json").display()
            ),
        ))
    };
    let off = |value: &Value| {
        value.is_null() || value == &Value::Bool(false) || value.as_f64() == Some(0.0)
    };
    for (key, value) in case.json.as_object().into_iter().flatten() {
        if !KNOWN.contains(&key.as_str()) && !off(value) {
            return refuse(key, value);
        }
    }
    let optimizer = case.json.get("optimizer").and_then(Value::as_object);
    for (key, value) in optimizer.into_iter().flatten() {
        let wrong = match key.as_str() {
            "name" => !["AdamW", "LoraFAOptimizer"].contains(&value.as_str().unwrap_or_default()),
            "betas" => !value.is_array(),
            known if OPTIMIZER.contains(&known) => !(value.is_number() || value.is_null()),
            _ => !off(value),
        };
        if wrong {
            return refuse(&format!("optimizer.{key}"), value);
        }
    }
    Ok(())
}

/// Every step must have the micro-batches that the case says.
fn check_accumulation(case: &Case, steps: &[Vec<PackedBatch>]) -> Result<()> {
    let expected = case.number(&["grad_accum"]).unwrap_or(1.0);
    match steps.iter().position(|s| s.len() as f64 != expected) {
        None => Ok(()),
        Some(step) => Err(Error::data(
            case.path("batches.safetensors"),
            None,
            format!(
                "step {step} has {} micro-batches, grad_accum is {expected}",
                steps[step].len()
            ),
        )),
    }
}

fn full(case: &Case) -> bool {
    case.json
        .get("full_finetune")
        .and_then(Value::as_bool)
        .unwrap_or(false)
}

/// The run at its start, over weights and with activations of `dtype`.
fn trainer(case: &Case, steps: &[Vec<PackedBatch>], dtype: DType) -> Result<Trainer> {
    let base = case.base()?;
    let files = ModelFiles::open(&base)?;
    let number = |key: &str, default: f64| case.number(&["optimizer", key]).unwrap_or(default);
    let beta = |i: usize| {
        case.json
            .pointer(&format!("/optimizer/betas/{i}"))
            .and_then(Value::as_f64)
    };
    let clip = number("clip_grad_norm", 0.0);
    let options = TrainerOptions {
        device: case.device.clone(),
        weights: dtype.into(),
        activation_dtype: dtype,
        optimizer: OptimizerChoice::AdamW(AdamW {
            beta1: beta(0).unwrap_or(0.9),
            beta2: beta(1).unwrap_or(0.999),
            eps: number("eps", 1e-8),
        }),
        weight_decay: number("weight_decay", 0.0),
        label_smoothing: case.number(&["label_smoothing"]).unwrap_or(0.0) as f32,
        max_grad_norm: (clip > 0.0).then_some(clip),
        max_tokens: longest(steps.iter().flatten()),
        ..TrainerOptions::default()
    };
    let initial = case.path("initial_adapter");
    let config = DecoderConfig::open(&base)?;
    let lr_ratio = case.number(&["loraplus_ratio"]);
    let read = || -> Result<Box<dyn Adapter>> {
        let adapter = ferrotune_lora::load(&initial, &config)?;
        let adapter = match case.json.get("lora_fa") == Some(&Value::Bool(true)) {
            true => Box::new(LoraFa::new(adapter)),
            false => adapter,
        };
        Ok(match lr_ratio {
            Some(ratio) => {
                // PEFT's default of loraplus_lr_embedding, which the recorded runs leave alone.
                let embedding = 1e-6 / number("lr", 0.0);
                Box::new(LoraPlus::new(adapter, ratio, embedding))
            }
            None => adapter,
        })
    };
    let adapter: Box<dyn Adapter> = if full(case) {
        Box::new(FullFineTuning)
    } else {
        read()?
    };
    let stack = adapter.decoder(config.clone())?;
    let mut trainer = Trainer::new(&stack, &files, adapter, Box::new(Solo), options)?;
    if !full(case) {
        read()?.load(trainer.params_mut(), &initial)?;
    }
    Ok(trainer)
}

fn schedule(case: &Case) -> Result<LrSchedule> {
    let text = |key: &str| case.json.pointer(&format!("/scheduler/{key}"));
    let name = text("name").and_then(Value::as_str).unwrap_or("constant");
    let integer = |key: &str| text(key).and_then(Value::as_u64).unwrap_or(0);
    let lr = case.number(&["optimizer", "lr"]).unwrap_or(0.0);
    let kwargs = text("kwargs").and_then(Value::as_object);
    let kwargs: BTreeMap<String, Value> = kwargs
        .into_iter()
        .flatten()
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    LrSchedule::new(name, &kwargs, lr, integer("warmup_steps"), integer("total"))
}

/// Micro-batches of every step: `stepS.microM.*` of batches.safetensors.
fn read_steps(case: &Case) -> Result<Vec<Vec<PackedBatch>>> {
    let file = SafetensorsFile::open(case.path("batches.safetensors"))?;
    let has = |step: usize, micro: usize| {
        file.meta(&format!("step{step}.micro{micro}.input_ids"))
            .is_some()
    };
    let mut steps = Vec::new();
    while has(steps.len(), 0) {
        let step = steps.len();
        let mut batches = Vec::new();
        while has(step, batches.len()) {
            let prefix = format!("step{step}.micro{}.", batches.len());
            batches.push(inputs(&file, &prefix)?.pack().0);
        }
        steps.push(batches);
    }
    Ok(steps)
}

fn compare_final(
    case: &Case,
    trainer: &Trainer,
    exact: Option<&Trainer>,
    comparison: &mut Comparison,
) -> Result<()> {
    let path = if full(case) {
        case.path("final.safetensors")
    } else {
        case.path("final_adapter").join("adapter_model.safetensors")
    };
    let file = SafetensorsFile::open(&path)?;
    if !full(case) {
        // Beside an adapted table PEFT saves the base's, which training must have left alone.
        let base = ModelFiles::open(&case.base()?)?;
        let directory = case.path("final_adapter");
        let sites = ModelPlan::new(trainer.model().config()).sites;
        let own = AdapterBase::new(&base, &directory, &sites, trainer.params().layout())?;
        if let Some(name) = own.tables().keys().next() {
            let message = format!("`{name}` is not the base's, and no parameter");
            return Err(Error::adapter(directory, message));
        }
    }
    let names = || file.names().filter(|n| !n.ends_with(".base_layer.weight"));
    let params = trainer.params();
    comparison.number(
        "tensors",
        "final",
        params.layout().by_name().count() as f64,
        names().count() as f64,
        0.0,
    );
    for name in names() {
        let own = name.strip_prefix("final.").unwrap_or(name);
        let values = |params: &FlatBuffer| -> Vec<f32> {
            let id = params.layout().find(own);
            id.map(|id| params.file_values(id).into_owned())
                .unwrap_or_default()
        };
        let (ours, theirs) = (values(params), file.read_f32(name)?);
        match exact.map(|exact| values(exact.params())) {
            None => comparison.tensor("final weights", name, &ours, &theirs, GRADIENT),
            Some(exact) => {
                let [ours, theirs] = [ours, theirs].map(|values| relative_error(&values, &exact));
                comparison.beside_peer("final weights", name, ours, theirs, BF16);
            }
        }
    }
    Ok(())
}
