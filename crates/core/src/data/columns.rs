//! What is seen of columns while files are read: those that nothing reads, and those that are to be renamed.

use crate::data::record::unused;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::sync::{PoisonError, RwLock};

/// Names that are kept of a file: the first in order. A file may have another column in every row.
const MOST_NAMES: usize = 100;

/// Names that many threads see.
#[derive(Debug, Default)]
struct Names(RwLock<BTreeSet<String>>);

impl Names {
    fn with<R>(&self, look: impl FnOnce(&BTreeSet<String>) -> R) -> R {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change<R>(&self, change: impl FnOnce(&mut BTreeSet<String>) -> R) -> R {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }
}

#[derive(Debug, Default)]
pub(super) struct Columns {
    unused: Names,
    missing: Names,
}

impl Columns {
    /// Nothing is read yet; columns of these names are to be renamed.
    pub(super) fn new<'a>(to_rename: impl Iterator<Item = &'a String>) -> Self {
        Self {
            unused: Names::default(),
            missing: Names(RwLock::new(to_rename.cloned().collect())),
        }
    }

    /// Takes note of the columns that a row of a file has.
    pub(super) fn see(&self, row: &Map<String, Value>) {
        let is_missing = |names: &BTreeSet<String>| names.iter().any(|name| row.contains_key(name));
        if self.missing.with(is_missing) {
            self.missing
                .change(|names| names.retain(|name| !row.contains_key(name)));
        }
    }

    /// Takes note of what nothing reads of a row whose columns have their names.
    pub(super) fn see_unused(&self, row: &Map<String, Value>, text_field: &str) {
        let mut new = unused(row, text_field);
        self.unused
            .with(|known| new.retain(|name| !known.contains(name)));
        if new.is_empty() {
            return;
        }
        self.unused.change(|names| {
            names.extend(new);
            while names.len() > MOST_NAMES {
                names.pop_last();
            }
        });
    }

    /// Takes note of a column that is left out by a key.
    pub(super) fn see_left_out(&self, name: &str) {
        if self.unused.with(|names| !names.contains(name)) {
            self.unused.change(|names| names.insert(name.to_owned()));
        }
    }

    /// The columns that nothing read since this was asked last.
    pub(super) fn take_unused(&self) -> BTreeSet<String> {
        self.unused.change(std::mem::take)
    }

    /// The columns that are to be renamed and that no row had.
    pub(super) fn missing(&self) -> BTreeSet<String> {
        self.missing.with(BTreeSet::clone)
    }
}
