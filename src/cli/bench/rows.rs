//! The token rows that a benchmark trains on.

use ferrotune::core::data::jsonl::{JsonLines, parse_object};
use ferrotune::core::data::{Example, PackedBatch};
use ferrotune::core::{Error, Result};
use ferrotune::kernels::rng;
use serde_json::Value;
use std::path::Path;

/// Random rows made ahead; steps go round them.
const RANDOM_STEPS: usize = 4;

/// Rows, cut into steps of equal numbers of rows.
#[derive(Debug)]
pub(super) struct Steps {
    rows: Vec<Example>,
    batch: usize,
}

impl Steps {
    /// Rows of `seq` uniformly random tokens.
    pub(super) fn random(seed: u64, batch: usize, seq: usize, vocab: usize) -> Self {
        let mut stream = rng::Stream::new(rng::key_for(seed, "rows"));
        let mut row = || example((0..seq).map(|_| stream.below(vocab) as u32).collect());
        let rows = (0..RANDOM_STEPS * batch).map(|_| row()).collect();
        Self { rows, batch }
    }

    /// The rows of a file of `{"input_ids": [...]}` lines; all of them make a step unless `batch`
    /// says how many do.
    ///
    /// # Errors
    /// [`Error::Data`] naming the line.
    pub(super) fn from_file(path: &Path, batch: Option<usize>, vocab: usize) -> Result<Self> {
        let mut rows = Vec::new();
        for line in JsonLines::open(path)? {
            let line = line?;
            let row = parse_object(path, &line)?;
            let ids = row.get("input_ids").and_then(Value::as_array);
            let ids: Option<Vec<u32>> = ids.and_then(|ids| {
                let id = |v: &Value| u32::try_from(v.as_u64()?).ok();
                ids.iter()
                    .map(|v| id(v).filter(|&id| (id as usize) < vocab))
                    .collect()
            });
            match ids {
                Some(ids) if ids.len() > 1 => rows.push(example(ids)),
                _ => {
                    let message = format!(
                        "expected `input_ids`: 2 or more integers from 0 to {}",
                        vocab - 1
                    );
                    return Err(Error::data(path, line.number, message));
                }
            }
        }
        let batch = batch.unwrap_or(rows.len());
        if rows.is_empty() || !rows.len().is_multiple_of(batch) {
            let message = format!("{} rows do not make whole steps of {batch}", rows.len());
            return Err(Error::data(path, None, message));
        }
        Ok(Self { rows, batch })
    }

    /// The micro-batch of a step, from 0.
    pub(super) fn batch(&self, step: usize) -> PackedBatch {
        let steps = self.rows.len() / self.batch;
        let first = step % steps * self.batch;
        let rows = &self.rows[first..first + self.batch];
        PackedBatch::pack(rows.iter().enumerate().map(|(i, row)| (i as u64, row)))
    }

    pub(super) fn rows_per_step(&self) -> usize {
        self.batch
    }

    /// Tokens of a step, the mean over all rows.
    pub(super) fn tokens_per_step(&self) -> usize {
        (self.mean_length() * self.batch as f64).round() as usize
    }

    /// Tokens of the largest step.
    pub(super) fn max_tokens(&self) -> usize {
        let tokens = |rows: &[Example]| rows.iter().map(Example::len).sum();
        self.rows.chunks(self.batch).map(tokens).max().unwrap_or(0)
    }

    /// Tokens of a row.
    pub(super) fn mean_length(&self) -> f64 {
        let tokens: usize = self.rows.iter().map(Example::len).sum();
        tokens as f64 / self.rows.len() as f64
    }
}

fn example(input_ids: Vec<u32>) -> Example {
    let labels = input_ids.iter().map(|&id| id as i32).collect();
    Example { input_ids, labels }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_go_round_the_rows() {
        let steps = Steps::random(0, 2, 8, 100);
        assert_eq!((steps.tokens_per_step(), steps.max_tokens()), (16, 16));
        assert_eq!(steps.batch(0), steps.batch(RANDOM_STEPS));
        assert_ne!(steps.batch(0), steps.batch(1));
        assert_eq!(steps.batch(0).cu_seqlens, [0, 8, 16]);
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_refused_with_its_line() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        let text = "{\"input_ids\": [1, 2]}\n{\"input_ids\": [1, 100]}\n";
        std::io::Write::write_all(&mut file, text.as_bytes()).expect("written");
        let error = Steps::from_file(file.path(), None, 100).expect_err("id 100 of 100");
        assert!(error.to_string().contains('2'), "{error}");
        let rows = Steps::from_file(file.path(), Some(1), 101).expect("valid");
        assert_eq!((rows.rows_per_step(), rows.tokens_per_step()), (1, 2));
    }
}
