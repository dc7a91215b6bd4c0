use super::case::{Case, read_json};
use super::compare::Comparison;
use ferrotune_core::lr_schedule::{LrSchedule, PlateauSchedule};
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Largest relative error of a learning rate.
const TOLERANCE: f64 = 1e-6;

pub(super) fn compare(case: &Case) -> Result<Comparison> {
    let path = case.path("schedules.json");
    let json = read_json(&path)?;
    let Some(rows) = json.as_array() else {
        return Err(Error::data(&path, None, "expected a list of schedules"));
    };
    let mut comparison = Comparison::default();
    for row in rows {
        let row = row
            .as_object()
            .ok_or_else(|| Error::data(&path, None, "expected objects"))?;
        let name = row.get("name").and_then(Value::as_str).unwrap_or_default();
        let label = format!("{name} {}", row.get("kwargs").unwrap_or(&Value::Null));
        let (expected, ours) = if row.contains_key("metrics") {
            (numbers(row, "lr_after_metric"), plateau(row)?)
        } else {
            let expected = numbers(row, "lr");
            let ours = plain(name, row, expected.len())?;
            (expected, ours)
        };
        let error = if expected.is_empty() || ours.len() != expected.len() {
            f64::INFINITY
        } else {
            ours.iter()
                .zip(&expected)
                .map(|(a, b)| (a - b).abs() / b.abs().max(1e-12))
                .fold(0.0, f64::max)
        };
        comparison.error("lr", &label, error, TOLERANCE);
    }
    Ok(comparison)
}

fn numbers(row: &Map<String, Value>, key: &str) -> Vec<f64> {
    row.get(key)
        .and_then(Value::as_array)
        .map(|a| a.iter().filter_map(Value::as_f64).collect())
        .unwrap_or_default()
}

fn kwargs(row: &Map<String, Value>) -> BTreeMap<String, Value> {
    let map = row.get("kwargs").and_then(Value::as_object);
    map.map(|m| m.iter().map(|(k, v)| (k.clone(), v.clone())).collect())
        .unwrap_or_default()
}

fn plain(name: &str, row: &Map<String, Value>, steps: usize) -> Result<Vec<f64>> {
    let integer = |key: &str| row.get(key).and_then(Value::as_u64).unwrap_or(0);
    let base_lr = row.get("base_lr").and_then(Value::as_f64).unwrap_or(0.0);
    let schedule = LrSchedule::new(
        name,
        &kwargs(row),
        base_lr,
        integer("warmup"),
        integer("total"),
    )?;
    Ok((0..steps as u64).map(|step| schedule.lr(step)).collect())
}

fn plateau(row: &Map<String, Value>) -> Result<Vec<f64>> {
    let base_lr = row.get("base_lr").and_then(Value::as_f64).unwrap_or(0.0);
    let mut schedule = PlateauSchedule::new(&kwargs(row), base_lr)?;
    Ok(numbers(row, "metrics")
        .into_iter()
        .map(|metric| schedule.step(metric))
        .collect())
}
