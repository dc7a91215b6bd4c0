//! Classes of documents, where those are learned instead of tokens.

use super::batch::{Example, IGNORE_INDEX};
use crate::suggest;
use serde_json::{Map, Value};

/// Columns of a row that hold its class, as data sets for Transformers call it.
const COLUMNS: [&str; 2] = ["label", "labels"];

/// The classes of a classifier of sequences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Classes {
    /// Their names, by number (`id2label`).
    pub names: Vec<String>,
    /// `pad_token_id`: behind the last token it is not read.
    pub padding: Option<u32>,
}

/// The value of a row that is its class: a number or a name.
pub(super) fn column(row: &Map<String, Value>) -> Option<&'static str> {
    let is_class = |name: &&&str| {
        row.get(**name)
            .is_some_and(|v| v.is_number() || v.is_string())
    };
    COLUMNS.iter().find(is_class).copied()
}

impl Classes {
    /// The number of the class that a row has in its column.
    ///
    /// # Errors
    /// What is wrong and what was expected.
    pub(super) fn number(&self, label: Option<&Value>) -> Result<u32, String> {
        let Some(label) = label else {
            let message = "`label` is missing: the class of the row, by number or name";
            return Err(message.into());
        };
        let number = match label {
            Value::String(name) => self.names.iter().position(|known| known == name),
            other => other.as_u64().map(|number| number as usize),
        };
        match number.filter(|number| *number < self.names.len()) {
            Some(number) => Ok(number as u32),
            None => {
                let names = self.names.iter().map(String::as_str);
                let near = suggest::did_you_mean(label.as_str().unwrap_or_default(), names.clone());
                let names: Vec<&str> = names.take(12).collect();
                Err(format!(
                    "`label` is {label}; expected 0 to {}, or a name of these: {}{near}",
                    self.names.len() - 1,
                    super::record::list(&names)
                ))
            }
        }
    }

    /// Makes `example` one of class `number`: the label of its last token is its class, and no other counts. One
    /// token alone, on which no loss is taken, gets padding behind it, which is not read.
    pub(super) fn mark(&self, example: &mut Example, number: u32) {
        if let ([_], Some(padding)) = (&example.input_ids[..], self.padding) {
            example.input_ids.push(padding);
        }
        example.labels = vec![IGNORE_INDEX; example.input_ids.len()];
        if let Some(last) = example.labels.last_mut() {
            *last = number as i32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn classes() -> Classes {
        Classes {
            names: ["bad", "good", "so-so"].map(str::to_owned).into(),
            padding: Some(0),
        }
    }

    #[test]
    fn a_class_is_a_number_or_a_name() {
        for (label, number) in [(json!(0), 0), (json!(2), 2), (json!("good"), 1)] {
            assert_eq!(classes().number(Some(&label)), Ok(number));
        }
        for (label, part) in [
            (
                json!(3),
                "is 3; expected 0 to 2, or a name of these: `bad`, `good`, `so-so`",
            ),
            (json!(-1), "is -1"),
            (json!(0.5), "is 0.5"),
            (json!("god"), "did you mean `good`"),
        ] {
            let error = classes().number(Some(&label)).expect_err("no class");
            assert!(error.contains(part), "{error}");
        }
        let error = classes().number(None).expect_err("none");
        assert!(error.contains("`label` is missing"), "{error}");
    }

    #[test]
    fn a_row_has_its_class_in_one_of_two_columns() {
        let of = |row: Value| column(row.as_object().expect("an object")).map(str::to_owned);
        assert_eq!(
            of(json!({"text": "a", "label": 1})).as_deref(),
            Some("label")
        );
        assert_eq!(
            of(json!({"labels": "x", "label": null})).as_deref(),
            Some("labels")
        );
        // Those of tokens.
        assert_eq!(of(json!({"input_ids": [1], "labels": [1]})), None);
    }

    #[test]
    fn the_last_token_has_the_class_for_its_label() {
        let mut example = Example {
            input_ids: vec![4, 5, 6],
            labels: vec![4, 5, 6],
        };
        classes().mark(&mut example, 2);
        assert_eq!(example.labels, [IGNORE_INDEX, IGNORE_INDEX, 2]);
        let mut one = Example {
            input_ids: vec![4],
            labels: vec![4],
        };
        classes().mark(&mut one, 1);
        assert_eq!(
            (one.input_ids, one.labels),
            (vec![4, 0], vec![IGNORE_INDEX, 1])
        );
    }
}
