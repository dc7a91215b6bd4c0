use super::json::{json_number, line};
use super::{Event, Observer};
use crate::io::UntilClosed;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;

/// One JSON line per event, for standard output without a terminal.
///
/// A reader that goes away (`| head -1`) is no failure of the run: from then on nothing is written.
#[derive(Debug)]
pub struct JsonLines<W> {
    writer: UntilClosed<W>,
    name: PathBuf,
    /// Whose events these are, where several adapters train together.
    adapter: Option<String>,
}

impl<W: Write> JsonLines<W> {
    /// Writes to `writer`, which errors call `name`, such as `standard output`.
    pub fn new(writer: W, name: impl Into<PathBuf>) -> Self {
        Self {
            writer: UntilClosed::new(writer),
            name: name.into(),
            adapter: None,
        }
    }

    /// The same with `adapter` in every line.
    #[must_use]
    pub fn of_adapter(mut self, adapter: &str) -> Self {
        self.adapter = Some(adapter.to_owned());
        self
    }
}

impl<W: Write> Observer for JsonLines<W> {
    fn on(&mut self, event: &Event) -> Result<()> {
        let mut entries = entries(event);
        entries.extend(self.adapter.iter().map(|name| ("adapter", json!(name))));
        let text = line(entries);
        let written = self.writer.write_all(text.as_bytes());
        let written = written.and_then(|()| self.writer.flush());
        written.map_err(Error::write(&self.name))
    }
}

fn entries(event: &Event) -> Vec<(&'static str, Value)> {
    match event {
        Event::RunStarted(run) => vec![
            ("event", json!("run_started")),
            ("model", json!(run.model)),
            ("method", json!(run.method)),
            ("trainable_parameters", json!(run.trainable_parameters)),
            ("total_parameters", json!(run.total_parameters)),
            ("examples", json!(run.examples)),
            ("num_train_epochs", json_number(run.num_train_epochs)),
            ("max_steps", json!(run.max_steps)),
            ("first_step", json!(run.first_step)),
            ("train_batch_size", json!(run.train_batch_size)),
            (
                "gradient_accumulation_steps",
                json!(run.gradient_accumulation_steps),
            ),
            ("world_size", json!(run.world_size)),
        ],
        Event::StepLogged(row) => vec![
            ("event", json!("step")),
            ("step", json!(row.step)),
            ("epoch", json_number(row.epoch)),
            ("loss", json_number(row.loss)),
            ("grad_norm", json_number(row.grad_norm)),
            ("learning_rate", json_number(row.learning_rate)),
            ("entropy", json_number(row.entropy)),
            ("num_tokens", json!(row.num_tokens)),
            ("mean_token_accuracy", json_number(row.mean_token_accuracy)),
            ("tokens_per_second", json_number(row.tokens_per_second)),
            ("elapsed", json_number(row.elapsed)),
        ],
        Event::Evaluated(result) => vec![
            ("event", json!("evaluation")),
            ("step", json!(result.step)),
            ("epoch", json_number(result.epoch)),
            ("eval_loss", json_number(result.loss)),
            ("eval_entropy", json_number(result.entropy)),
            (
                "eval_mean_token_accuracy",
                json_number(result.mean_token_accuracy),
            ),
            ("eval_runtime", json_number(result.runtime)),
        ],
        Event::CheckpointSaved(checkpoint) => vec![
            ("event", json!("checkpoint")),
            ("step", json!(checkpoint.step)),
            ("path", json!(checkpoint.path.to_string_lossy())),
        ],
        Event::RunFinished(run) => vec![
            ("event", json!("run_finished")),
            ("step", json!(run.step)),
            ("epoch", json_number(run.epoch)),
            ("train_runtime", json_number(run.train_runtime)),
            ("train_loss", json_number(run.train_loss)),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CheckpointSaved, LogRow};
    use super::*;
    use std::io::ErrorKind;

    #[test]
    fn every_event_is_one_line_of_json() {
        let mut buffer = Vec::new();
        let mut lines = JsonLines::new(&mut buffer, "standard output");
        let row = LogRow {
            step: 3,
            loss: f64::INFINITY,
            ..LogRow::default()
        };
        lines.on(&Event::StepLogged(row)).unwrap();
        let checkpoint = CheckpointSaved {
            step: 3,
            path: "out/a\n\"b".into(),
        };
        lines.on(&Event::CheckpointSaved(checkpoint)).unwrap();
        let text = String::from_utf8(buffer).unwrap();
        let rows: Vec<Value> = text
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
        assert_eq!(rows[0]["loss"], json!("Infinity"));
        assert_eq!(rows[1]["path"], json!("out/a\n\"b"));
    }

    /// Fails as it is told to, and counts how often it is asked.
    struct Failing {
        kind: ErrorKind,
        asked: usize,
    }

    impl Write for &mut Failing {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            self.asked += 1;
            Err(self.kind.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_is_an_error_that_names_the_output() {
        let kind = ErrorKind::StorageFull;
        let mut full = Failing { kind, asked: 0 };
        let mut lines = JsonLines::new(&mut full, "standard output");
        let error = lines.on(&Event::StepLogged(LogRow::default())).unwrap_err();
        assert!(error.to_string().contains("standard output"));
    }

    #[test]
    fn a_reader_that_is_gone_is_not_written_to_again() {
        let kind = ErrorKind::BrokenPipe;
        let mut gone = Failing { kind, asked: 0 };
        let mut lines = JsonLines::new(&mut gone, "standard output");
        for _ in 0..3 {
            lines.on(&Event::StepLogged(LogRow::default())).unwrap();
        }
        assert_eq!(gone.asked, 1);
    }
}
