//! Refuses a case that holds less, or other things, than its case.json says: what is not compared
//! must not pass.

use super::case::Case;
use ferrotune_core::io::SafetensorsFile;
use ferrotune_core::params::ParamLayout;
use ferrotune_core::{Error, Result};
use serde_json::Value;

/// Of a model: every gradient that the case says it recorded, and nothing unknown.
pub(super) fn arch(case: &Case, expected: &SafetensorsFile, params: &ParamLayout) -> Result<()> {
    known(
        expected,
        &["logits", "loss", "logits_fp32", "loss_fp32"],
        &["hidden.", "grad.", "gradnorm.", "grad_fp32."],
    )?;
    let says = case
        .json
        .get("grads")
        .and_then(Value::as_str)
        .unwrap_or("all; gradnorm");
    let prefixes: &[&str] = match (says.starts_with("all"), says.contains("gradnorm")) {
        (true, true) => &["grad.", "gradnorm."],
        (true, false) => &["grad."],
        (false, _) => &["gradnorm."],
    };
    for prefix in prefixes {
        for (_, segment) in params.by_name() {
            require(expected, &format!("{prefix}{}", segment.spec.name))?;
        }
    }
    // A gap is a file that lost one. hidden.0 is the embedding itself and shows in all others.
    let last = expected
        .names()
        .filter_map(|n| n.strip_prefix("hidden.")?.parse::<usize>().ok())
        .max();
    (1..=last.unwrap_or(0)).try_for_each(|k| require(expected, &format!("hidden.{k}")))
}

/// Of the weights that merging changes, a case holds the first, the second and the last in full, the
/// norms of all, or all of them in full.
const MERGED_SAMPLES: usize = 3;

/// Of an adapter: the gradient of each of its parameters, and the merged weights.
pub(super) fn adapter(case: &Case, expected: &SafetensorsFile, params: &ParamLayout) -> Result<()> {
    known(
        expected,
        &["logits", "loss", "initial_logits"],
        &["grad.", "merged.", "merged_norm.", "residual."],
    )?;
    if case.json.get("init").is_some() {
        require(expected, "initial_logits")?;
        if !expected.names().any(|name| name.starts_with("residual.")) {
            let message = "no `residual.*` tensor; expected one at least";
            return Err(Error::data(expected.path(), None, message));
        }
    }
    let trained = params.by_name().filter(|(_, s)| s.spec.lr_scale > 0.0);
    for (_, segment) in trained {
        require(expected, &format!("grad.{}", segment.spec.name))?;
    }
    let changed = case
        .json
        .get("tensors_changed_by_merge")
        .and_then(Value::as_array);
    let changed: Vec<&str> = changed
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    for name in &changed {
        require(expected, &format!("merged_norm.{name}"))?;
    }
    let count = expected
        .names()
        .filter(|n| n.starts_with("merged."))
        .count();
    let sampled = count <= MERGED_SAMPLES;
    let merged = changed
        .iter()
        .enumerate()
        .filter(|(i, _)| !sampled || *i < MERGED_SAMPLES - 1 || i + 1 == changed.len());
    for (_, name) in merged {
        require(expected, &format!("merged.{name}"))?;
    }
    // What PEFT refuses to merge has none.
    if count > 0 || case.json.get("merge_refused").is_some() {
        return Ok(());
    }
    Err(Error::data(
        expected.path(),
        None,
        "no `merged.*` tensor; expected one at least",
    ))
}

/// Of a checkpoint in 4 or 8 bits: the quantities behind `prefix` and the gradient of each parameter, and of
/// 4 bits the values of a weight.
pub(super) fn quantised(
    expected: &SafetensorsFile,
    prefix: &str,
    params: &ParamLayout,
) -> Result<()> {
    known(
        expected,
        &[
            "logits",
            "loss",
            "qlora.logits",
            "qlora.loss",
            "lora8.logits",
            "lora8.loss",
        ],
        &["qlora.grad.", "lora8.grad.", "dequant."],
    )?;
    for (_, segment) in params.by_name() {
        require(expected, &format!("{prefix}grad.{}", segment.spec.name))?;
    }
    let of_int8 = |name: &str| name.starts_with("lora8.");
    if expected
        .names()
        .any(|name| name.starts_with("dequant.") || of_int8(name))
    {
        return Ok(());
    }
    Err(Error::data(
        expected.path(),
        None,
        "no `dequant.*` tensor; expected one at least",
    ))
}

fn require(expected: &SafetensorsFile, name: &str) -> Result<()> {
    if expected.meta(name).is_some() {
        return Ok(());
    }
    Err(Error::data(
        expected.path(),
        None,
        format!("`{name}` is missing, though the case should hold it"),
    ))
}

fn known(expected: &SafetensorsFile, names: &[&str], prefixes: &[&str]) -> Result<()> {
    let is_known =
        |name: &&str| names.contains(name) || prefixes.iter().any(|p| name.starts_with(p));
    match expected.names().find(|name| !is_known(name)) {
        None => Ok(()),
        Some(name) => Err(Error::data(
            expected.path(),
            None,
            format!("`{name}` is nothing that is compared here"),
        )),
    }
}
