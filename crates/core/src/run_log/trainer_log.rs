use super::json::{json_number, line};
use super::log_window::per_second;
use super::{Event, LogRow, Observer};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;

/// Writes `trainer_log.jsonl`: one line per log row, one per evaluation.
///
/// # Source
/// LLaMA-Factory's log of the same name and keys, which its plots and web page read.
#[derive(Debug)]
pub struct TrainerLogJsonl<W> {
    writer: W,
    path: PathBuf,
    total_steps: u64,
    first_step: u64,
    first_tokens: Option<u64>,
    elapsed: f64,
}

impl<W: Write> TrainerLogJsonl<W> {
    /// Appends to `writer`, which errors call `path`.
    pub fn new(writer: W, path: impl Into<PathBuf>) -> Self {
        Self {
            writer,
            path: path.into(),
            total_steps: 0,
            first_step: 0,
            first_tokens: None,
            elapsed: 0.0,
        }
    }

    fn write(&mut self, text: &str) -> Result<()> {
        self.writer
            .write_all(text.as_bytes())
            .and_then(|()| self.writer.flush())
            .map_err(Error::write(&self.path))
    }

    /// What every line says of progress.
    fn progress(&self, step: u64) -> Vec<(&'static str, Value)> {
        let share = step as f64 / self.total_steps.max(1) as f64;
        vec![
            ("current_steps", json!(step)),
            ("total_steps", json!(self.total_steps)),
            (
                "percentage",
                json_number((share * 10_000.0).round() / 100.0),
            ),
            ("elapsed_time", json!(duration(self.elapsed))),
            ("remaining_time", json!(duration(self.remaining(step)))),
        ]
    }

    /// Seconds left, if the rest goes as fast as this process's steps so far.
    fn remaining(&self, step: u64) -> f64 {
        let done = step.saturating_sub(self.first_step).max(1) as f64;
        self.elapsed / done * self.total_steps.saturating_sub(step) as f64
    }

    fn log(&mut self, row: &LogRow) -> Result<()> {
        // A resumed run's tokens before its first row count as read in no time.
        let before = row.num_tokens as f64 - row.tokens_per_second * row.elapsed;
        let first = *self
            .first_tokens
            .get_or_insert(before.max(0.0).round() as u64);
        self.elapsed = row.elapsed;
        let throughput = per_second(row.num_tokens.saturating_sub(first), row.elapsed);
        let mut entries = self.progress(row.step);
        entries.extend([
            ("loss", json_number(row.loss)),
            ("lr", json_number(row.learning_rate)),
            ("epoch", json_number(row.epoch)),
            (
                "throughput",
                json_number((throughput * 100.0).round() / 100.0),
            ),
            ("total_tokens", json!(row.num_tokens)),
        ]);
        self.write(&line(entries))
    }
}

impl<W: Write> Observer for TrainerLogJsonl<W> {
    fn on(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::RunStarted(run) => {
                self.total_steps = run.max_steps;
                self.first_step = run.first_step;
                Ok(())
            }
            Event::StepLogged(row) => self.log(row),
            Event::Evaluated(result) => {
                let mut entries = self.progress(result.step);
                entries.extend([
                    ("eval_loss", json_number(result.loss)),
                    ("epoch", json_number(result.epoch)),
                ]);
                self.write(&line(entries))
            }
            Event::CheckpointSaved(_) | Event::RunFinished(_) => Ok(()),
        }
    }
}

/// The lines of a `trainer_log.jsonl` up to `step`, for a run that resumes there.
///
/// A last line cut off by a crash is dropped with those after `step`.
#[must_use]
pub fn rows_up_to(log: &str, step: u64) -> String {
    let kept = log.lines().filter(|line| {
        let row: Option<Value> = serde_json::from_str(line).ok();
        let done = row.and_then(|row| row["current_steps"].as_u64());
        done.is_some_and(|done| done <= step)
    });
    kept.flat_map(|line| [line, "\n"]).collect()
}

/// `h:mm:ss`, with whole days before it, as Python writes a duration.
fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let time = format!("{}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60);
    match days {
        0 => time,
        1 => format!("1 day, {time}"),
        days => format!("{days} days, {time}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Evaluated, RunStarted};
    use super::*;

    fn write_log() -> String {
        let mut buffer = Vec::new();
        let mut log = TrainerLogJsonl::new(&mut buffer, "trainer_log.jsonl");
        let events = [
            Event::RunStarted(RunStarted {
                max_steps: 30,
                ..RunStarted::default()
            }),
            Event::StepLogged(LogRow {
                step: 10,
                epoch: 0.5,
                loss: f64::NAN,
                learning_rate: 1e-4,
                num_tokens: 1000,
                tokens_per_second: 25.0,
                elapsed: 40.0,
                ..LogRow::default()
            }),
            Event::Evaluated(Evaluated {
                step: 20,
                loss: 1.5,
                ..Evaluated::default()
            }),
        ];
        for event in &events {
            log.on(event).unwrap();
        }
        String::from_utf8(buffer).unwrap()
    }

    #[test]
    fn lines_have_llama_factory_s_keys_and_stay_json_with_a_nan_loss() {
        let text = write_log();
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        let expected = json!({
            "current_steps": 10, "total_steps": 30, "percentage": 33.33,
            "elapsed_time": "0:00:40", "remaining_time": "0:01:20", "loss": "NaN", "lr": 1e-4,
            "epoch": 0.5, "throughput": 25.0, "total_tokens": 1000,
        });
        assert_eq!(first, expected);
        assert!(text.lines().nth(1).unwrap().contains("\"eval_loss\":1.5"));
    }

    #[test]
    fn resuming_keeps_the_rows_before_the_checkpoint() {
        let text = write_log();
        let cut = format!("{text}{{\"current_steps\": 2");
        assert_eq!(rows_up_to(&cut, 15).lines().count(), 1);
        assert_eq!(rows_up_to(&cut, 20), text);
    }

    #[test]
    fn durations_read_as_python_writes_them() {
        assert_eq!(duration(59.9), "0:00:59");
        assert_eq!(duration(3661.0), "1:01:01");
        assert_eq!(duration(90_000.0), "1 day, 1:00:00");
        assert_eq!(duration(200_000.0), "2 days, 7:33:20");
    }
}
