//! A progress bar with a line of metrics, for a person at a terminal.

use super::print_error_line;
use ferrotune::core::Result;
use ferrotune::core::run_log::{Event, LogRow, Observer};
use indicatif::{ProgressBar, ProgressStyle};

const TEMPLATE: &str = "{bar:30} {pos}/{len} steps [{elapsed_precise} < {eta_precise}] {msg}";

/// Draws on standard error, so that standard output can be redirected.
#[derive(Debug)]
pub(super) struct Progress {
    bar: ProgressBar,
    /// What each line begins with, and that there is no bar: several runs at once would draw over each other.
    name: Option<String>,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self {
            bar: ProgressBar::hidden(),
            name: None,
        }
    }

    /// One of several runs at once.
    pub(super) fn of(name: &str) -> Self {
        Self {
            bar: ProgressBar::hidden(),
            name: Some(format!("{name}  ")),
        }
    }

    fn line(&self, row: &LogRow) {
        self.say(&format!(
            "step {:>6}  loss {:>8.4}  accuracy {:>6.3}  grad norm {:>8.3}  lr {:>9.2e}  {:>8.0} tokens/s",
            row.step, row.loss, row.mean_token_accuracy, row.grad_norm, row.learning_rate, row.tokens_per_second
        ));
    }

    /// Above the bar; the bar swallows its lines where standard error is not a terminal.
    fn say(&self, line: &str) {
        let name = self.name.as_deref().unwrap_or_default();
        if self.bar.is_hidden() {
            print_error_line(&format!("{name}{line}"));
        } else {
            self.bar.println(line);
        }
    }
}

impl Observer for Progress {
    fn on(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::RunStarted(run) if self.name.is_none() => {
                self.bar = ProgressBar::new(run.max_steps);
                let style = ProgressStyle::with_template(TEMPLATE);
                self.bar
                    .set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                self.bar.set_position(run.first_step);
                // The time left is judged by this process's steps alone.
                self.bar.reset_eta();
            }
            Event::StepLogged(row) => {
                self.bar.set_position(row.step);
                self.bar.set_message(format!("loss {:.4}", row.loss));
                self.line(row);
            }
            Event::Evaluated(e) => self.say(&format!(
                "step {:>6}  eval loss {:.4}  accuracy {:.3}",
                e.step, e.loss, e.mean_token_accuracy
            )),
            Event::CheckpointSaved(saved) => self.say(&format!("saved {}", saved.path.display())),
            Event::RunFinished(_) => self.bar.finish_and_clear(),
            _ => {}
        }
        Ok(())
    }
}
