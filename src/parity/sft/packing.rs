use super::{list, matches_collated, text};
use crate::parity::case::Case;
use crate::parity::compare::Comparison;
use ferrotune_core::data::{Example, Examples, IGNORE_INDEX, PackedBatch, pack_bfd};
use ferrotune_core::{Error, Result};
use serde_json::{Value, json};

/// Which documents share a row, and two such rows as a batch.
pub(in crate::parity) fn compare(case: &Case) -> Result<Comparison> {
    let path = case.path("packing.json");
    let mut comparison = Comparison::default();
    for (i, case) in list(&path)?.iter().enumerate() {
        let strategy = text(case, "strategy").unwrap_or_default();
        let name = format!("{i} {} {strategy}", text(case, "name").unwrap_or_default());
        let rows = pack(case, strategy).map_err(|message| Error::data(&path, None, message))?;
        let joined: Vec<PackedBatch> = rows
            .iter()
            .map(|row| PackedBatch::pack((0..).zip(row)))
            .collect();
        let ids: Vec<_> = joined.iter().map(|row| &row.input_ids).collect();
        let labels: Vec<_> = joined.iter().map(|row| &row.labels).collect();
        comparison.exact("input_ids", &name, json!(ids) == case["input_ids"]);
        if let Some(theirs) = case.get("labels") {
            comparison.exact("labels", &name, json!(labels) == *theirs);
        }
        if let Some(theirs) = case.get("seq_lengths").filter(|v| !v.is_null()) {
            let lengths: Vec<Vec<usize>> = rows
                .iter()
                .map(|row| row.iter().map(Example::len).collect())
                .collect();
            comparison.exact("seq_lengths", &name, json!(lengths) == *theirs);
        }
        if let Some(theirs) = case.get("collated_padding_free_first2") {
            let first: Vec<Example> = rows.iter().take(2).flatten().cloned().collect();
            comparison.exact("batch", &name, matches_collated(&first, theirs));
        }
        if let Some(theirs) = case.get("collated_padded_first2_mult8") {
            // A padded row is one document.
            let whole = |batch: &PackedBatch| Example {
                input_ids: batch.input_ids.clone(),
                labels: batch.labels.clone(),
            };
            let first: Vec<Example> = joined.iter().take(2).map(whole).collect();
            comparison.exact("padded batch", &name, matches_collated(&first, theirs));
        }
    }
    Ok(comparison)
}

/// The documents of each row. Their ids count on from one document to the next.
fn pack(case: &Value, strategy: &str) -> Result<Vec<Vec<Example>>, String> {
    let lengths: Vec<usize> = serde_json::from_value(case["lengths"].clone())
        .map_err(|e| format!("`lengths` must be a list of numbers: {e}"))?;
    let max_length = case["seq_length"].as_u64().unwrap_or(0) as usize;
    if max_length == 0 {
        return Err("`seq_length` must be a positive number".into());
    }
    let mut next = 0;
    let counted = lengths.into_iter().map(|length| {
        let input_ids: Vec<u32> = (next..).take(length).collect();
        next += length as u32;
        let mut labels: Vec<i32> = input_ids.iter().map(|&id| id as i32).collect();
        if let Some(first) = labels.first_mut() {
            *first = IGNORE_INDEX;
        }
        Example { input_ids, labels }
    });
    let documents: Vec<Example> = match strategy {
        "bfd" => counted
            .map(|mut e| {
                e.input_ids.truncate(max_length);
                e.labels.truncate(max_length);
                e
            })
            .collect(),
        "bfd_split" => {
            let split = counted.collect::<Examples>().split_long(max_length);
            split.and_then(|e| e.to_vec()).map_err(|e| e.to_string())?
        }
        "wrapped" => {
            let blocks = counted.collect::<Examples>().wrap(max_length);
            let blocks = blocks.and_then(|e| e.to_vec()).map_err(|e| e.to_string())?;
            return Ok(blocks.into_iter().map(|block| vec![block]).collect());
        }
        other => return Err(format!("`{other}` is no packing strategy known here")),
    };
    let lengths: Vec<usize> = documents.iter().map(Example::len).collect();
    let bins = pack_bfd(&lengths, max_length);
    let row = |bin: Vec<usize>| bin.into_iter().map(|i| documents[i].clone()).collect();
    Ok(bins.into_iter().map(row).collect())
}
