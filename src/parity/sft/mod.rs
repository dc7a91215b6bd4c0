//! Data preparation: what a tokenizer, a chat template, a packing and the whole of it make of rows.
//!
//! Everything is compared exactly: the error of an item is 0, or infinite.

mod date;
mod packing;
mod prepare;
mod templates;
mod tokenizer;

pub(super) use packing::compare as packing;
pub(super) use prepare::compare as prepare;
pub(super) use templates::compare as templates;
pub(super) use tokenizer::compare as tokenizer;

use super::case::{Case, read_json};
use ferrotune_core::data::{Example, IGNORE_INDEX, PackedBatch, Tokenizer};
use ferrotune_core::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// A list of a recorded file.
fn list(path: &Path) -> Result<Vec<Value>> {
    match read_json(path)? {
        Value::Array(items) if !items.is_empty() => Ok(items),
        _ => Err(Error::data(path, None, "expected a list that is not empty")),
    }
}

fn text<'a>(item: &'a Value, key: &str) -> Option<&'a str> {
    item.get(key).and_then(Value::as_str)
}

/// A recorded list of integers.
fn integers(value: &Value) -> Vec<i64> {
    let items = value.as_array().into_iter().flatten();
    items.map(|v| v.as_i64().unwrap_or(i64::MIN)).collect()
}

/// The tokenizer that a case names, relative to a folder above the case.
fn named_tokenizer(case: &Case, path: &Path, name: Option<&str>) -> Result<Tokenizer> {
    let name = name.ok_or_else(|| Error::data(path, None, "no `tokenizer` is named"))?;
    Tokenizer::from_dir(&case.above(name, "tokenizer.json")?)
}

/// The two shapes that recorded batches of two rows have: one without padding, and a padded one.
///
/// Ours are never padded: they are compared with what the mask of a padded one keeps.
fn matches_collated(rows: &[Example], recorded: &Value) -> bool {
    let flat = |key: &str| -> Option<Vec<i64>> {
        let rows = recorded.get(key)?.as_array()?;
        Some(rows.iter().flat_map(integers).collect())
    };
    let batch = PackedBatch::pack((0..).zip(rows));
    let mut labels: Vec<i64> = batch.labels.iter().map(|&l| i64::from(l)).collect();
    let ids: Vec<i64> = batch.input_ids.iter().map(|&i| i64::from(i)).collect();
    let positions: Vec<i64> = batch.position_ids.iter().map(|&i| i64::from(i)).collect();
    let (Some(their_ids), Some(their_labels)) = (flat("input_ids"), flat("labels")) else {
        return false;
    };
    if let Some(their_positions) = flat("position_ids") {
        // The first token of a document has a label here and is never predicted; theirs has none.
        for (label, position) in labels.iter_mut().zip(&positions) {
            if *position == 0 {
                *label = i64::from(IGNORE_INDEX);
            }
        }
        return (ids, labels, positions) == (their_ids, their_labels, their_positions);
    }
    let Some(mask) = flat("attention_mask") else {
        return false;
    };
    let kept = |values: Vec<i64>| -> Vec<i64> {
        let pairs = values.into_iter().zip(&mask);
        pairs
            .filter(|(_, keep)| **keep == 1)
            .map(|(v, _)| v)
            .collect()
    };
    let padding_is_ignored =
        (their_labels.iter().zip(&mask)).all(|(label, keep)| *keep == 1 || *label == -100);
    (ids, labels) == (kept(their_ids), kept(their_labels)) && padding_is_ignored
}
