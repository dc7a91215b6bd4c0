//! `adapters`: several runs over one base, in one file.
//!
//! Each entry of the list is a run of its own: the keys around the list, with the entry's in their place, and
//! an output directory below theirs that has the entry's name.

use super::parse::{self, Entry};
use super::{Origin, TrainConfig, read_text, wrong_value};
use crate::suggest::did_you_mean;
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// The list.
pub(super) const KEY: &str = "adapters";
/// What an entry is called.
const NAME: &str = "name";
/// Longest name, in bytes: a directory has it.
const LONGEST: usize = 120;
/// Most adapters of one run.
const MOST: usize = 256;

/// Keys beside those of the model and the machine that hold for all adapters of a run.
const SHARED: [&str; 4] = [
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "output_dir",
    "use_peft",
];
/// Keys of the machine that an adapter may have for itself.
const OWN: [&str; 2] = ["data_seed", "seed"];

/// A run among others over the same base.
#[derive(Clone, Debug)]
pub struct NamedConfig {
    /// What the others do not have: the last part of its output directory.
    pub name: String,
    /// The run.
    pub config: TrainConfig,
}

/// What a configuration asks for.
#[derive(Clone, Debug)]
pub enum Runs {
    /// A run.
    One(Box<TrainConfig>),
    /// Several over one base, at least one.
    Several(Vec<NamedConfig>),
}

/// A key, and the values that a sweep gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axis {
    /// The key.
    pub key: String,
    /// As on a command line.
    pub values: Vec<String>,
}

/// [`super::load`] for a file that may have `adapters`, and for a sweep: one run for each way to choose a value
/// of every axis, times the entries of `adapters`.
///
/// Of two places that set a key, the later one holds: the file, an entry of `adapters`, `overrides`, the sweep.
///
/// # Errors
/// As there, and naming the entry: for one that has no name, a name twice or one that is no name of a directory,
/// and for keys that all adapters of a run share.
pub fn load_runs(path: &Path, overrides: &[(String, String)], sweep: &[Axis]) -> Result<Runs> {
    let name = path.display().to_string();
    runs(&read_text(path)?, &name, overrides, sweep)
}

/// [`load_runs`] of YAML text, called `name` in messages.
///
/// # Errors
/// As there.
pub fn runs(
    text: &str,
    name: &str,
    overrides: &[(String, String)],
    sweep: &[Axis],
) -> Result<Runs> {
    let mut entries = parse::entries(text, name)?;
    let list = entries.iter().position(|entry| entry.key == KEY);
    let Some(list) = list.map(|at| entries.remove(at)) else {
        if sweep.is_empty() {
            let config = TrainConfig::from_entries(entries, Vec::new(), overrides)?;
            return Ok(Runs::One(Box::new(config)));
        }
        let all = combinations(&entries, &[], String::new(), overrides, sweep)?;
        return finish(all);
    };
    let adapters = parse::adapters(text, name, &list.origin)?;
    if adapters.is_empty() {
        let message = format!(
            "is an empty list; expected at least one adapter ({})",
            list.origin
        );
        return Err(Error::config(KEY, message));
    }
    let mut all = Vec::new();
    for (number, mut own) in adapters.into_iter().enumerate() {
        let called = take_name(&mut own, number, &list.origin)?;
        for entry in &own {
            require_own(entry, &called)?;
        }
        let of = |error| in_entry(error, &called);
        let made = combinations(&entries, &own, called.clone(), overrides, sweep).map_err(of)?;
        all.extend(made);
    }
    finish(all)
}

/// One run for each choice of the values of `sweep`.
fn combinations(
    entries: &[Entry],
    own: &[Entry],
    name: String,
    overrides: &[(String, String)],
    sweep: &[Axis],
) -> Result<Vec<NamedConfig>> {
    let mut choices = vec![(name, overrides.to_vec())];
    for axis in sweep {
        require_own(&swept(axis), "--sweep")?;
        let mut longer = Vec::new();
        for (name, pairs) in &choices {
            for value in &axis.values {
                let between = if name.is_empty() { "" } else { "_" };
                let name = format!("{name}{between}{}={}", axis.key, in_a_name(value));
                let mut pairs = pairs.clone();
                pairs.push((axis.key.clone(), value.clone()));
                longer.push((name, pairs));
            }
        }
        choices = longer;
        if choices.len() > MOST {
            let message =
                format!("asks for more than {MOST} adapters in one run; take fewer values");
            return Err(Error::config("--sweep", message));
        }
    }
    let made = choices.into_iter().map(|(name, pairs)| {
        let config = TrainConfig::from_entries(entries.to_vec(), own.to_vec(), &pairs)?;
        Ok(NamedConfig { name, config })
    });
    made.collect()
}

fn swept(axis: &Axis) -> Entry {
    Entry {
        key: axis.key.clone(),
        value: Value::Null,
        origin: Origin::CommandLine,
    }
}

/// Moves each run into a directory of its own, and checks what they share.
fn finish(mut runs: Vec<NamedConfig>) -> Result<Runs> {
    if runs.len() > MOST {
        let message = format!(
            "has {} entries, and a run trains at most {MOST}",
            runs.len()
        );
        return Err(Error::config(KEY, message));
    }
    for (number, run) in runs.iter().enumerate() {
        require_name(&run.name)?;
        let same = |other: &&NamedConfig| other.name.eq_ignore_ascii_case(&run.name);
        if runs[..number].iter().any(|other| same(&other)) {
            let message = format!(
                "two adapters are called `{}`; each needs a name of its own",
                run.name
            );
            return Err(Error::config(KEY, message));
        }
    }
    for NamedConfig { name, config } in &mut runs {
        if !config.lora.use_peft {
            let message =
                "false trains the base itself, which all adapters of a run share; set it to true";
            return Err(Error::config("use_peft", message));
        }
        let directory = Path::new(&config.output.output_dir).join(&*name);
        config.output.output_dir = directory.display().to_string();
    }
    Ok(Runs::Several(runs))
}

/// The name of an entry, which is no key of its run.
fn take_name(own: &mut Vec<Entry>, number: usize, list: &Origin) -> Result<String> {
    let Some(at) = own.iter().position(|entry| entry.key == NAME) else {
        let message = format!(
            "entry {} has no `{NAME}`; expected one, such as `{NAME}: first`, for its output directory ({list})",
            number + 1
        );
        return Err(Error::config(KEY, message));
    };
    let entry = own.remove(at);
    match &entry.value {
        Value::String(name) => Ok(name.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => Err(wrong_value(NAME, other, "a text", &entry.origin)),
    }
}

/// What stands for a value in the name of a directory.
fn in_a_name(value: &str) -> String {
    let kept = |c: char| if is_plain(c) { c } else { '-' };
    value.chars().map(kept).collect()
}

fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || "._-=+".contains(c)
}

fn require_name(name: &str) -> Result<()> {
    let fits = !name.is_empty() && name.len() <= LONGEST && !name.starts_with('.');
    if fits && name.chars().all(is_plain) && !name.starts_with("checkpoint-") {
        return Ok(());
    }
    let message = format!(
        "`{name}` cannot be the name of an adapter: expected letters, digits and any of `._-=+`, no dot first, at most \
         {LONGEST} characters, and not `checkpoint-...`"
    );
    Err(Error::config(KEY, message))
}

/// Refuses keys that hold for all adapters of a run.
fn require_own(entry: &Entry, called: &str) -> Result<()> {
    let keys = TrainConfig::keys();
    let name = super::unaliased(&entry.key).replace('-', "_");
    let Some(key) = keys.iter().find(|key| key.name == name) else {
        if super::foreign::find(&name).is_some() {
            return Ok(());
        }
        let hint = did_you_mean(&name, keys.iter().map(|key| key.name).chain([NAME]));
        let message = format!("unknown key in `{called}` ({}){hint}", entry.origin);
        return Err(Error::config(&entry.key, message));
    };
    let of_all = ["model", "runtime"].contains(&key.section) && !OWN.contains(&key.name);
    if !of_all && !SHARED.contains(&key.name) {
        return Ok(());
    }
    let message = format!(
        "is the same for all adapters of a run, and `{called}` sets it ({}); set it beside `{KEY}`",
        entry.origin
    );
    Err(Error::config(key.name, message))
}

fn in_entry(error: Error, called: &str) -> Error {
    match error {
        Error::Config { key, message } => {
            Error::config(key, format!("{message} (of adapter `{called}`)"))
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "model_name_or_path: base\ntrain_file: a.jsonl\nuse_peft: true\noutput_dir: out\nlora_r: 4\n";

    fn several(more: &str, sweep: &[(&str, &[&str])]) -> Result<Vec<NamedConfig>> {
        let text = format!("{BASE}{more}");
        let axis = |(key, values): &(&str, &[&str])| Axis {
            key: (*key).into(),
            values: values.iter().map(|&value| value.into()).collect(),
        };
        let sweep: Vec<Axis> = sweep.iter().map(axis).collect();
        let overrides = [("max_steps".to_owned(), "7".to_owned())];
        match runs(&text, "c.yaml", &overrides, &sweep)? {
            Runs::Several(runs) => Ok(runs),
            Runs::One(_) => panic!("one run"),
        }
    }

    #[test]
    fn an_entry_stands_over_the_file_and_below_the_command_line() {
        let runs = several(
            "adapters:\n- {name: a, lora_r: 8, max_steps: 3}\n- {name: b, seed: 5}\n",
            &[],
        );
        let runs = runs.expect("two adapters");
        let seen: Vec<_> = (runs.iter())
            .map(|r| (r.name.as_str(), r.config.lora.lora_r, r.config.runtime.seed))
            .collect();
        assert_eq!(seen, [("a", 8, 42), ("b", 4, 5)]);
        assert!(runs.iter().all(|r| r.config.schedule.max_steps == 7));
        assert_eq!(runs[1].config.output.output_dir, "out/b");
    }

    #[test]
    fn a_sweep_is_every_choice_of_its_values() {
        let rates: &[&str] = &["1e-4", "2e-4"];
        let runs = several("", &[("lora_r", &["8", "16"]), ("learning_rate", rates)]);
        let runs = runs.expect("four adapters");
        let names: Vec<_> = runs.iter().map(|run| run.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "lora_r=8_learning_rate=1e-4",
                "lora_r=8_learning_rate=2e-4",
                "lora_r=16_learning_rate=1e-4",
                "lora_r=16_learning_rate=2e-4",
            ]
        );
        assert_eq!(runs[3].config.lora.lora_r, 16);
        let runs = several(
            "adapters: [{name: a}, {name: b}]\n",
            &[("seed", &["1", "2"])],
        );
        assert_eq!(runs.expect("four adapters")[2].name, "b_seed=1");
    }

    #[test]
    fn mistakes_name_the_entry() {
        for (more, parts) in [
            ("adapters: 3\n", ["adapters", "a list of mappings"]),
            ("adapters: []\n", ["adapters", "at least one"]),
            (
                "adapters: [{lora_r: 3}]\n",
                ["entry 1 has no `name`", "c.yaml:6"],
            ),
            (
                "adapters: [{name: a}, {name: A}]\n",
                ["two adapters", "`A`"],
            ),
            ("adapters: [{name: ../a}]\n", ["`../a`", "letters"]),
            (
                "adapters: [{name: a, dtype: float32}]\n",
                ["`dtype`", "beside `adapters`"],
            ),
            (
                "adapters: [{name: a, lorar: 3}]\n",
                ["`lorar`", "did you mean `lora_r`"],
            ),
            ("adapters: [{name: a, lora_r: x}]\n", ["`lora_r`", "`a`"]),
            (
                "adapters:\n- name: a\n  output_dir: b\n",
                ["`output_dir`", "c.yaml:8"],
            ),
        ] {
            let error = several(more, &[]).expect_err("refused").to_string();
            assert!(
                parts.iter().all(|part| error.contains(part)),
                "{more}: {error}"
            );
        }
        let error = several("", &[("bf16", &["true"])]).expect_err("refused");
        assert!(error.to_string().contains("--sweep"), "{error}");
        let error = TrainConfig::from_yaml("adapters: [{name: a}]\n", "c.yaml", &[]);
        let error = error.expect_err("refused").to_string();
        assert!(error.contains("one adapter"), "{error}");
    }
}
