use super::json::{Row, json_number, pretty, row};
use super::log_window::per_second;
use super::{Evaluated, RunFinished};
use serde_json::{Value, json};
use std::collections::BTreeMap;

pub(super) fn train_row(run: &RunFinished) -> Row {
    row([
        ("epoch", json_number(run.epoch)),
        ("total_flos", json_number(run.total_flos)),
        ("train_loss", json_number(run.train_loss)),
        ("train_runtime", json_number(run.train_runtime)),
        (
            "train_samples_per_second",
            json_number(per_second(run.samples, run.train_runtime)),
        ),
        (
            "train_steps_per_second",
            json_number(per_second(run.steps, run.train_runtime)),
        ),
    ])
}

pub(super) fn eval_row(result: &Evaluated) -> Row {
    row([
        ("epoch", json_number(result.epoch)),
        ("eval_entropy", json_number(result.entropy)),
        ("eval_loss", json_number(result.loss)),
        (
            "eval_mean_token_accuracy",
            json_number(result.mean_token_accuracy),
        ),
        ("eval_num_tokens", json!(result.num_tokens)),
        ("eval_runtime", json_number(result.runtime)),
        (
            "eval_samples_per_second",
            json_number(per_second(result.samples, result.runtime)),
        ),
        (
            "eval_steps_per_second",
            json_number(per_second(result.batches, result.runtime)),
        ),
    ])
}

/// Text of `train_results.json`, with Transformers' keys.
#[must_use]
pub fn train_results(run: &RunFinished) -> String {
    pretty(&train_row(run))
}

/// Text of `eval_results.json`, with Transformers' keys, of what [`super::TrainerState::evaluation`] gives.
#[must_use]
pub fn eval_results(evaluation: &BTreeMap<String, Value>) -> String {
    pretty(evaluation)
}

/// Text of `all_results.json`: training and, if there was one, the evaluation of its result.
#[must_use]
pub fn all_results(run: &RunFinished, evaluation: Option<&BTreeMap<String, Value>>) -> String {
    let mut all = evaluation.cloned().unwrap_or_default();
    all.extend(train_row(run));
    pretty(&all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_have_transformers_keys_and_stay_json() {
        let run = RunFinished {
            train_runtime: 2.0,
            samples: 8,
            steps: 4,
            train_loss: f64::NAN,
            ..RunFinished::default()
        };
        let train: Value = serde_json::from_str(&train_results(&run)).unwrap();
        assert_eq!(train["train_samples_per_second"], json!(4.0));
        assert_eq!(train["train_loss"], json!("NaN"));
        let all: Value =
            serde_json::from_str(&all_results(&run, Some(&eval_row(&Evaluated::default()))))
                .unwrap();
        assert_eq!(all["eval_loss"], json!(0.0));
        assert_eq!(all["train_steps_per_second"], json!(2.0));
        assert_eq!(all.as_object().unwrap().len(), 13);
    }
}
