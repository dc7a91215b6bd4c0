use super::{list, matches_collated, text};
use crate::parity::case::Case;
use crate::parity::compare::Comparison;
use crate::recipe::{eval_batches, prepare_rows};
use ferrotune_core::config::TrainConfig;
use ferrotune_core::data::{Example, PackedBatch, Record};
use ferrotune_core::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

/// Rows that went through the preparation of a run: config, template, masks, cuts, packing.
pub(in crate::parity) fn compare(case: &Case) -> Result<Comparison> {
    let path = case.path("prepare.json");
    let mut comparison = Comparison::default();
    for item in list(&path)? {
        let name = text(&item, "name").unwrap_or_default();
        let lines = prepare(case, &path, &item)?;
        let ids: Vec<_> = lines.iter().map(|line| &line.input_ids).collect();
        let labels: Vec<_> = lines.iter().map(|line| &line.labels).collect();
        let column = |key: &str| -> Value {
            let rows = item["prepared"].as_array().into_iter().flatten();
            rows.map(|row| row[key].clone()).collect()
        };
        comparison.exact("input_ids", name, json!(ids) == column("input_ids"));
        comparison.exact("labels", name, json!(labels) == column("labels"));
        if let Some(theirs) = item.get("collated_first2") {
            let first: Vec<Example> = lines.iter().take(2).flat_map(documents).collect();
            comparison.exact("batch", name, matches_collated(&first, theirs));
        }
    }
    Ok(comparison)
}

/// The rows, or blocks of packed rows, in the order in which a run has them.
fn prepare(case: &Case, path: &Path, item: &Value) -> Result<Vec<PackedBatch>> {
    let settings = item.get("config").map_or("{}".into(), Value::to_string);
    // Evaluation reads rows in their order, one line at a time. No model is read.
    let fixed = [
        ("per_device_eval_batch_size", "1"),
        ("model_name_or_path", "none"),
        ("dataset_name", "rows.jsonl"),
    ];
    let fixed = fixed.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let config = TrainConfig::from_yaml(&settings, &path.display().to_string(), &fixed)?;
    let mut tokenizer = super::named_tokenizer(case, path, text(item, "tokenizer"))?;
    if let Some(template) = text(item, "chat_template") {
        tokenizer.set_chat_template(template)?;
    }
    let field = &config.data.dataset_text_field;
    let examples = item["examples"].as_array().into_iter().flatten();
    let records: Result<Vec<Record>, String> = examples
        .map(|row| {
            let mut row = row.as_object().cloned().unwrap_or_default();
            Record::leaves_mask_out(&mut row, config.data.completion_only_loss);
            Record::from_row(&row, field)
        })
        .collect();
    let records = records.map_err(|message| Error::data(path, None, message))?;
    let dataset = prepare_rows(&config, &tokenizer, records)?;
    eval_batches(&config, &dataset)
}

/// The documents of a line.
fn documents(line: &PackedBatch) -> Vec<Example> {
    let bounds = line.cu_seqlens.windows(2);
    bounds
        .map(|b| Example {
            input_ids: line.input_ids[b[0] as usize..b[1] as usize].to_vec(),
            labels: line.labels[b[0] as usize..b[1] as usize].to_vec(),
        })
        .collect()
}
