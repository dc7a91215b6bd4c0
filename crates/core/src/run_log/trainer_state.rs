use super::json::{Row, json_number, number_from_json, row};
use super::results::{eval_row, train_row};
use super::selection::{CALLBACK, Selection};
use super::{Event, LogRow, Observer};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Keeps `trainer_state.json`: progress and the whole log history, as tools for Hugging Face
/// checkpoints read it.
///
/// Load the checkpoint's state to continue it: history and counters go on from there.
///
/// # Source
/// `transformers.TrainerState` (5.23), same keys in the same order; no total of floating point
/// operations before the end of the run. Fields are declared in the order of the file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    best_global_step: Option<u64>,
    best_metric: Option<Value>,
    best_model_checkpoint: Option<String>,
    epoch: f64,
    eval_steps: u64,
    global_step: u64,
    is_hyper_param_search: bool,
    is_local_process_zero: bool,
    is_world_process_zero: bool,
    log_history: Vec<Row>,
    logging_steps: u64,
    max_steps: u64,
    num_input_tokens_seen: u64,
    num_train_epochs: u64,
    save_steps: u64,
    #[serde(default)]
    stateful_callbacks: BTreeMap<String, Value>,
    total_flos: f64,
    train_batch_size: Option<u64>,
    trial_name: Option<String>,
    trial_params: Option<Value>,
    #[serde(skip)]
    selection: Selection,
}

impl TrainerState {
    /// The state of a run that has not begun.
    #[must_use]
    pub fn new() -> Self {
        Self {
            is_local_process_zero: true,
            is_world_process_zero: true,
            ..Self::default()
        }
    }

    /// Sets how evaluations are judged. It is not part of the file: whoever goes on from one says it
    /// again.
    #[must_use]
    pub fn with_selection(mut self, selection: Selection) -> Self {
        self.selection = selection;
        self
    }

    /// Reads the text of a `trainer_state.json` at `path`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is not one.
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        serde_json::from_str(text)
            .map_err(|error| Error::checkpoint(path, format!("not a trainer state: {error}")))
    }

    /// The text of `trainer_state.json`.
    ///
    /// # Panics
    /// Never: names and numbers always have a JSON form.
    #[must_use]
    #[expect(clippy::expect_used, reason = "invariant stated in the message")]
    pub fn to_json(&self) -> String {
        let text = serde_json::to_string_pretty(self);
        format!("{}\n", text.expect("names and numbers have a JSON form"))
    }

    /// Optimizer steps done.
    #[must_use]
    pub fn global_step(&self) -> u64 {
        self.global_step
    }

    /// Epochs done, with the fraction of the current one.
    #[must_use]
    pub fn epoch(&self) -> f64 {
        self.epoch
    }

    /// Tokens read by training so far.
    #[must_use]
    pub fn num_tokens(&self) -> u64 {
        self.num_input_tokens_seen
    }

    /// The rows logged so far, oldest first: training rows, evaluations, the final summary.
    #[must_use]
    pub fn log_history(&self) -> &[BTreeMap<String, Value>] {
        &self.log_history
    }

    /// The metric of the best evaluation so far, and the step it was at.
    #[must_use]
    pub fn best(&self) -> Option<(u64, f64)> {
        let metric = self.best_metric.as_ref().and_then(number_from_json)?;
        Some((self.best_global_step?, metric))
    }

    /// The step of the best evaluation so far.
    #[must_use]
    pub fn best_step(&self) -> Option<u64> {
        self.best_global_step
    }

    /// What the last evaluation at `step` found, with Transformers' keys, if there was one: of the weights as
    /// they were then.
    #[must_use]
    pub fn evaluation(&self, step: u64) -> Option<BTreeMap<String, Value>> {
        let is_of_step = |row: &&Row| row.contains_key("eval_loss") && row["step"] == step;
        let mut row = self.log_history.iter().rev().find(is_of_step)?.clone();
        row.remove("step");
        Some(row)
    }

    /// Whether so many evaluations in a row were no better that the run is to end.
    #[must_use]
    pub fn has_lost_patience(&self) -> bool {
        let count = Selection::saved(self.stateful_callbacks.get(CALLBACK));
        self.selection
            .patience
            .is_some_and(|patience| count >= patience)
    }

    fn judge(&mut self, step: u64, row: &Row) {
        let (value, best) = (self.selection.value(row), self.best().map(|(_, best)| best));
        if self.selection.patience.is_some() {
            let before = Selection::saved(self.stateful_callbacks.get(CALLBACK));
            let count = self.selection.count(before, value, best);
            let saved = self.selection.save(count);
            self.stateful_callbacks.insert(CALLBACK.to_owned(), saved);
        }
        let is_better = |value: f64| best.is_none_or(|best| self.selection.is_better(value, best));
        if let Some(value) = value.filter(|value| is_better(*value)) {
            self.best_metric = Some(json_number(value));
            self.best_global_step = Some(step);
        }
    }

    /// Sets progress between log rows, for a checkpoint at a step that is not logged.
    pub fn advance(&mut self, step: u64, epoch: f64, num_tokens: u64) {
        self.global_step = step;
        self.epoch = epoch;
        self.num_input_tokens_seen = num_tokens;
    }

    fn push(&mut self, step: u64, epoch: f64, mut row: Row) {
        self.global_step = step;
        self.epoch = epoch;
        row.insert("step".to_owned(), json!(step));
        self.log_history.push(row);
    }
}

fn log_row(log: &LogRow) -> Row {
    row([
        ("entropy", json_number(log.entropy)),
        ("epoch", json_number(log.epoch)),
        ("grad_norm", json_number(log.grad_norm)),
        ("learning_rate", json_number(log.learning_rate)),
        ("loss", json_number(log.loss)),
        ("mean_token_accuracy", json_number(log.mean_token_accuracy)),
        ("num_tokens", json!(log.num_tokens)),
    ])
}

impl Observer for TrainerState {
    fn on(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::RunStarted(run) => {
                self.max_steps = run.max_steps;
                self.num_train_epochs = run.num_train_epochs.ceil() as u64;
                self.logging_steps = run.logging_steps;
                self.eval_steps = run.eval_steps;
                self.save_steps = run.save_steps;
                self.train_batch_size = Some(run.train_batch_size);
            }
            Event::StepLogged(log) => {
                self.num_input_tokens_seen = log.num_tokens;
                self.push(log.step, log.epoch, log_row(log));
            }
            Event::Evaluated(result) => {
                let row = eval_row(result);
                self.judge(result.step, &row);
                self.push(result.step, result.epoch, row);
            }
            Event::CheckpointSaved(checkpoint) => {
                if self.best_global_step == Some(checkpoint.step) {
                    let path = checkpoint.path.to_string_lossy();
                    self.best_model_checkpoint = Some(path.into_owned());
                }
            }
            Event::RunFinished(run) => {
                self.total_flos = run.total_flos;
                self.push(run.step, run.epoch, train_row(run));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CheckpointSaved, Evaluated, RunFinished, RunStarted};
    use super::*;

    fn log(step: u64) -> Event {
        Event::StepLogged(LogRow {
            step,
            epoch: step as f64 / 10.0,
            loss: 1.0 / step as f64,
            num_tokens: 100 * step,
            ..LogRow::default()
        })
    }

    fn evaluated(step: u64, loss: f64) -> Event {
        Event::Evaluated(Evaluated {
            step,
            loss,
            ..Evaluated::default()
        })
    }

    fn started() -> Event {
        Event::RunStarted(RunStarted {
            max_steps: 30,
            num_train_epochs: 2.5,
            logging_steps: 1,
            ..RunStarted::default()
        })
    }

    fn checkpoint(step: u64) -> Event {
        let path = format!("out/checkpoint-{step}").into();
        Event::CheckpointSaved(CheckpointSaved { step, path })
    }

    #[test]
    fn a_resumed_state_ends_as_the_uninterrupted_one() {
        let events = [started(), log(1), evaluated(1, 2.0), checkpoint(1), log(2)];
        let rest = [
            log(3),
            evaluated(3, f64::NAN),
            Event::RunFinished(RunFinished::default()),
        ];
        let mut whole = TrainerState::new();
        let all = events.iter().chain(&rest);
        all.for_each(|event| whole.on(event).unwrap());

        let mut first = TrainerState::new();
        events.iter().for_each(|event| first.on(event).unwrap());
        let path = Path::new("trainer_state.json");
        let mut resumed = TrainerState::from_json(&first.to_json(), path).unwrap();
        let again = [started()];
        again
            .iter()
            .chain(&rest)
            .for_each(|event| resumed.on(event).unwrap());
        assert_eq!(resumed.to_json(), whole.to_json());
        assert_eq!(resumed.num_tokens(), 300);
    }

    #[test]
    fn the_file_has_transformers_keys_sorted_and_is_json_with_a_nan_loss() {
        let mut state = TrainerState::new();
        for event in [started(), evaluated(5, f64::NAN)] {
            state.on(&event).unwrap();
        }
        let parsed: Value = serde_json::from_str(&state.to_json()).unwrap();
        let keys: Vec<_> = parsed.as_object().unwrap().keys().collect();
        assert!(keys.is_sorted());
        assert_eq!(keys.len(), 20);
        assert_eq!(parsed["log_history"][0]["eval_loss"], json!("NaN"));
        assert_eq!(parsed["log_history"][0]["step"], json!(5));
        assert_eq!(parsed["num_train_epochs"], json!(3));
        assert_eq!(parsed["is_world_process_zero"], json!(true));
    }

    #[test]
    fn the_best_evaluation_is_the_lowest_finite_loss() {
        let mut state = TrainerState::new();
        let losses = [(1, f64::NAN), (2, 2.0), (3, 1.5), (4, 1.7), (5, f64::NAN)];
        for (step, loss) in losses {
            state.on(&evaluated(step, loss)).unwrap();
            state.on(&checkpoint(step)).unwrap();
        }
        assert_eq!(state.best(), Some((3, 1.5)));
        assert!(state.to_json().contains("out/checkpoint-3"));
    }

    #[test]
    fn a_metric_may_be_better_when_it_is_greater() {
        let mut state = TrainerState::new().with_selection(Selection {
            metric: "mean_token_accuracy".into(),
            greater_is_better: true,
            ..Selection::default()
        });
        for (step, mean_token_accuracy) in [(1, 0.5), (2, 0.7), (3, 0.6)] {
            let result = Evaluated {
                step,
                mean_token_accuracy,
                ..Evaluated::default()
            };
            state.on(&Event::Evaluated(result)).unwrap();
        }
        assert_eq!(state.best(), Some((2, 0.7)));
        assert!(!state.has_lost_patience());
    }

    #[test]
    fn patience_counts_evaluations_that_are_not_better_by_the_threshold_over_a_resume() {
        let selection = Selection {
            patience: Some(2),
            threshold: 0.1,
            ..Selection::default()
        };
        let mut state = TrainerState::new().with_selection(selection.clone());
        // A better one by less than the threshold is the best and does not renew patience.
        for (step, loss, lost) in [
            (1, 2.0, false),
            (2, 1.95, false),
            (3, 1.5, false),
            (4, f64::NAN, false),
        ] {
            state.on(&evaluated(step, loss)).unwrap();
            assert_eq!(state.has_lost_patience(), lost, "step {step}");
        }
        let json: Value = serde_json::from_str(&state.to_json()).unwrap();
        let callback = &json["stateful_callbacks"]["EarlyStoppingCallback"];
        assert_eq!(callback["args"]["early_stopping_patience"], 2);
        assert_eq!(callback["attributes"]["early_stopping_patience_counter"], 1);
        let path = Path::new("trainer_state.json");
        let resumed = TrainerState::from_json(&state.to_json(), path).unwrap();
        let mut resumed = resumed.with_selection(selection);
        resumed.on(&evaluated(5, 1.45)).unwrap();
        assert!(resumed.has_lost_patience());
        assert_eq!(resumed.best(), Some((5, 1.45)));
        // More patience than before goes on.
        let more = Selection {
            patience: Some(3),
            ..Selection::default()
        };
        assert!(!resumed.with_selection(more).has_lost_patience());
    }

    #[test]
    fn a_broken_file_is_named() {
        let path = Path::new("checkpoint-5/trainer_state.json");
        let error = TrainerState::from_json("{", path).unwrap_err();
        assert!(error.to_string().contains("checkpoint-5"), "{error}");
    }
}
