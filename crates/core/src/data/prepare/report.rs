use crate::data::batch::Example;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// How many dropped rows a report names.
const NAMED_ROWS: usize = 10;

/// What preparation did to a data set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrepareReport {
    /// Rows read.
    pub rows: u64,
    /// Rows left out because no token of them is trained.
    pub dropped_rows: u64,
    /// File and line of the first rows left out.
    pub dropped_lines: Vec<(PathBuf, u64)>,
    /// Rows cut to `max_length`.
    pub truncated_rows: u64,
    /// Tokens that truncation cut off.
    pub tokens_lost: u64,
    /// Tokens of the examples that remain.
    pub tokens: u64,
    /// Tokens that are predicted.
    pub trained_tokens: u64,
    /// Tokens of the longest example.
    pub longest: usize,
    /// Number of examples by length: up to 1, 2, 4, 8, ... tokens.
    pub length_histogram: BTreeMap<usize, u64>,
}

impl PrepareReport {
    /// Counts a row that was prepared and cut by `lost` tokens; whether it is kept.
    pub(crate) fn count(&mut self, path: &Path, line: u64, example: &Example, lost: usize) -> bool {
        self.rows += 1;
        self.truncated_rows += u64::from(lost > 0);
        self.tokens_lost += lost as u64;
        let trained = example.trained_tokens();
        if trained == 0 {
            self.dropped_rows += 1;
            if self.dropped_lines.len() < NAMED_ROWS {
                self.dropped_lines.push((path.to_path_buf(), line));
            }
            return false;
        }
        self.tokens += example.len() as u64;
        self.trained_tokens += trained as u64;
        self.longest = self.longest.max(example.len());
        *self
            .length_histogram
            .entry(example.len().next_power_of_two())
            .or_default() += 1;
        true
    }
}
