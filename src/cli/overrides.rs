//! `--key value` pairs after a config file: any configuration key, as on TRL's command line.

use super::Failure;
use ferrotune::core::config::{Arity, TrainConfig};
use serde_json::json;
use std::ffi::OsString;

/// What the help of a command with overrides ends with.
pub(super) const HELP: &str = "\
Every key of a config file can be given here, as --KEY VALUE, --KEY=VALUE, --KEY V1 V2 for a list,
or a bare --KEY for true. All keys: `ferrotune config-schema --markdown`.";

/// Flags that are not configuration keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Switches {
    /// Show the plan and stop.
    pub(super) dry_run: bool,
    /// JSON lines even on a terminal.
    pub(super) json: bool,
}

impl Switches {
    /// The switch called `key`.
    fn named(&mut self, key: &str) -> Option<&mut bool> {
        match key {
            "dry_run" => Some(&mut self.dry_run),
            "json" => Some(&mut self.json),
            _ => None,
        }
    }
}

/// Whether help is asked for, which is the answer to any command line it is in.
pub(super) fn ask_for_help(words: &[String]) -> bool {
    words.iter().any(|w| ["-h", "--help"].contains(&w.as_str()))
}

/// A command line as clap reads it. Keys and switches of a command with a CONFIG may stand before that, and stay as the
/// user spells them.
pub(super) fn in_order(words: Vec<OsString>) -> Vec<OsString> {
    match config_place(&words) {
        Some(first) => behind_config(words, first),
        None => words.into_iter().map(super::either_spelling).collect(),
    }
}

/// Where CONFIG is expected in the line of a command that has one.
fn config_place(words: &[OsString]) -> Option<usize> {
    let word = |at: usize| words.get(at).and_then(|word| word.to_str());
    match (word(1), word(2)) {
        (Some("train" | "plan"), _) => Some(2),
        (Some("inspect"), Some("data")) => Some(3),
        _ => None,
    }
}

/// The words from `first` on with CONFIG before the keys and switches that stand before it. Of a key that may have
/// several values, only the first can stand there.
fn behind_config(mut words: Vec<OsString>, first: usize) -> Vec<OsString> {
    let text = |at: usize| words.get(at).map(|word| word.to_string_lossy());
    let mut config = first;
    while let Some(key) = text(config).filter(|word| word.starts_with("--")) {
        config += 1;
        if let Some(value) = text(config)
            && takes(&key, &value)
        {
            config += 1;
        }
    }
    match text(config).map(|word| word.starts_with('-')) {
        Some(true) => {}
        Some(false) => words[first..=config].rotate_right(1),
        // Nothing but keys: what is missing is CONFIG.
        None if !words[first..].iter().any(|word| word == "--help") => words.truncate(first),
        None => {}
    }
    words
}

/// Whether `value` belongs to the `key` before it.
fn takes(key: &str, value: &str) -> bool {
    let name = key[2..].replace('-', "_");
    if name.is_empty() || name.contains('=') || !is_value(value) {
        return false;
    }
    let is_switch = Switches::default().named(&name).is_some()
        || name == "standalone"
        || TrainConfig::arity(&name) == Some(Arity::Switch);
    !is_switch || ["true", "false"].contains(&value)
}

/// Splits what follows the config file into keys with values, and switches.
///
/// `--key value` and `--key=value` are understood for every key, a bare `--key` (true) for those
/// that are true or false, and `--key v1 v2` for lists. A key that does not exist is left to
/// whoever reads the pairs. A lone `--` divides nothing here and is passed over.
pub(super) fn parse(words: &[String]) -> Result<(Vec<(String, String)>, Switches), Failure> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    let mut switches = Switches::default();
    let mut words = words.iter().filter(|word| *word != "--").peekable();
    while let Some(word) = words.next() {
        let Some(name) = word.strip_prefix("--") else {
            return Err(loose(word, pairs.last()));
        };
        let (name, inline) = match name.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (name, None),
        };
        // Clap's habit and TRL's both work: --max-steps is --max_steps.
        let key = name.replace('-', "_");
        let switch = switches.named(&key);
        let arity = match switch {
            Some(_) => Some(Arity::Switch),
            None => TrainConfig::arity(&key),
        };
        let most = match arity {
            Some(Arity::Switch | Arity::Single) => 1,
            Some(Arity::List) | None => usize::MAX,
        };
        let mut values: Vec<String> = inline.into_iter().collect();
        if values.is_empty() {
            while values.len() < most
                && let Some(value) = words.next_if(|w| is_value(w))
            {
                values.push(value.clone());
            }
        }
        let value = value(&key, arity, &values)?;
        if let Some(switch) = switch {
            *switch = truth(&key, &value)?;
            continue;
        }
        if arity == Some(Arity::List) && pairs.iter().any(|(earlier, _)| *earlier == key) {
            let message = format!("`--{key}` is given twice; give all its entries after one");
            return Err(Failure::Usage(message));
        }
        pairs.push((key, value));
    }
    Ok((pairs, switches))
}

/// The value of a switch.
fn truth(key: &str, value: &str) -> Result<bool, Failure> {
    let parsed = value.parse();
    parsed.map_err(|_| Failure::Usage(format!("`--{key}` is {value}, expected true or false")))
}

/// The text that the configuration reads for the words after a key.
fn value(key: &str, arity: Option<Arity>, words: &[String]) -> Result<String, Failure> {
    if words.iter().any(|word| word.trim().is_empty()) {
        let message = format!("`--{key}` has an empty value; write null to unset it");
        return Err(Failure::Usage(message));
    }
    match (arity, words) {
        (Some(Arity::Single | Arity::List), []) => {
            Err(Failure::Usage(format!("`--{key}` needs a value")))
        }
        (_, []) => Ok("true".into()),
        (Some(Arity::List), words) => Ok(list(words)),
        (_, words) => Ok(words.join(" ")),
    }
}

/// A word is an entry, blanks and all, unless commas or brackets make a list of it.
pub(super) fn list(words: &[String]) -> String {
    let first = words[0].as_str();
    let is_literal = first.starts_with(['[', '{', '"', '\'']);
    let is_plain = words.len() == 1 && !first.contains(char::is_whitespace);
    if is_literal || is_plain {
        return words.join(" ");
    }
    let between = |c: char| c == ',' || c.is_whitespace();
    let entries = words.iter().flat_map(|word| match word.contains(',') {
        true => word.split(between).filter(|w| !w.is_empty()).collect(),
        false => vec![word.as_str()],
    });
    json!(entries.collect::<Vec<_>>()).to_string()
}

/// What to say about a word that belongs to no key; `before` is the last pair.
fn loose(word: &str, before: Option<&(String, String)>) -> Failure {
    let reason = match before {
        Some((key, value)) if is_value(word) => {
            format!("`--{key}` has its value, `{value}`; quote a value that has blanks in it")
        }
        _ => "expected `--key value`".to_owned(),
    };
    Failure::Usage(format!("`{word}` belongs to no key: {reason}"))
}

/// A negative number is a value; `--x` is the next key, and `-x` is nothing at all.
fn is_value(word: &str) -> bool {
    !word.starts_with('-') || word.parse::<f64>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    /// The value of the only pair.
    fn value_of(line: &[&str]) -> String {
        let line: Vec<String> = line.iter().map(|&w| w.to_owned()).collect();
        let (pairs, _) = parse(&line).expect("all are pairs");
        assert_eq!(pairs.len(), 1, "{pairs:?}");
        pairs[0].1.clone()
    }

    fn complaint(line: &str) -> String {
        match parse(&words(line)) {
            Err(Failure::Usage(message)) => message,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn keys_and_switches_may_stand_before_the_config_file() {
        for (line, expected) in [
            (
                "f train --dry-run c.yaml --seed 1",
                "f train c.yaml --dry-run --seed 1",
            ),
            (
                "f plan --json --seed=1 c.yaml",
                "f plan c.yaml --json --seed=1",
            ),
            (
                "f inspect data --json --rows 1 c.yaml",
                "f inspect data c.yaml --json --rows 1",
            ),
            (
                "f inspect data --rows 1 --json c.yaml --first 2",
                "f inspect data c.yaml --rows 1 --json --first 2",
            ),
            (
                "f train --learning_rate 1e-4 --packing --max-steps -1 c.yaml",
                "f train c.yaml --learning_rate 1e-4 --packing --max-steps -1",
            ),
            (
                "f train --packing false --nproc 2 --standalone c.yaml",
                "f train c.yaml --packing false --nproc 2 --standalone",
            ),
            ("f train -- c.yaml", "f train c.yaml --"),
            ("f train c.yaml --dry-run", "f train c.yaml --dry-run"),
            ("f train --dry-run", "f train"),
            ("f train --learning_rate 1e-4", "f train"),
            ("f train --help", "f train --help"),
            ("f train --seed -x c.yaml", "f train --seed -x c.yaml"),
        ] {
            let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            let expected: Vec<OsString> = expected.split(' ').map(OsString::from).collect();
            let first = config_place(&words).expect("a command with a configuration");
            assert_eq!(behind_config(words, first), expected);
        }
        assert_eq!(config_place(&["f".into(), "generate".into()]), None);
    }

    #[test]
    fn an_empty_value_is_refused() {
        for line in [
            "--seed= --packing",
            "--resume_from_checkpoint=",
            "--train_file ",
        ] {
            assert!(complaint(line).contains("has an empty value"), "{line}");
        }
    }

    #[test]
    fn pairs_lists_flags_and_negative_numbers() {
        let line = words(
            "--max_steps -1 --lora_target_modules q_proj v_proj --packing --seed=7 --max-length 64 --dry-run",
        );
        let (pairs, switches) = parse(&line).expect("all are pairs");
        let expected = [
            ("max_steps", "-1"),
            ("lora_target_modules", r#"["q_proj","v_proj"]"#),
            ("packing", "true"),
            ("seed", "7"),
            ("max_length", "64"),
        ];
        assert_eq!(pairs, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
        assert_eq!(
            switches,
            Switches {
                dry_run: true,
                json: false
            }
        );
    }

    #[test]
    fn switches_take_a_value_as_keys_do() {
        let switches = |line: &str| parse(&words(line)).expect("switches").1;
        for line in [
            "--dry-run",
            "--dry_run=true",
            "--dry-run true",
            "-- --dry-run",
        ] {
            assert!(switches(line).dry_run, "{line}");
        }
        assert!(!switches("--dry-run=false --json").dry_run);
        assert!(!switches("--json false").json);
        assert!(complaint("--dry-run=perhaps").contains("expected true or false"));
    }

    #[test]
    fn a_list_given_twice_is_a_usage_error_and_a_later_value_wins() {
        for line in [
            "--train_file a --train-file b",
            "--report_to=x --report_to y",
        ] {
            assert!(complaint(line).contains("given twice"), "{line}");
        }
        let (pairs, _) = parse(&words("--seed 1 -- --seed 2")).expect("pairs");
        assert_eq!(pairs.last(), Some(&("seed".to_owned(), "2".to_owned())));
    }

    #[test]
    fn a_loose_word_is_a_usage_error() {
        for line in ["max_steps 3", "--output_dir out -x", "--packing=true yes"] {
            assert!(complaint(line).contains("belongs to no key"), "{line}");
        }
    }

    #[test]
    fn a_key_without_its_value_is_a_usage_error() {
        for line in [
            "--output_dir",
            "--max_steps --packing",
            "--lora_target_modules --seed 7",
            "--resume_from_checkpoint",
            "--max-seq-length",
            "--neftune_noise_alpha",
        ] {
            assert!(complaint(line).contains("needs a value"), "{line}");
        }
        for line in ["--packing", "--bf16", "--gradient-checkpointing"] {
            assert_eq!(value_of(&[line]), "true");
        }
    }

    #[test]
    fn a_second_word_after_a_single_value_is_named() {
        for line in [
            "--run_name my run",
            "--packing true run",
            "--max_steps 3 run",
        ] {
            let message = complaint(line);
            assert!(message.contains("`run`"), "{message}");
        }
        assert!(complaint("--run_name my run").contains("`--run_name` has its value"));
        assert_eq!(value_of(&["--run_name", "my run"]), "my run");
        assert_eq!(value_of(&["--run_name=my run"]), "my run");
    }

    #[test]
    fn entries_of_a_list_keep_their_blanks() {
        for (line, expected) in [
            (
                vec!["--train_file", "my rows.jsonl"],
                r#"["my rows.jsonl"]"#,
            ),
            (vec!["--train_file", "a b", "c"], r#"["a b","c"]"#),
            (vec!["--train_file", "a.jsonl"], "a.jsonl"),
            (vec!["--train_file", "a,b"], "a,b"),
            (vec!["--train_file", "a, b"], r#"["a","b"]"#),
            (vec!["--train_file", "a,", "b"], r#"["a","b"]"#),
            (vec!["--train_file", "[a,", "b]"], "[a, b]"),
        ] {
            assert_eq!(value_of(&line), expected, "{line:?}");
        }
    }
}
