//! `inspect adapter` and `inspect diff`.

use super::super::{Outcome, print_line, print_note};
use ferrotune::core::{ExitCode, Result};
use ferrotune::hub;
use ferrotune::lora::inspect::{self, AdapterDifference, AdapterFacts};
use ferrotune::lora::merge::{self, MergedTensor};
use serde_json::json;

#[derive(Debug, clap::Args)]
pub(super) struct AdapterArgs {
    /// Directory of the adapter, or its name on the hub: OWNER/NAME or OWNER/NAME@REVISION
    directory: String,
    /// Its base, a directory or a name on the hub: shows how much each weight changes, by any method
    #[arg(long)]
    base: Option<String>,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct DiffArgs {
    /// Directory of an adapter, or its name on the hub
    first: String,
    /// Of another
    second: String,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &AdapterArgs) -> Outcome {
    let directory = hub::adapter(&args.directory, "directory")?;
    let facts = inspect::adapter(&directory)?;
    let base = args
        .base
        .as_ref()
        .map(|base| hub::model(base, None, "base"));
    let base = base.transpose()?;
    let changes = base.map(|base| merge::changes(&base, &directory));
    let changes = changes.transpose()?;
    if args.json {
        print_line(adapter_json(&facts, changes.as_deref()))?;
        return Ok(ExitCode::Done);
    }
    print_adapter(&facts)?;
    match &changes {
        Some(changes) => print_changes(changes)?,
        None if facts.updates.is_empty() => {
            print_note("--base DIRECTORY shows how much each weight of the base changes");
        }
        None => {}
    }
    Ok(ExitCode::Done)
}

pub(super) fn diff(args: &DiffArgs) -> Outcome {
    let (first, second) = (
        hub::adapter(&args.first, "first")?,
        hub::adapter(&args.second, "second")?,
    );
    let found = inspect::difference(&first, &second)?;
    if args.json {
        let config = found.config.iter();
        let config = config.map(|(key, a, b)| json!({"key": key, "first": a, "second": b}));
        let relative = found.relative.iter();
        let relative = relative.map(|(name, r)| json!({"name": name, "relative_difference": r}));
        print_line(json!({
            "config": config.collect::<Vec<_>>(),
            "differences": relative.collect::<Vec<_>>(),
            "only_first": found.only_first,
            "only_second": found.only_second,
        }))?;
    } else {
        print_difference(&found)?;
    }
    Ok(ExitCode::Done)
}

/// How much each tensor of the base changes.
fn print_changes(changes: &[MergedTensor]) -> Result<()> {
    let width = changes.iter().map(|c| c.name.len()).max().unwrap_or(0);
    print_line(format_args!(
        "\n{:width$}  {:>10}  of its norm",
        "weight", "change"
    ))?;
    for MergedTensor {
        name,
        delta_norm,
        base_norm,
        ..
    } in changes
    {
        let share = 100.0 * delta_norm / base_norm.max(f64::MIN_POSITIVE);
        print_line(format_args!(
            "{name:width$}  {delta_norm:>10.4e}  {share:>9.3} %"
        ))?;
    }
    Ok(())
}

fn adapter_json(facts: &AdapterFacts, changes: Option<&[MergedTensor]>) -> serde_json::Value {
    let updates = facts.updates.iter().map(|u| {
        json!({
            "module": u.module, "rank": u.rank, "shape": u.shape, "scale": u.scale, "norm": u.norm,
            "effective_rank": u.effective_rank, "magnitudes": u.magnitudes, "not_finite": u.not_finite,
        })
    });
    let tensors = facts.tensors.iter().map(
        |t| json!({"name": t.name, "shape": t.shape, "norm": t.norm, "not_finite": t.not_finite}),
    );
    json!({
        "peft_type": facts.peft_type,
        "config": facts.config,
        "values": facts.values,
        "bytes": facts.bytes,
        "updates": updates.collect::<Vec<_>>(),
        "tensors": tensors.collect::<Vec<_>>(),
        "changes": changes.map(|changes| {
            let each = changes.iter().map(|c| {
                json!({"name": c.name, "norm": c.delta_norm, "base_norm": c.base_norm})
            });
            each.collect::<Vec<_>>()
        }),
    })
}

fn print_adapter(facts: &AdapterFacts) -> Result<()> {
    let base = facts.config.get("base_model_name_or_path");
    let base = base
        .and_then(|b| b.as_str())
        .unwrap_or("a base that it does not name");
    print_line(format_args!(
        "{} of {base}: {} updates, {} other tensors, {} values, {:.1} MB",
        facts.peft_type,
        facts.updates.len(),
        facts.tensors.len(),
        facts.values,
        facts.bytes as f64 / 1e6
    ))?;
    let names = facts.updates.iter().map(|u| u.module.len());
    let names = names.chain(facts.tensors.iter().map(|t| t.name.len()));
    let width = names.max().unwrap_or(0).max("module".len());
    if !facts.updates.is_empty() {
        print_line(format_args!(
            "\n{:width$}  {:>13}  rank  effective  {:>8}  {:>10}",
            "module", "shape", "scale", "norm"
        ))?;
    }
    for u in &facts.updates {
        let shape = format!("{} x {}", u.shape[0], u.shape[1]);
        print_line(format_args!(
            "{:width$}  {shape:>13}  {:>4}  {:>9.2}  {:>8.4}  {:>10.4e}",
            u.module, u.rank, u.effective_rank, u.scale, u.norm
        ))?;
        if let Some([low, high]) = u.magnitudes {
            print_line(format_args!(
                "{:width$}  row norms {low:.4} to {high:.4}",
                ""
            ))?;
        }
    }
    if !facts.tensors.is_empty() {
        print_line(format_args!(
            "\n{:width$}  {:>13}  {:>10}",
            "tensor", "shape", "norm"
        ))?;
    }
    for t in &facts.tensors {
        let shape: Vec<String> = t.shape.iter().map(ToString::to_string).collect();
        let shape = shape.join(" x ");
        print_line(format_args!(
            "{:width$}  {shape:>13}  {:>10.4e}",
            t.name, t.norm
        ))?;
    }
    let bad = facts.updates.iter().map(|u| (&u.module, u.not_finite));
    let bad = bad.chain(facts.tensors.iter().map(|t| (&t.name, t.not_finite)));
    for (name, count) in bad.filter(|(_, count)| *count > 0) {
        print_note(&format!(
            "{name} holds {count} values that are NaN or infinite"
        ));
    }
    Ok(())
}

fn print_difference(found: &AdapterDifference) -> Result<()> {
    for (key, a, b) in &found.config {
        print_line(format_args!("{key}: {a} | {b}"))?;
    }
    for (whose, names) in [("first", &found.only_first), ("second", &found.only_second)] {
        for name in names {
            print_line(format_args!("only in the {whose}: {name}"))?;
        }
    }
    let width = found.relative.iter().map(|(name, _)| name.len()).max();
    let width = width.unwrap_or(0);
    for (name, relative) in &found.relative {
        match relative {
            Some(r) => print_line(format_args!("{name:width$}  {r:.3e}"))?,
            None => print_line(format_args!("{name:width$}  of another shape"))?,
        }
    }
    let worst = found.relative.iter().filter_map(|(_, r)| *r);
    let worst = worst.fold(0.0, |a: f64, b| if b.is_nan() || b > a { b } else { a });
    print_line(format_args!(
        "{} keys differ, {} modules and tensors are in one alone, the others differ by at most {worst:.3e}",
        found.config.len(),
        found.only_first.len() + found.only_second.len()
    ))
}
