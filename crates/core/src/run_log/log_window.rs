use super::LogRow;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

/// What one optimizer step adds to the log: sums over all its micro-batches and ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Sum of cross-entropies over trained tokens, nats.
    pub loss_sum: f64,
    /// Sum of prediction entropies over trained tokens, nats.
    pub entropy_sum: f64,
    /// Trained tokens.
    pub trained_tokens: u64,
    /// Trained tokens predicted best.
    pub correct: u64,
    /// Tokens read, prompts included.
    pub tokens: u64,
    /// Documents read.
    pub sequences: u64,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate the step used.
    pub learning_rate: f64,
}

impl StepReport {
    /// Mean cross-entropy per trained token, nats.
    #[must_use]
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.trained_tokens.max(1) as f64
    }

    /// Share of trained tokens predicted best.
    #[must_use]
    pub fn mean_token_accuracy(&self) -> f64 {
        self.correct as f64 / self.trained_tokens.max(1) as f64
    }
}

/// Collects steps into the next [`LogRow`].
///
/// Means are over tokens, not over steps: a step with twice the tokens counts twice, so a row is
/// the same for any split of its tokens into steps.
#[derive(Clone, Debug, Default)]
pub struct LogWindow {
    sums: StepReport,
    num_tokens: u64,
    /// Since the start of training, for the mean over the whole run.
    run_loss_sum: f64,
    run_trained_tokens: u64,
    window_start: f64,
}

impl LogWindow {
    /// An empty window after `num_tokens` tokens, which a resumed run has read before.
    #[must_use]
    pub fn new(num_tokens: u64) -> Self {
        Self {
            num_tokens,
            ..Self::default()
        }
    }

    /// The window as JSON, every bit of its sums, so that a resumed run logs the same row.
    #[must_use]
    pub fn to_json(&self) -> String {
        let sums = &self.sums;
        let document = json!({
            "num_tokens": self.num_tokens,
            "loss_sum_bits": sums.loss_sum.to_bits(),
            "entropy_sum_bits": sums.entropy_sum.to_bits(),
            "trained_tokens": sums.trained_tokens,
            "correct": sums.correct,
            "tokens": sums.tokens,
            "run_loss_sum_bits": self.run_loss_sum.to_bits(),
            "run_trained_tokens": self.run_trained_tokens,
        });
        format!("{document:#}\n")
    }

    /// Reads what [`LogWindow::to_json`] wrote; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if a count is missing.
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        let document: Value = serde_json::from_str(text)
            .map_err(|e| Error::checkpoint(path, format!("is not valid JSON: {e}")))?;
        let count = |key: &str| {
            let value = document.get(key).and_then(Value::as_u64);
            value.ok_or_else(|| Error::checkpoint(path, format!("`{key}` is missing or no count")))
        };
        let sums = StepReport {
            loss_sum: f64::from_bits(count("loss_sum_bits")?),
            entropy_sum: f64::from_bits(count("entropy_sum_bits")?),
            trained_tokens: count("trained_tokens")?,
            correct: count("correct")?,
            tokens: count("tokens")?,
            ..StepReport::default()
        };
        Ok(Self {
            sums,
            num_tokens: count("num_tokens")?,
            run_loss_sum: f64::from_bits(count("run_loss_sum_bits")?),
            run_trained_tokens: count("run_trained_tokens")?,
            window_start: 0.0,
        })
    }

    /// Tokens read since the start of training.
    #[must_use]
    pub fn num_tokens(&self) -> u64 {
        self.num_tokens
    }

    /// Mean cross-entropy per trained token since the start of training, in nats; 0 before it.
    #[must_use]
    pub fn run_loss(&self) -> f64 {
        self.run_loss_sum / self.run_trained_tokens.max(1) as f64
    }

    /// Adds a step.
    pub fn add(&mut self, step: &StepReport) {
        let sums = &mut self.sums;
        sums.loss_sum += step.loss_sum;
        sums.entropy_sum += step.entropy_sum;
        sums.trained_tokens += step.trained_tokens;
        sums.correct += step.correct;
        sums.tokens += step.tokens;
        sums.grad_norm = step.grad_norm;
        sums.learning_rate = step.learning_rate;
        self.num_tokens += step.tokens;
        self.run_loss_sum += step.loss_sum;
        self.run_trained_tokens += step.trained_tokens;
    }

    /// The row of the steps since the last one; empties the window.
    ///
    /// `elapsed` is in seconds since this process began to train. A window without trained tokens
    /// has loss, entropy and accuracy 0.
    pub fn take(&mut self, step: u64, epoch: f64, elapsed: f64) -> LogRow {
        let sums = std::mem::take(&mut self.sums);
        let count = sums.trained_tokens.max(1) as f64;
        let seconds = elapsed - std::mem::replace(&mut self.window_start, elapsed);
        LogRow {
            step,
            epoch,
            loss: sums.loss_sum / count,
            grad_norm: sums.grad_norm,
            learning_rate: sums.learning_rate,
            entropy: sums.entropy_sum / count,
            num_tokens: self.num_tokens,
            mean_token_accuracy: sums.correct as f64 / count,
            tokens_per_second: per_second(sums.tokens, seconds),
            elapsed,
        }
    }
}

/// `count` per second; 0 for no time.
pub(super) fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        count as f64 / seconds
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(loss_sum: f64, trained_tokens: u64) -> StepReport {
        StepReport {
            loss_sum,
            trained_tokens,
            correct: trained_tokens / 2,
            tokens: 2 * trained_tokens,
            ..StepReport::default()
        }
    }

    #[test]
    fn a_window_survives_a_checkpoint_bit_for_bit() {
        let mut window = LogWindow::new(7);
        window.add(&step(0.7, 4));
        window.take(1, 0.25, 1.0);
        window.add(&step(0.1 + 0.2, 3));
        let path = Path::new("run_state.json");
        let mut read = LogWindow::from_json(&window.to_json(), path).unwrap();
        read.add(&step(1.0, 2));
        window.add(&step(1.0, 2));
        assert_eq!(read.run_loss(), window.run_loss());
        assert!((window.run_loss() - 2.0 / 9.0).abs() < 1e-15);
        // The clock starts anew with the process.
        window.window_start = 0.0;
        assert_eq!(read.take(2, 0.5, 4.0), window.take(2, 0.5, 4.0));
        assert!(LogWindow::from_json("{}", path).is_err());
    }

    #[test]
    fn means_are_weighted_by_tokens_not_by_steps() {
        let mut window = LogWindow::new(100);
        window.add(&step(30.0, 10));
        window.add(&step(30.0, 30));
        let row = window.take(2, 0.5, 4.0);
        assert_eq!(row.loss, 1.5);
        assert_eq!(row.mean_token_accuracy, 0.5);
        assert_eq!(row.num_tokens, 180);
        assert_eq!(row.tokens_per_second, 20.0);
        window.add(&step(4.0, 4));
        let row = window.take(3, 0.75, 6.0);
        assert_eq!((row.loss, row.tokens_per_second), (1.0, 4.0));
    }

    #[test]
    fn a_nan_loss_is_kept_and_an_empty_window_is_zero() {
        let mut window = LogWindow::new(0);
        window.add(&step(1.0, 1));
        window.add(&step(f64::NAN, 1));
        assert!(window.take(2, 0.0, 1.0).loss.is_nan());
        assert_eq!(window.take(3, 0.0, 2.0).loss, 0.0);
    }
}
