//! `--key value` pairs after a config file: any configuration key, as on TRL's command line.

use super::Failure;

/// Flags that are not configuration keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Switches {
    /// Show the plan and stop.
    pub(super) dry_run: bool,
    /// JSON lines even on a terminal.
    pub(super) json: bool,
}

/// Splits what follows the config file into keys with values, and switches.
///
/// `--key value`, `--key=value`, `--key v1 v2` (a list) and a bare `--key` (true) are understood.
pub(super) fn parse(words: &[String]) -> Result<(Vec<(String, String)>, Switches), Failure> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    let mut switches = Switches::default();
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        if ["-h", "--help"].contains(&word.as_str()) {
            let message = "for help: `ferrotune help train`; for all keys: `ferrotune config-schema --markdown`";
            return Err(Failure::Usage(message.into()));
        }
        let Some(name) = word.strip_prefix("--") else {
            return Err(Failure::Usage(format!(
                "`{word}` is not a `--key value` pair"
            )));
        };
        match name {
            "dry-run" | "dry_run" => switches.dry_run = true,
            "json" => switches.json = true,
            _ => {
                let (key, inline) = match name.split_once('=') {
                    Some((key, value)) => (key, Some(value.to_owned())),
                    None => (name, None),
                };
                let mut values: Vec<String> = inline.into_iter().collect();
                if values.is_empty() {
                    while let Some(value) = words.next_if(|w| is_value(w)) {
                        values.push(value.clone());
                    }
                }
                let value = if values.is_empty() {
                    "true".into()
                } else {
                    values.join(" ")
                };
                // Clap's habit and TRL's both work: --max-steps is --max_steps.
                pairs.push((key.replace('-', "_"), value));
            }
        }
    }
    Ok((pairs, switches))
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

    #[test]
    fn pairs_lists_flags_and_negative_numbers() {
        let line = words(
            "--max_steps -1 --lora_target_modules q_proj v_proj --packing --seed=7 --max-length 64 --dry-run",
        );
        let (pairs, switches) = parse(&line).expect("all are pairs");
        let expected = [
            ("max_steps", "-1"),
            ("lora_target_modules", "q_proj v_proj"),
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
    fn a_loose_word_is_a_usage_error() {
        for line in [
            "max_steps 3",
            "--output_dir out -h",
            "--output_dir out -x",
            "--help",
        ] {
            assert!(parse(&words(line)).is_err(), "{line}");
        }
    }
}
