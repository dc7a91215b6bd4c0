//! Classes of documents, where those are learned instead of tokens.

use super::batch::{Example, IGNORE_INDEX};
use super::record::list;
use crate::suggest;
use serde_json::{Map, Value};

/// Columns of a row that hold its class, as data sets for Transformers call it.
const COLUMNS: [&str; 2] = ["label", "labels"];

/// The classes of a classifier of sequences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Classes {
    /// Their names, by number (`id2label`).
    pub names: Vec<String>,
}

/// The column of a row that holds its class; those of tokens are lists.
pub(super) fn column(row: &Map<String, Value>) -> Option<&'static str> {
    let is_class = |name: &&&str| {
        let value = row.get(**name);
        value.is_some_and(|value| !value.is_null() && !value.is_array())
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
            other => {
                let number = other.as_f64().filter(|number| number.fract() == 0.0);
                (0..self.names.len()).find(|&class| number == Some(class as f64))
            }
        };
        number.map(|number| number as u32).ok_or_else(|| {
            let names: Vec<&str> = self.names.iter().map(String::as_str).collect();
            let asked = label.as_str().unwrap_or_default();
            let near = suggest::did_you_mean(asked, names.iter().copied());
            format!(
                "`label` is {label}; expected a number from 0 to {}, or a name of these: {}{near}",
                names.len().saturating_sub(1),
                list(&names)
            )
        })
    }

    /// Makes `example` one of class `number`: the label of its last token is its class, and no other counts.
    pub(super) fn mark(example: &mut Example, number: u32) {
        example.labels.fill(IGNORE_INDEX);
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
        }
    }

    #[test]
    fn a_class_is_a_number_or_a_name() {
        for (label, number) in [
            (json!(0), 0),
            (json!(2), 2),
            (json!(1.0), 1),
            (json!("good"), 1),
        ] {
            assert_eq!(classes().number(Some(&label)), Ok(number));
        }
        for (label, part) in [
            (
                json!(3),
                "is 3; expected a number from 0 to 2, or a name of these: `bad`, `good`, `so-so`",
            ),
            (json!(-1), "is -1"),
            (json!(0.5), "is 0.5"),
            (json!(true), "is true"),
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
        Classes::mark(&mut example, 2);
        assert_eq!(example.labels, [IGNORE_INDEX, IGNORE_INDEX, 2]);
    }
}
