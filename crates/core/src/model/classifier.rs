//! Sequence classification: a head with a row for each class, which reads one token of each document.
//!
//! # Source
//! Transformers' `GenericForSequenceClassification`, and `GPT2ForSequenceClassification`.

use super::hf_config::HfConfig;
use crate::Result;
use crate::data::{IGNORE_INDEX, PackedBatch};
use serde_json::Value;
use std::ops::RangeInclusive;

/// End of the names of the classes of such models.
const CLASS: &str = "ForSequenceClassification";
/// Path of the head, in every architecture.
pub(super) const HEAD: &str = "score";
/// Its tensor.
pub(super) const HEAD_WEIGHT: &str = "score.weight";

/// Architectures that Transformers has no such class of.
const WITHOUT: [&str; 1] = ["granite"];

/// What makes a decoder a classifier of sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Classifier {
    /// Number of classes: rows of the head.
    pub classes: usize,
    /// `pad_token_id`: the head reads the last token of a document that is another one.
    pub padding: Option<u32>,
}

/// The class that a config names, such as `LlamaForCausalLM`.
pub(super) fn model_class(config: &HfConfig) -> Option<&str> {
    let classes = config.get("architectures")?.as_array()?;
    classes.first()?.as_str()
}

/// Whether a config is of a classifier of sequences.
pub(super) fn is_classifier(config: &HfConfig) -> bool {
    model_class(config).is_some_and(|class| class.ends_with(CLASS))
}

impl Classifier {
    /// How many classes there can be: a head of one row is trained by regression, and none has more rows than that.
    pub const CLASSES: RangeInclusive<usize> = 2..=1 << 24;

    /// That of a config, if its class is one.
    ///
    /// # Errors
    /// [`crate::Error::Model`] naming the key, for regression and for several labels of one document too.
    pub(super) fn of(config: &HfConfig) -> Result<Option<Self>> {
        if !is_classifier(config) {
            return Ok(None);
        }
        let labels = config.get("id2label").and_then(Value::as_object);
        let classes = match labels {
            Some(labels) => labels.len(),
            None => config.size_or("num_labels", Some(2))?,
        };
        let problem = config.text_or("problem_type", "single_label_classification")?;
        if problem != "single_label_classification" {
            let message = format!(
                "is {problem}, which is not supported; expected single_label_classification or null"
            );
            return Err(config.error("problem_type", message));
        }
        Ok(Some(Self::over(config, classes)?))
    }

    /// A head of `classes` over the model of `config`.
    ///
    /// # Errors
    /// [`crate::Error::Model`] for fewer than 2 classes, which is regression, and for more than any head has; for a
    /// `pad_token_id` that is no token id; for an architecture of which Transformers has no classifier.
    pub fn over(config: &HfConfig, classes: usize) -> Result<Self> {
        if !Self::CLASSES.contains(&classes) {
            let key = match config.get("id2label") {
                Some(_) => "id2label",
                None => "num_labels",
            };
            let message = format!(
                "makes {classes} classes; expected 2 to {}. A head of one row is trained by regression, which is not \
                 supported",
                Self::CLASSES.end()
            );
            return Err(config.error(key, message));
        }
        let name = config.text_or("model_type", "")?;
        if WITHOUT.contains(&name) {
            let message = format!(
                "`{name}` has no classifier of sequences in Transformers, and so none here; take another model"
            );
            return Err(config.error("model_type", message));
        }
        let padding = config.get("pad_token_id").map(|value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            let wrong = || config.error("pad_token_id", format!("is {value}; expected a token id"));
            id.ok_or_else(wrong)
        });
        let padding = padding.transpose()?;
        Ok(Self { classes, padding })
    }

    /// The names of `classes` classes, by number: those of `id2label` where it has as many, else their numbers.
    #[must_use]
    pub fn names(config: &HfConfig, classes: usize) -> Vec<String> {
        let labels = config.get("id2label").and_then(Value::as_object);
        let labels = labels.filter(|labels| labels.len() == classes);
        let name = |number: usize| {
            let name = labels.and_then(|labels| labels.get(&number.to_string())?.as_str());
            name.map_or_else(|| number.to_string(), str::to_owned)
        };
        (0..classes).map(name).collect()
    }

    /// The row of each document that the head reads, `[S]`: that of the last token which is no padding, or its
    /// first one; none of a document without tokens.
    #[must_use]
    pub fn rows(&self, batch: &PackedBatch) -> Vec<u32> {
        let documents = batch.cu_seqlens.windows(2).filter(|d| d[0] < d[1]);
        documents.map(|d| self.row(batch, d[0], d[1])).collect()
    }

    fn row(&self, batch: &PackedBatch, first: u32, end: u32) -> u32 {
        let is_padding = |row: &u32| Some(batch.input_ids[*row as usize]) == self.padding;
        let last = (first..end).rev().find(|row| !is_padding(row));
        last.unwrap_or(first)
    }

    /// The rows that are trained on, and the class of each, both `[N]`: the label of a document's last token is its
    /// class.
    pub(crate) fn targets(&self, batch: &PackedBatch) -> (Vec<u32>, Vec<u32>) {
        let documents = batch.cu_seqlens.windows(2).filter(|d| d[0] < d[1]);
        let labelled = documents.filter_map(|d| {
            let class = batch.labels[d[1] as usize - 1];
            (class != IGNORE_INDEX).then(|| (self.row(batch, d[0], d[1]), class as u32))
        });
        labelled.unzip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Example;
    use serde_json::json;
    use std::path::Path;

    fn config(keys: Value) -> HfConfig {
        HfConfig::from_value(Path::new("config.json"), keys).expect("an object")
    }

    #[test]
    fn the_last_token_that_is_no_padding_is_read() {
        let of = |padding| Classifier {
            classes: 3,
            padding,
        };
        let document = |ids: &[u32], class| {
            let mut labels = vec![IGNORE_INDEX; ids.len()];
            *labels.last_mut().expect("tokens") = class;
            Example {
                input_ids: ids.to_vec(),
                labels,
            }
        };
        let documents = [
            document(&[5, 6, 7], 2),
            document(&[5, 0, 0], 1),
            document(&[0, 0], IGNORE_INDEX),
            document(&[9], 0),
        ];
        let batch = PackedBatch::pack(documents.iter().enumerate().map(|(i, d)| (i as u64, d)));
        assert_eq!(of(None).rows(&batch), [2, 5, 7, 8]);
        assert_eq!(of(Some(0)).rows(&batch), [2, 3, 6, 8]);
        assert_eq!(of(Some(0)).targets(&batch), (vec![2, 3, 8], vec![2, 1, 0]));
    }

    #[test]
    fn classes_are_counted_as_transformers_counts_them() {
        let class = json!(["LlamaForSequenceClassification"]);
        let of = |mut keys: Value| {
            keys["architectures"] = class.clone();
            Classifier::of(&config(keys))
        };
        let classes = |keys| of(keys).expect("valid").map(|c| c.classes);
        assert_eq!(classes(json!({})), Some(2));
        assert_eq!(classes(json!({"num_labels": 4})), Some(4));
        assert_eq!(
            classes(json!({"id2label": {"0": "a", "1": "b", "2": "c"}})),
            Some(3)
        );
        let none = Classifier::of(&config(json!({"architectures": ["LlamaForCausalLM"]})));
        assert_eq!(none.expect("valid"), None);
        for (keys, part) in [
            (json!({"num_labels": 1}), "`num_labels`: makes 1 classes"),
            (
                json!({"problem_type": "regression"}),
                "`problem_type`: is regression",
            ),
            (json!({"pad_token_id": -1}), "`pad_token_id`: is -1"),
        ] {
            let error = of(keys).expect_err("refused").to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
