use super::schedule::steps_or_ratio;
use super::source::{OURS, TRANSFORMERS, TRL_SFT};
use crate::config::section::section;
use crate::config::value::{KeyValue, choices};
use crate::run_log::Selection;
use serde_json::{Value, json};
use std::path::PathBuf;

choices! {
    /// When something regular happens.
    IntervalStrategy {
        /// Never.
        No = "no",
        /// Every so many optimizer steps.
        Steps = "steps",
        /// At the end of each epoch.
        Epoch = "epoch",
    }
}

/// Where a run starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// null or false: from the beginning.
    Never,
    /// auto: from the last checkpoint in `output_dir` if there is one.
    Auto,
    /// true: from the last checkpoint in `output_dir`, which must be there.
    Last,
    /// From this checkpoint.
    From(PathBuf),
}

impl KeyValue for Resume {
    fn schema() -> Value {
        json!({"type": ["string", "boolean", "null"]})
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        match (value, bool::from_value(value)) {
            (Value::Null, _) | (_, Ok(false)) => Ok(Self::Never),
            (_, Ok(true)) => Ok(Self::Last),
            (Value::String(text), _) if text == "auto" => Ok(Self::Auto),
            (Value::String(text), _) if !text.is_empty() => Ok(Self::From(text.into())),
            _ => Err("auto, true, false, null or the path of a checkpoint".to_owned()),
        }
    }

    fn to_value(&self) -> Value {
        match self {
            Self::Never => Value::Null,
            Self::Auto => json!("auto"),
            Self::Last => json!(true),
            Self::From(path) => json!(path.to_string_lossy()),
        }
    }

    fn parse_text(text: &str) -> Result<Value, String> {
        Option::<String>::parse_text(text)
    }
}

section! {
    /// What is written where, how often.
    OutputArguments, "output" {
        /// Directory for the adapter, checkpoints and logs.
        output_dir: String = "trainer_output".to_owned(), TRANSFORMERS;
        /// Start over in an output_dir that holds an earlier run.
        overwrite_output_dir: bool = false, TRANSFORMERS;
        /// Name of the run in logs; null for output_dir.
        run_name: Option<String> = None, TRANSFORMERS;
        /// When to log: no, steps or epoch.
        logging_strategy: IntervalStrategy = IntervalStrategy::Steps, TRANSFORMERS;
        /// Steps between log rows; below 1 a share of all steps.
        logging_steps: f64 = 10.0, TRL_SFT;
        /// Log the first step too.
        logging_first_step: bool = false, TRANSFORMERS;
        /// When to save a checkpoint: no, steps or epoch.
        save_strategy: IntervalStrategy = IntervalStrategy::Steps, TRANSFORMERS;
        /// Steps between checkpoints; below 1 a share of all steps.
        save_steps: f64 = 500.0, TRANSFORMERS;
        /// Checkpoints to keep, the oldest are deleted; null for all.
        save_total_limit: Option<usize> = None, TRANSFORMERS;
        /// When to evaluate: no, steps or epoch.
        eval_strategy: IntervalStrategy = IntervalStrategy::No, TRANSFORMERS;
        /// Steps between evaluations, below 1 a share of all steps; null for logging_steps.
        eval_steps: Option<f64> = None, TRANSFORMERS;
        /// What evaluations are judged by: loss, entropy or mean_token_accuracy (also with eval_ before it).
        metric_for_best_model: Option<String> = None, TRANSFORMERS;
        /// Whether more of that metric is better; null for what its name says.
        greater_is_better: Option<bool> = None, TRANSFORMERS;
        /// At the end, go back to the best evaluation; each that is the best so far is saved for that.
        load_best_model_at_end: bool = false, TRANSFORMERS;
        /// Evaluations in a row without a better one that end the run; null for none.
        early_stopping_patience: Option<u64> = None, OURS;
        /// By how much an evaluation must be better to count for early_stopping_patience.
        early_stopping_threshold: f64 = 0.0, OURS;
        /// Start from a checkpoint: auto (the last one, if any), true (the last one), a path, or
        /// null.
        resume_from_checkpoint: Resume = Resume::Never, TRANSFORMERS;
        /// Where else to send logs. Only none is supported; other names are noted and ignored.
        report_to: Vec<String> = vec!["none".to_owned()], OURS;
    }
}

impl OutputArguments {
    /// Steps between log rows in a run of `total_steps`.
    #[must_use]
    pub fn logging_interval(&self, total_steps: u64) -> u64 {
        steps_or_ratio(self.logging_steps, total_steps).max(1)
    }

    /// Steps between checkpoints in a run of `total_steps`.
    #[must_use]
    pub fn save_interval(&self, total_steps: u64) -> u64 {
        steps_or_ratio(self.save_steps, total_steps).max(1)
    }

    /// How evaluations are judged.
    #[must_use]
    pub fn selection(&self) -> Selection {
        let metric = self.metric_for_best_model.as_deref().unwrap_or("loss");
        let metric = metric.strip_prefix("eval_").unwrap_or(metric);
        Selection {
            metric: metric.to_owned(),
            greater_is_better: self
                .greater_is_better
                .unwrap_or(metric == "mean_token_accuracy"),
            patience: self.early_stopping_patience,
            threshold: self.early_stopping_threshold,
        }
    }

    /// Steps between evaluations in a run of `total_steps`.
    #[must_use]
    pub fn eval_interval(&self, total_steps: u64) -> u64 {
        // 0 means unset to Transformers too.
        let steps = self.eval_steps.filter(|steps| *steps > 0.0);
        steps_or_ratio(steps.unwrap_or(self.logging_steps), total_steps).max(1)
    }
}
