//! Ranges and combinations of values.

use super::arguments::SEQUENCE_CLASSIFICATION;
use super::{IntervalStrategy, TrainConfig, TruncationMode};
use crate::lr_schedule::{LrSchedule, PlateauSchedule};
use crate::model::Classifier;
use crate::optimizer::ADAM_KEYS;
use crate::run_log::METRICS;
use crate::suggest::did_you_mean;
use crate::{Error, Result};
use std::fmt::Display;

/// Whether a positive number stays one, and finite, as the f32 that kernels compute with.
fn in_f32(value: f64) -> bool {
    let value = value as f32;
    value.is_normal() && value > 0.0
}

/// A week in seconds: nobody waits longer for a peer.
const MAX_WAIT: u64 = 7 * 24 * 3600;
/// More threads than any machine has cores; starting many more can bring the machine down.
/// Copies of a file's rows.
const MAX_WEIGHT: f64 = 1000.0;
const MAX_THREADS: usize = 4096;
/// More rows or micro-batches than any optimizer step has. Products of two such numbers and of any
/// number of ranks stay within 64 bits.
const MAX_COUNT: usize = 1 << 24;
/// More optimizer steps, or epochs, than any run does; exact in f64.
const MAX_STEPS: i64 = 1_000_000_000_000;

impl TrainConfig {
    /// Checks every value, and the values together.
    ///
    /// # Errors
    /// [`Error::Config`] for the first fault: key, value, where it was set, what was expected and
    /// what to do.
    pub fn validate(&self) -> Result<()> {
        self.check_required()?;
        self.check_data()?;
        self.check_lora()?;
        self.check_optimizer()?;
        self.check_schedule()?;
        self.check_output()?;
        self.check_runtime()
    }

    /// An error about `key` that says where it was set.
    fn fault(&self, key: &str, message: impl Display) -> Error {
        let place = self.origin(key).map(|origin| format!(" ({origin})"));
        Error::config(key, format!("{message}{}", place.unwrap_or_default()))
    }

    fn require(
        &self,
        holds: bool,
        key: &str,
        message: impl FnOnce(String) -> String,
    ) -> Result<()> {
        if holds {
            return Ok(());
        }
        let value = self.get(key).unwrap_or_default();
        Err(self.fault(key, message(value.to_string())))
    }

    /// `key` at or above 1.
    fn at_least_one(&self, key: &str, value: usize) -> Result<()> {
        self.require(value >= 1, key, |value| {
            format!("got {value}, expected 1 or more")
        })
    }

    /// `key`, which counts rows or micro-batches.
    fn count(&self, key: &str, value: usize) -> Result<()> {
        self.require((1..=MAX_COUNT).contains(&value), key, |value| {
            format!("got {value}, expected 1 to {MAX_COUNT}")
        })
    }

    /// `key` at or above 0 (no value is infinite or NaN: reading refuses them).
    fn not_negative(&self, key: &str, value: f64) -> Result<()> {
        self.require(value >= 0.0, key, |value| {
            format!("got {value}, expected 0 or more")
        })
    }

    fn check_required(&self) -> Result<()> {
        let base = self.model.model_name_or_path.as_deref().unwrap_or_default();
        self.require(!base.is_empty(), "model_name_or_path", |_| {
            "not set; give the directory of the base model".to_owned()
        })?;
        let data = &self.data;
        let sources = data.dataset_name.iter().chain(&data.train_file);
        self.require(sources.count() > 0, "dataset_name", |_| {
            "not set; give a file of rows, a directory, or a list of them (or train_file)"
                .to_owned()
        })?;
        self.require(!self.output.output_dir.is_empty(), "output_dir", |_| {
            "empty; give a directory".to_owned()
        })
    }

    fn check_data(&self) -> Result<()> {
        let data = &self.data;
        self.require(data.max_length != Some(0), "max_length", |_| {
            "got 0, expected 1 or more, or null for no limit".to_owned()
        })?;
        let packs = data.packing || data.packs_evaluation();
        self.require(!packs || data.max_length.is_some(), "packing", |_| {
            "needs max_length, the size of a block; set it, or set packing to false".to_owned()
        })?;
        self.require(
            (0.0..1.0).contains(&data.test_split_size),
            "test_split_size",
            |value| format!("got {value}, expected a share of the rows from 0 to below 1"),
        )?;
        let weights = &data.dataset_weights;
        let files = data.dataset_name.len() + data.train_file.len();
        self.require(
            weights.is_empty() || weights.len() == files,
            "dataset_weights",
            |_| format!("has {} entries for {files} training files", weights.len()),
        )?;
        self.require(
            weights.iter().all(|w| *w > 0.0 && *w <= MAX_WEIGHT),
            "dataset_weights",
            |value| format!("got {value}, expected numbers above 0, at most {MAX_WEIGHT}"),
        )?;
        self.count(
            "per_device_train_batch_size",
            data.per_device_train_batch_size,
        )?;
        self.count(
            "per_device_eval_batch_size",
            data.per_device_eval_batch_size,
        )
    }

    /// What is learned: tokens, or classes of rows.
    fn check_task(&self) -> Result<()> {
        let (lora, data) = (&self.lora, &self.data);
        let is_known = ["CAUSAL_LM", SEQUENCE_CLASSIFICATION].contains(&&*lora.lora_task_type);
        self.require(is_known, "lora_task_type", |value| {
            format!("{value} is not supported; expected \"CAUSAL_LM\" or \"SEQ_CLS\"")
        })?;
        let classes = self.model.num_labels;
        let range = Classifier::CLASSES;
        self.require(classes.is_none_or(|n| range.contains(&n)), "num_labels", |value| {
            format!(
                "got {value}, expected 2 to {}; one output is regression, which is not supported",
                range.end()
            )
        })?;
        if !lora.classifies() {
            return self.require(classes.is_none(), "num_labels", |value| {
                format!("{value}, and classes are learned with lora_task_type: SEQ_CLS alone")
            });
        }
        let of_tokens = [
            ("packing", data.packing),
            ("eval_packing", data.eval_packing == Some(true)),
            ("assistant_only_loss", data.assistant_only_loss),
            (
                "completion_only_loss",
                data.completion_only_loss == Some(true),
            ),
        ];
        of_tokens.into_iter().try_for_each(|(key, asked)| {
            self.require(!asked, key, |_| {
                "is of tokens that are learned, and lora_task_type: SEQ_CLS learns the class of a row; leave it out"
                    .to_owned()
            })
        })
    }

    fn check_lora(&self) -> Result<()> {
        let lora = &self.lora;
        self.check_task()?;
        let formats = [
            ("load_in_4bit", self.model.load_in_4bit),
            ("load_in_8bit", self.model.load_in_8bit),
            ("load_in_fp8", self.model.load_in_fp8),
        ];
        let mut asked = formats
            .iter()
            .filter(|(_, asked)| *asked)
            .map(|(key, _)| *key);
        if let Some(key) = asked.next() {
            self.require(lora.use_peft, key, |_| {
                "true with use_peft: false: quantised weights cannot be trained; set use_peft: true to train an \
                 adapter over them"
                    .to_owned()
            })?;
            if let Some(other) = asked.next() {
                self.require(false, other, |_| {
                    format!("true beside {key}: true; the base is held in one format")
                })?;
            }
        }
        let threshold = self.model.llm_int8_threshold;
        self.require(
            threshold >= 0.0 && in_f32(threshold.max(1.0)),
            "llm_int8_threshold",
            |value| format!("got {value}, expected a number of 0 or more, such as 6.0"),
        )?;
        if !lora.use_peft {
            return Ok(());
        }
        self.at_least_one("lora_r", lora.lora_r)?;
        self.at_least_one("lora_init_batches", lora.lora_init_batches)?;
        self.require(in_f32(lora.lora_alpha), "lora_alpha", |value| {
            format!(
                "got {value}, expected a number above 0 that a float holds; twice lora_r is common"
            )
        })?;
        self.require(
            (0.0..1.0).contains(&lora.lora_dropout),
            "lora_dropout",
            |value| format!("got {value}, expected a probability from 0 to below 1"),
        )?;
        let ranks = &lora.lora_rank_pattern;
        self.require(
            ranks.values().all(|r| *r > 0),
            "lora_rank_pattern",
            |value| format!("got {value}, expected ranks of 1 or more"),
        )?;
        let alphas = &lora.lora_alpha_pattern;
        self.require(
            alphas.values().all(|a| in_f32(*a)),
            "lora_alpha_pattern",
            |value| format!("got {value}, expected numbers above 0 that a float holds"),
        )
    }

    fn check_optimizer(&self) -> Result<()> {
        let optimizer = &self.optimizer;
        self.not_negative("learning_rate", optimizer.learning_rate)?;
        self.not_negative("weight_decay", optimizer.weight_decay)?;
        self.not_negative("max_grad_norm", optimizer.max_grad_norm)?;
        for (key, beta) in [
            ("adam_beta1", optimizer.adam_beta1),
            ("adam_beta2", optimizer.adam_beta2),
        ] {
            self.require((0.0..1.0).contains(&beta), key, |value| {
                format!("got {value}, expected a number from 0 to below 1")
            })?;
        }
        self.require(in_f32(optimizer.adam_epsilon), "adam_epsilon", |value| {
            format!("got {value}, expected a number above 0 that a float holds; 1e-8 is common")
        })?;
        self.require(
            (0.0..1.0).contains(&optimizer.label_smoothing_factor),
            "label_smoothing_factor",
            |value| format!("got {value}, expected a share from 0 to below 1"),
        )?;
        let alpha = optimizer.neftune_noise_alpha.unwrap_or(0.0);
        self.not_negative("neftune_noise_alpha", alpha)?;
        self.require(
            optimizer.loraplus_lr_ratio.is_none_or(|r| r > 0.0),
            "loraplus_lr_ratio",
            |value| format!("got {value}, expected a number above 0; 16 is common"),
        )?;
        self.not_negative("loraplus_lr_embedding", optimizer.loraplus_lr_embedding)?;
        self.count(
            "gradient_accumulation_steps",
            optimizer.gradient_accumulation_steps,
        )?;
        let built = optimizer.choice();
        built.map(|_| ()).map_err(|error| self.placed(error))
    }

    /// An error about an entry of a table, with where that table was set.
    fn placed(&self, error: Error) -> Error {
        match error {
            Error::Config { key, message } => {
                let table_key = key.split('.').next().unwrap_or(&key);
                let place = self.origin(table_key).map(|origin| format!(" ({origin})"));
                Error::config(&key, format!("{message}{}", place.unwrap_or_default()))
            }
            other => other,
        }
    }

    fn check_schedule(&self) -> Result<()> {
        let schedule = &self.schedule;
        self.require(
            schedule.max_steps == -1 || (1..=MAX_STEPS).contains(&schedule.max_steps),
            "max_steps",
            |value| {
                format!("got {value}, expected 1 to {MAX_STEPS}, or -1 to follow num_train_epochs")
            },
        )?;
        let epochs = schedule.num_train_epochs;
        self.require(
            schedule.max_steps > 0 || (epochs > 0.0 && epochs <= MAX_STEPS as f64),
            "num_train_epochs",
            |value| {
                format!(
                    "got {value}, expected a number above 0, at most {MAX_STEPS}, or set max_steps"
                )
            },
        )?;
        let warmup = schedule.warmup_steps;
        let whole = warmup < 1.0 || warmup.fract() == 0.0;
        self.require(warmup >= 0.0 && whole, "warmup_steps", |value| {
            format!("got {value}, expected whole steps, or a share of all steps below 1")
        })?;
        self.require(
            (0.0..=1.0).contains(&schedule.warmup_ratio),
            "warmup_ratio",
            |value| format!("got {value}, expected a share of all steps from 0 to 1"),
        )?;
        let (name, kwargs) = (&schedule.lr_scheduler_type, &schedule.lr_scheduler_kwargs);
        let rate = self.optimizer.learning_rate;
        let built = if name == "reduce_lr_on_plateau" {
            let evaluates = self.output.eval_strategy != IntervalStrategy::No;
            self.require(evaluates, "lr_scheduler_type", |value| {
                format!("{value} follows the evaluation loss; set eval_strategy to steps or epoch")
            })?;
            PlateauSchedule::new(kwargs, rate).map(|_| ())
        } else {
            LrSchedule::new(name, kwargs, rate, 0, 1000).map(|_| ())
        };
        built.map_err(|error| self.placed(error))
    }

    /// Steps, or a share of them, for a strategy that counts steps.
    fn check_interval(&self, key: &str, strategy: IntervalStrategy, steps: f64) -> Result<()> {
        let counts = strategy == IntervalStrategy::Steps;
        let whole = steps < 1.0 || steps.fract() == 0.0;
        self.require(!counts || (steps > 0.0 && whole), key, |value| {
            format!("got {value}, expected whole steps, or a share of all steps below 1")
        })
    }

    fn check_output(&self) -> Result<()> {
        let output = &self.output;
        self.check_interval(
            "logging_steps",
            output.logging_strategy,
            output.logging_steps,
        )?;
        self.check_interval("save_steps", output.save_strategy, output.save_steps)?;
        // 0 and null both mean logging_steps.
        let eval_steps = output.eval_steps.filter(|steps| *steps != 0.0);
        if let Some(steps) = eval_steps {
            self.check_interval("eval_steps", output.eval_strategy, steps)?;
        }
        self.require(
            output.save_total_limit != Some(0),
            "save_total_limit",
            |_| {
                "got 0, expected 1 or more, or null to keep all; save_strategy: no saves none"
                    .to_owned()
            },
        )?;
        let data = &self.data;
        let is_file = |name: &String| std::path::Path::new(name).extension().is_some();
        let no_rows = data.eval_file.is_empty()
            && data.test_split_size == 0.0
            && data.dataset_name.iter().all(is_file);
        let evaluates = output.eval_strategy != IntervalStrategy::No;
        self.require(!(evaluates && no_rows), "eval_strategy", |value| {
            format!("{value} needs rows to evaluate on; set eval_file or test_split_size, or eval_strategy to no")
        })?;
        self.check_selection(evaluates)
    }

    /// The best evaluation, what becomes of it, and how long is waited for a better one.
    fn check_selection(&self, evaluates: bool) -> Result<()> {
        let output = &self.output;
        let metric = output.selection().metric;
        self.require(
            METRICS.contains(&metric.as_str()),
            "metric_for_best_model",
            |value| {
                let hint = did_you_mean(&metric, METRICS);
                format!("got {value}, expected {}{hint}", METRICS.join(", "))
            },
        )?;
        self.require(
            output.early_stopping_patience != Some(0),
            "early_stopping_patience",
            |_| "got 0, expected 1 or more evaluations, or null to run to the end".to_owned(),
        )?;
        self.not_negative("early_stopping_threshold", output.early_stopping_threshold)?;
        let waits = output.early_stopping_patience.is_some();
        self.require(evaluates || !waits, "early_stopping_patience", |_| {
            "counts evaluations; set eval_strategy to steps or epoch".to_owned()
        })?;
        self.require(
            evaluates || !output.load_best_model_at_end,
            "load_best_model_at_end",
            |_| "true needs evaluations; set eval_strategy to steps or epoch".to_owned(),
        )
    }

    fn check_runtime(&self) -> Result<()> {
        let runtime = &self.runtime;
        let threads = runtime.num_threads.unwrap_or(1);
        self.require(
            (1..=MAX_THREADS).contains(&threads),
            "num_threads",
            |value| format!("got {value}, expected 1 to {MAX_THREADS}, or null for one per core"),
        )?;
        for (key, seconds) in [
            ("ddp_timeout", runtime.ddp_timeout),
            ("rendezvous_timeout", runtime.rendezvous_timeout),
            ("peer_timeout", runtime.peer_timeout),
        ] {
            self.require((1..=MAX_WAIT).contains(&seconds), key, |value| {
                format!("got {value}, expected 1 to {MAX_WAIT} seconds")
            })?;
        }
        Ok(())
    }
}

/// Notes about keys with a field whose value has no effect.
pub(super) fn notes(config: &TrainConfig) -> Vec<String> {
    let mut notes = Vec::new();
    let others: Vec<_> = config.output.report_to.iter().map(String::as_str).collect();
    let others: Vec<_> = others.into_iter().filter(|name| *name != "none").collect();
    if !others.is_empty() {
        notes.push(format!(
            "report_to: {} is not supported yet; trainer_log.jsonl and trainer_state.json hold the \
             same numbers",
            others.join(", ")
        ));
    }
    let adapter_keys: Vec<_> = TrainConfig::keys()
        .iter()
        .filter(|key| key.section == "lora" && !["use_peft", "lora_task_type"].contains(&key.name))
        .map(|key| key.name)
        .filter(|key| config.origin(key).is_some())
        .collect();
    if !config.lora.use_peft && !adapter_keys.is_empty() {
        notes.push(format!(
            "use_peft is false, so every weight is trained and these have no effect: {}",
            adapter_keys.join(", ")
        ));
    }
    let four_bit_keys: Vec<_> = TrainConfig::keys()
        .iter()
        .map(|key| key.name)
        .filter(|key| key.starts_with("bnb_4bit_") && config.origin(key).is_some())
        .collect();
    if !config.model.load_in_4bit && !four_bit_keys.is_empty() {
        notes.push(format!(
            "load_in_4bit is false, so these have no effect: {}",
            four_bit_keys.join(", ")
        ));
    }
    let optim = config.optimizer.optim;
    for key in ADAM_KEYS {
        if !optim.reads(key) && config.origin(key).is_some() {
            notes.push(format!(
                "{key} has no effect with optim: {}",
                optim.as_str()
            ));
        }
    }
    let quantised = config.model.quantise().is_some();
    for (key, used) in [
        ("llm_int8_threshold", config.model.load_in_8bit),
        ("llm_int8_skip_modules", quantised),
    ] {
        if !used && config.origin(key).is_some() {
            let needs = if key.ends_with("threshold") {
                "load_in_8bit: true"
            } else {
                "load_in_8bit, load_in_4bit or load_in_fp8"
            };
            notes.push(format!("{key} has no effect without {needs}"));
        }
    }
    let base = config
        .model
        .model_name_or_path
        .as_deref()
        .unwrap_or_default();
    if config.model.model_revision.is_some() && std::path::Path::new(base).is_dir() {
        notes.push("model_revision has no effect on a directory".to_owned());
    }
    let data = &config.data;
    if data.packing && data.truncation_mode == TruncationMode::KeepEnd {
        notes.push(
            "truncation_mode has no effect with packing, which keeps the start of a row".to_owned(),
        );
    }
    let schedule = &config.schedule;
    if schedule.max_steps > 0 && schedule.warmup_steps > schedule.max_steps as f64 {
        notes.push(format!(
            "warmup_steps: {} is more than max_steps: {}, so learning_rate is never reached",
            schedule.warmup_steps, schedule.max_steps
        ));
    }
    if schedule.warmup_steps > 0.0 && schedule.warmup_ratio > 0.0 {
        notes.push("warmup_ratio has no effect beside warmup_steps".to_owned());
    }
    notes
}
