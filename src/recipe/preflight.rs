//! What training would see of its rows, before anything is spent: `inspect data` and `--dry-run`.

use super::{adapter, classifier, data};
use ferrotune_core::Result;
use ferrotune_core::config::TrainConfig;
use ferrotune_core::data::{Dataset, Decoding, Example, Examples, IGNORE_INDEX, Tokenizer};
use ferrotune_core::model::DecoderConfig;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::Range;

/// Longest bar of the histogram.
const BAR: u64 = 40;
/// Classes that are listed.
const MOST_CLASSES: usize = 32;

/// Rows as a model would be trained on them, and what is worth knowing of all of them.
#[derive(Debug)]
pub struct Preflight {
    /// Facts about the data set, a line each.
    pub facts: Vec<String>,
    /// What looks wrong.
    pub warnings: Vec<String>,
    /// The rows that were asked for.
    pub rows: Vec<ShownRow>,
    json: Value,
}

/// One example, decoded.
#[derive(Debug)]
pub struct ShownRow {
    /// Its number among the examples, from 1.
    pub number: usize,
    /// Tokens, and those of them that are predicted.
    pub tokens: [usize; 2],
    /// Its text in the order of the tokens, and whether it is trained.
    pub segments: Vec<(String, bool)>,
}

/// Prepares the rows of a configuration as a run would, and gives those for training; nothing of the model is read
/// but its configuration and its tokenizer.
///
/// # Errors
/// As [`super::Recipe::prepare`], as far as it concerns tokenizer and data.
pub fn prepare_data(config: &TrainConfig) -> Result<(Tokenizer, Dataset)> {
    config.validate()?;
    crate::threads::start(config.runtime.num_threads)?;
    let base = super::base_directory(config)?;
    let tokenizer = data::tokenizer(config, &base)?;
    // A base of an unknown kind has a tokenizer too.
    let decoder = match (DecoderConfig::open(&base), config.lora.classifies()) {
        (Err(_), false) => None,
        _ => Some(classifier::decoder(config, &base)?),
    };
    let of_model = decoder
        .as_ref()
        .map(|decoder| data::OfModel::of(&base, decoder));
    let of_model = of_model.transpose()?.unwrap_or_default();
    let rows = data::all(config, &tokenizer, &of_model, data::training)?;
    if let Some(decoder) = decoder {
        // What is wrong with the method is no matter of the rows.
        let attached = adapter::attach(config, &base, &decoder);
        let prompt_tokens = attached.map_or(0, |attached| attached.prompt_tokens());
        data::check_fit(config, &tokenizer, &rows, prompt_tokens, &decoder, &base)?;
    }
    Ok((tokenizer, rows.0))
}

impl Preflight {
    /// Looks at all examples, and shows those numbered `shown` from 0.
    ///
    /// # Errors
    /// [`ferrotune_core::Error::Model`] if tokens cannot be decoded.
    pub fn of(tokenizer: &Tokenizer, dataset: &Dataset, shown: Range<usize>) -> Result<Self> {
        let ends = Ends::of(tokenizer, &dataset.examples)?;
        let end = shown.end.min(dataset.examples.len());
        let rows = (shown.start.min(end)..end)
            .map(|i| show(tokenizer, i, &dataset.examples.get(i)?))
            .collect::<Result<Vec<_>>>()?;
        let mut facts = counts(dataset);
        match dataset.report.classes.is_empty() {
            true => facts.push(ends.describe(tokenizer, dataset.examples.len())),
            false => facts.push(classes(&dataset.report.classes)),
        }
        facts.extend(histogram(&dataset.report.length_histogram));
        let warnings = warnings(dataset, &ends);
        let json = to_json(dataset, &ends, &rows, &warnings);
        Ok(Self {
            facts,
            warnings,
            rows,
            json,
        })
    }

    /// The same for machines.
    #[must_use]
    pub fn json(&self) -> &Value {
        &self.json
    }
}

fn counts(dataset: &Dataset) -> Vec<String> {
    let report = &dataset.report;
    let share = |part: u64, all: u64| 100.0 * part as f64 / all.max(1) as f64;
    let kind = dataset
        .kind
        .map_or("rows".to_owned(), |kind| kind.to_string());
    let before = report.tokens + report.tokens_lost;
    let mut facts = vec![
        format!(
            "{} rows of {kind}: {} dropped without a label, {} kept without a trained token, {} that cannot be used",
            report.rows, report.dropped_rows, report.untrained_rows, report.bad_rows
        ),
        format!(
            "{} tokens, {} trained ({:.1} %); the longest row has {}",
            report.tokens,
            report.trained_tokens,
            share(report.trained_tokens, report.tokens),
            report.longest
        ),
        format!(
            "{} rows truncated, {} tokens lost ({:.1} %)",
            report.truncated_rows,
            report.tokens_lost,
            share(report.tokens_lost, before)
        ),
    ];
    facts.extend(report.unused_lines());
    let dropped = report.dropped_lines.iter();
    facts.extend(dropped.map(|(path, line)| format!("dropped: {}:{line}", path.display())));
    facts.extend(
        report
            .bad_row_messages
            .iter()
            .map(|m| format!("skipped: {m}")),
    );
    facts
}

/// Examples of each class.
fn classes(counts: &BTreeMap<u32, u64>) -> String {
    let of = |(class, count): (&u32, &u64)| format!("{count} of class {class}");
    let counts: Vec<String> = counts.iter().take(MOST_CLASSES).map(of).collect();
    format!("examples: {}", counts.join(", "))
}

/// Lengths by powers of two, as bars.
fn histogram(bins: &BTreeMap<usize, u64>) -> Vec<String> {
    let most = bins.values().copied().max().unwrap_or(1).max(1);
    let bar = |count: u64| "#".repeat((count * BAR).div_ceil(most) as usize);
    bins.iter()
        .map(|(length, &count)| format!("up to {length:>6} tokens {count:>8}  {}", bar(count)))
        .collect()
}

/// How examples begin and end.
#[derive(Debug, Default)]
struct Ends {
    with_bos: usize,
    /// Examples of which a token that stops generation is trained.
    with_stop: usize,
    /// How often each token is the last that is trained.
    last: BTreeMap<u32, usize>,
}

impl Ends {
    fn of(tokenizer: &Tokenizer, examples: &Examples) -> Result<Self> {
        let mut ends = Self::default();
        let bos = tokenizer.bos_id();
        let is_stop =
            |label: &i32| u32::try_from(*label).is_ok_and(|id| tokenizer.stop_ids().contains(&id));
        examples.for_each(|_, example| {
            let begins = bos.is_some() && example.input_ids.first().copied() == bos;
            ends.with_bos += usize::from(begins);
            ends.with_stop += usize::from(example.labels.iter().skip(1).any(is_stop));
            let trained = example.labels.iter().rev().find(|l| **l != IGNORE_INDEX);
            if let Some(id) = trained.and_then(|l| u32::try_from(*l).ok()) {
                *ends.last.entry(id).or_default() += 1;
            }
            Ok(())
        })?;
        Ok(ends)
    }

    fn describe(&self, tokenizer: &Tokenizer, examples: usize) -> String {
        let last = self.last.iter().max_by_key(|(_, count)| **count);
        let last = last.map_or(String::new(), |(id, count)| {
            let token = tokenizer.token(*id).unwrap_or_default();
            format!("; the last trained token is `{}` in {count}", shown(&token))
        });
        let bos = match tokenizer.special_tokens().get("bos_token") {
            Some(bos) => format!("{} begin with `{}`", self.with_bos, shown(bos)),
            None => "there is no BOS token".to_owned(),
        };
        format!(
            "of {examples} examples, {bos}; {} train a token that stops generation{last}",
            self.with_stop
        )
    }
}

fn warnings(dataset: &Dataset, ends: &Ends) -> Vec<String> {
    let (report, examples) = (&dataset.report, dataset.examples.len());
    let mut warnings = Vec::new();
    if !report.classes.is_empty() {
        if report.classes.len() == 1 {
            warnings.push("all examples are of one class".to_owned());
        }
    } else if ends.with_stop == 0 {
        warnings.push(
            "no example trains a token that stops generation, so the model would not learn to end; \
             check eos_token, the end of the chat template's turns, and max_length"
                .to_owned(),
        );
    } else if ends.with_stop * 2 < examples {
        warnings.push(format!(
            "only {} of {examples} examples train a token that stops generation; truncation cuts it \
             off, or turns end with another token",
            ends.with_stop
        ));
    }
    if ends.with_bos > 0 && ends.with_bos < examples {
        warnings.push(format!(
            "{} of {examples} examples begin with the BOS token and the others do not",
            ends.with_bos
        ));
    }
    let before = report.tokens + report.tokens_lost;
    if report.tokens_lost * 10 > before {
        warnings.push(format!(
            "truncation loses {} of {before} tokens; raise max_length, or pack with bfd_split",
            report.tokens_lost
        ));
    }
    warnings
}

fn to_json(dataset: &Dataset, ends: &Ends, rows: &[ShownRow], warnings: &[String]) -> Value {
    let report = &dataset.report;
    let segment = |(text, trained): &(String, bool)| json!({"text": text, "trained": trained});
    let row = |row: &ShownRow| {
        json!({
            "number": row.number,
            "tokens": row.tokens[0],
            "trained_tokens": row.tokens[1],
            "segments": row.segments.iter().map(segment).collect::<Vec<_>>(),
        })
    };
    json!({
        "rows": report.rows,
        "dropped_rows": report.dropped_rows,
        "untrained_rows": report.untrained_rows,
        "bad_rows": report.bad_rows,
        "bad_row_messages": report.bad_row_messages,
        "unused_columns": report.unused_columns,
        "truncated_rows": report.truncated_rows,
        "tokens": report.tokens,
        "trained_tokens": report.trained_tokens,
        "tokens_lost": report.tokens_lost,
        "longest": report.longest,
        "length_histogram": report.length_histogram,
        "examples": dataset.examples.len(),
        "examples_with_bos": ends.with_bos,
        "examples_with_stop_token": ends.with_stop,
        "classes": report.classes,
        "warnings": warnings,
        "shown": rows.iter().map(row).collect::<Vec<_>>(),
    })
}

fn show(tokenizer: &Tokenizer, index: usize, example: &Example) -> Result<ShownRow> {
    let ids = &example.input_ids;
    // The first token is given, whatever its label: nothing predicts it.
    let trained = |i: usize| i > 0 && example.labels[i] != IGNORE_INDEX;
    let mut segments = Vec::new();
    let mut begin = 0;
    let mut before = String::new();
    for end in 1..=ids.len() {
        if end < ids.len() && trained(end) == trained(begin) {
            continue;
        }
        // Decoded with what comes before: some decoders drop the space that a text begins with.
        let all = tokenizer.decode(&ids[..end], Decoding::KeepSpecialTokens)?;
        let text = match all.strip_prefix(&before) {
            Some(text) => text.to_owned(),
            None => tokenizer.decode(&ids[begin..end], Decoding::KeepSpecialTokens)?,
        };
        segments.push((shown(&text), trained(begin)));
        (begin, before) = (end, all);
    }
    Ok(ShownRow {
        number: index + 1,
        tokens: [ids.len(), example.trained_tokens()],
        segments,
    })
}

/// Text for a terminal: what would steer it is written out.
fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\n' && c != '\t' {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotune_core::data::{PrepareOptions, Record, Row};
    use std::path::Path;
    use std::sync::Arc;

    fn look(rows: &[(&str, &str)]) -> Preflight {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/core/fixtures/sft");
        let tokenizer = Tokenizer::from_dir(&fixtures.join("tokenizers/bpe_llama3"));
        let tokenizer = tokenizer.expect("the tokenizer loads");
        let row = |(line, (prompt, completion)): (u64, &(&str, &str))| Row {
            record: Record::PromptCompletion {
                prompt: (*prompt).to_owned(),
                completion: (*completion).to_owned(),
            },
            path: Arc::from(Path::new("rows")),
            line,
            label: None,
        };
        let rows = (1..).zip(rows).map(row).collect();
        let options = PrepareOptions {
            max_length: Some(8),
            ..PrepareOptions::default()
        };
        let dataset = Dataset::from_rows(rows, &tokenizer, &options).expect("rows are fine");
        Preflight::of(&tokenizer, &dataset, 0..2).expect("tokens are known")
    }

    #[test]
    fn trained_text_is_told_from_given_text() {
        let seen = look(&[("hello", " the"), ("x", "\u{1b}[31m")]);
        let expected = [
            ("<|begin_of_text|>hello".to_owned(), false),
            (" the<|eot_id|>".to_owned(), true),
        ];
        assert_eq!(seen.rows[0].segments, expected);
        assert!(seen.rows[1].segments[1].0.starts_with("\\u{1b}[31m"));
        assert!(seen.warnings.is_empty(), "{:?}", seen.warnings);
        assert_eq!(seen.json()["examples_with_stop_token"], 2);
    }

    #[test]
    fn a_lost_end_is_noticed() {
        let seen = look(&[
            ("a", " hello hello hello hello"),
            ("b", " hello hello hello hello"),
        ]);
        assert_eq!(seen.json()["truncated_rows"], 2);
        assert!(
            seen.warnings[0].contains("would not learn to end"),
            "{:?}",
            seen.warnings
        );
        assert!(
            seen.warnings[1].contains("truncation loses"),
            "{:?}",
            seen.warnings
        );
    }
}
