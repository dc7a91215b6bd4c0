use crate::data::batch::{Example, IGNORE_INDEX};
use crate::data::examples::Examples;
use crate::data::prepare::Row;
use crate::data::record::list;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// A row as it is trained on.
pub(crate) struct Prepared {
    pub(crate) example: Example,
    /// Tokens that truncation took.
    pub(crate) lost: usize,
    /// Whether its class is learned.
    pub(crate) classified: bool,
}

impl Prepared {
    /// Labels that count. A class is the label of the last token, which may be the first, that nothing predicts.
    pub(crate) fn trained(&self) -> usize {
        match self.class() {
            Some(_) => 1,
            None => self.example.trained_tokens(),
        }
    }

    fn class(&self) -> Option<u32> {
        let last = self.example.labels.last().filter(|_| self.classified);
        last.and_then(|label| u32::try_from(*label).ok())
    }
}

/// How many dropped rows a report names.
const NAMED_ROWS: usize = 10;

/// What preparation did to a data set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareReport {
    /// Rows read.
    pub rows: u64,
    /// Rows left out because no token of them has a label.
    pub dropped_rows: u64,
    /// Rows kept although no token of them is trained: those of one token, and others where rows without
    /// labels are kept.
    pub untrained_rows: u64,
    /// File and line of the first rows left out.
    pub dropped_lines: Vec<(PathBuf, u64)>,
    /// Rows left out because they cannot be used.
    pub bad_rows: u64,
    /// The first of them, each with file, line and reason.
    pub bad_row_messages: Vec<String>,
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
    /// By file, the columns of its rows that nothing reads.
    pub unused_columns: BTreeMap<PathBuf, BTreeSet<String>>,
    /// The names in `dataset_columns` of which no row had a column.
    pub missing_columns: BTreeSet<String>,
    /// Examples of each class by its number, where classes are learned.
    pub classes: BTreeMap<u32, u64>,
}

impl PrepareReport {
    /// A line for each file with columns that nothing reads.
    pub fn unused_lines(&self) -> impl Iterator<Item = String> {
        self.unused_columns.iter().map(|(path, names)| {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            format!("{}: not used: {}", path.display(), list(&names))
        })
    }

    /// Counts a row that cannot be used.
    pub(crate) fn count_bad(&mut self, reason: &crate::Error) {
        self.rows += 1;
        self.bad_rows += 1;
        if self.bad_row_messages.len() < NAMED_ROWS {
            self.bad_row_messages.push(reason.to_string());
        }
    }

    /// Counts a row that was prepared; whether it is kept, as one without labels is if `keep_unlabelled`.
    pub(crate) fn count(&mut self, row: &Row, prepared: &Prepared, keep_unlabelled: bool) -> bool {
        let Prepared { example, lost, .. } = prepared;
        self.rows += 1;
        self.truncated_rows += u64::from(*lost > 0);
        self.tokens_lost += *lost as u64;
        let trained = prepared.trained();
        let is_labelled = example.labels.iter().any(|label| *label != IGNORE_INDEX);
        if !is_labelled && !keep_unlabelled {
            self.dropped_rows += 1;
            if self.dropped_lines.len() < NAMED_ROWS {
                self.dropped_lines.push((row.path.to_path_buf(), row.line));
            }
            return false;
        }
        if let Some(class) = prepared.class() {
            *self.classes.entry(class).or_default() += 1;
        }
        self.untrained_rows += u64::from(trained == 0);
        self.add(example.len(), trained);
        true
    }

    /// Counts anew what is counted of examples.
    pub(crate) fn measure(&mut self, examples: &Examples) {
        (self.tokens, self.trained_tokens, self.longest) = (0, 0, 0);
        self.length_histogram.clear();
        for (length, trained) in examples.lengths().zip(examples.trained_tokens()) {
            self.add(length, trained);
        }
    }

    fn add(&mut self, length: usize, trained: usize) {
        self.tokens += length as u64;
        self.trained_tokens += trained as u64;
        self.longest = self.longest.max(length);
        let bin = length.next_power_of_two();
        *self.length_histogram.entry(bin).or_default() += 1;
    }
}
