//! Which evaluation is the best, and when a run has waited long enough for a better one.

use super::json::{Row, number_from_json};
use serde_json::{Value, json};

/// The callback of transformers under whose name the count is saved.
pub(super) const CALLBACK: &str = "EarlyStoppingCallback";
const COUNTER: &str = "early_stopping_patience_counter";

/// What evaluations are judged by (`metric_for_best_model`), without `eval_` before it.
pub const METRICS: [&str; 3] = ["loss", "entropy", "mean_token_accuracy"];

/// How evaluations are judged.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// One of [`METRICS`].
    pub metric: String,
    /// Whether more of it is better.
    pub greater_is_better: bool,
    /// Evaluations in a row without a better one that end the run; none: it runs to its end.
    pub patience: Option<u64>,
    /// By how much an evaluation must be better to count, for patience alone.
    pub threshold: f64,
}

impl Default for Selection {
    fn default() -> Self {
        Self {
            metric: "loss".to_owned(),
            greater_is_better: false,
            patience: None,
            threshold: 0.0,
        }
    }
}

impl Selection {
    /// The metric of a row of `log_history`, if it is a number.
    pub(super) fn value(&self, row: &Row) -> Option<f64> {
        let value = number_from_json(row.get(&format!("eval_{}", self.metric))?)?;
        (!value.is_nan()).then_some(value)
    }

    pub(super) fn is_better(&self, value: f64, than: f64) -> bool {
        if self.greater_is_better {
            value > than
        } else {
            value < than
        }
    }

    /// The count after an evaluation, given the one before and the best before.
    ///
    /// # Source
    /// `transformers.EarlyStoppingCallback`. One whose metric is not a number counts as no better.
    pub(super) fn count(&self, before: u64, value: Option<f64>, best: Option<f64>) -> u64 {
        let improves = value.is_some_and(|value| {
            best.is_none_or(|best| {
                self.is_better(value, best) && (value - best).abs() > self.threshold
            })
        });
        if improves { 0 } else { before + 1 }
    }

    /// The count as `stateful_callbacks` holds it.
    pub(super) fn save(&self, counter: u64) -> Value {
        json!({
            "args": {
                "early_stopping_patience": self.patience,
                "early_stopping_threshold": self.threshold,
            },
            "attributes": { COUNTER: counter },
        })
    }

    pub(super) fn saved(callback: Option<&Value>) -> u64 {
        let counter = callback.and_then(|c| c["attributes"][COUNTER].as_u64());
        counter.unwrap_or(0)
    }
}
