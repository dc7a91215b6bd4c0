//! `rank_pattern`: for each module a list that says which of its `init_r` ranks the files hold.

use crate::files::{CONFIG_FILE, Part};
use crate::method::{Keys, Target, tensor_name};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const KEY: &str = "rank_pattern";
/// What names end with, and the axis of the rank.
const AXES: [(&str, usize); 3] = [("lora_A", 0), ("lora_B", 1), ("lora_E", 0)];

/// Clears what belongs to singular values that are zero, unless all of them are: nothing was trained then.
pub(super) fn clear(targets: &[Target], params: &mut FlatBuffer) {
    let values = |target: &Target| params.get(target.ids[2]).to_vec();
    let values: Vec<Vec<f32>> = targets.iter().map(values).collect();
    if values.iter().flatten().all(|&e| e == 0.0) {
        return;
    }
    for (target, values) in targets.iter().zip(values) {
        let (rank, inputs) = (values.len(), target.site.in_features);
        for i in (0..rank).filter(|&i| values[i] == 0.0) {
            params.get_mut(target.ids[0])[i * inputs..(i + 1) * inputs].fill(0.0);
            let column = params
                .get_mut(target.ids[1])
                .iter_mut()
                .skip(i)
                .step_by(rank);
            column.for_each(|b| *b = 0.0);
        }
    }
}

/// The tensors of which a part is zero in A, B and E alike, if there are any.
pub(super) fn parts(targets: &[Target], params: &FlatBuffer) -> BTreeMap<String, Part> {
    let kept = |target: &Target| -> Vec<bool> {
        let [a, b, e] = [0, 1, 2].map(|i| params.get(target.ids[i]));
        let (rank, inputs) = (e.len(), target.site.in_features);
        let is_zero = |i: usize| {
            let row = &a[i * inputs..(i + 1) * inputs];
            let column = b.iter().skip(i).step_by(rank);
            row.iter().chain(column).chain([&e[i]]).all(|&v| v == 0.0)
        };
        (0..rank).map(|i| !is_zero(i)).collect()
    };
    let kept: Vec<Vec<bool>> = targets.iter().map(kept).collect();
    if kept.iter().flatten().all(|kept| *kept) {
        return BTreeMap::new();
    }
    let modules = targets.iter().zip(kept);
    modules
        .flat_map(|(target, kept)| of_module(&target.site.name, &kept))
        .collect()
}

fn of_module(module: &str, kept: &[bool]) -> Vec<(String, Part)> {
    let part = |(ending, axis): (&str, usize)| {
        let kept = kept.to_vec();
        (tensor_name(module, ending), Part { axis, kept })
    };
    AXES.into_iter().map(part).collect()
}

/// Writes the pattern, under the names of E without what PEFT puts before them.
pub(super) fn write(parts: &BTreeMap<String, Part>, keys: &mut Map<String, Value>) {
    let prefix = tensor_name("", "");
    let prefix = prefix.trim_end_matches('.');
    let entries = parts.iter().filter(|(name, _)| name.ends_with("lora_E"));
    let entries = entries.map(|(name, part)| {
        let name = name.trim_start_matches(prefix).trim_start_matches('.');
        (name.to_owned(), json!(part.kept))
    });
    let pattern: Map<String, Value> = entries.collect();
    let value = if pattern.is_empty() {
        Value::Null
    } else {
        Value::Object(pattern)
    };
    keys.insert(KEY.into(), value);
}

/// Refuses a pattern that says nothing about `init_r` ranks.
pub(super) fn check(keys: &mut Keys<'_>, init_r: usize) -> Result<()> {
    let Some(value) = keys.get(KEY) else {
        return Ok(());
    };
    if keys.directory().is_none() {
        let message = "is what training finds out; leave it out";
        return Err(keys.error(KEY, message));
    }
    match lists(value, init_r) {
        Ok(_) => Ok(()),
        Err(message) => Err(keys.error(KEY, message)),
    }
}

/// The parts that the files in `directory` hold.
pub(super) fn read(directory: &Path, init_r: usize) -> Result<BTreeMap<String, Part>> {
    let path = directory.join(CONFIG_FILE);
    let text = std::fs::read(&path).map_err(Error::read(&path))?;
    let config: Value = serde_json::from_slice(&text)
        .map_err(|e| Error::adapter(&path, format!("is no valid JSON: {e}")))?;
    let lists = lists(&config[KEY], init_r)
        .map_err(|message| Error::adapter(&path, format!("`{KEY}` {message}")))?;
    let modules = lists.into_iter();
    Ok(modules
        .flat_map(|(module, kept)| of_module(&module, &kept))
        .collect())
}

/// Modules with their lists.
fn lists(value: &Value, init_r: usize) -> std::result::Result<Vec<(String, Vec<bool>)>, String> {
    let Value::Object(entries) = value else {
        return match value {
            Value::Null => Ok(Vec::new()),
            other => Err(format!("is {other}, expected an object")),
        };
    };
    let list = |(name, value): (&String, &Value)| {
        let flags = value.as_array().into_iter().flatten();
        let flags: Option<Vec<bool>> = flags.map(Value::as_bool).collect();
        let flags = flags.filter(|flags| flags.len() == init_r);
        let flags = flags.ok_or_else(|| {
            format!("has {value} at \"{name}\", expected a list of {init_r} (init_r) true or false")
        })?;
        // PEFT writes the adapter's name into it while the adapter is in memory.
        let name = name
            .trim_end_matches(".default")
            .trim_end_matches(".lora_E");
        Ok((name.to_owned(), flags))
    };
    entries.iter().map(list).collect()
}
