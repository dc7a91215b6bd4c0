use super::json::{Row, json_number, number_from_json, row};
use super::results::{eval_row, train_row};
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

    /// The lowest evaluation loss so far, and the step it was at.
    #[must_use]
    pub fn best(&self) -> Option<(u64, f64)> {
        let metric = self.best_metric.as_ref().and_then(number_from_json)?;
        Some((self.best_global_step?, metric))
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
                let better = self.best().is_none_or(|(_, best)| result.loss < best);
                if better && !result.loss.is_nan() {
                    self.best_metric = Some(json_number(result.loss));
                    self.best_global_step = Some(result.step);
                }
                self.push(result.step, result.epoch, eval_row(result));
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
    fn a_broken_file_is_named() {
        let path = Path::new("checkpoint-5/trainer_state.json");
        let error = TrainerState::from_json("{", path).unwrap_err();
        assert!(error.to_string().contains("checkpoint-5"), "{error}");
    }
}
