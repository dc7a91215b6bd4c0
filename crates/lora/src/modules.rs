//! What modules are called that are a table over the vocabulary, or a head, whatever the architecture.

use ferrotune_core::{Error, Result};

/// Last segments of the paths of input embeddings.
pub(crate) const EMBEDDINGS: [&str; 5] = [
    "embed_in",
    "embed_tokens",
    "tok_embeddings",
    "word_embeddings",
    "wte",
];
/// The same of output heads.
pub(crate) const HEADS: [&str; 3] = ["embed_out", "lm_head", "output"];

/// `task_type` of an adapter of a classifier of sequences.
pub(crate) const SEQUENCE_CLASSIFICATION: &str = "SEQ_CLS";
/// What PEFT trains as a whole with every such adapter, where it is there. Of the architectures here, all call their
/// head by the second name.
const CLASSIFIERS: [&str; 2] = ["classifier", "score"];
/// The tensor of that head in the file of an adapter.
pub(crate) const CLASSIFIER_WEIGHT: &str = "base_model.model.score.weight";

/// Completes `modules_to_save` for a task, of the modules that there are.
///
/// # Source
/// PEFT's `PeftModelForSequenceClassification`.
pub(crate) fn complete_for_task(task: Option<&str>, modules_to_save: &mut Vec<String>) {
    if task == Some(SEQUENCE_CLASSIFICATION) {
        modules_to_save.retain(|name| !CLASSIFIERS.contains(&name.as_str()));
        modules_to_save.push(CLASSIFIERS[1].into());
    }
}

/// `modules_to_save` as PEFT's files have it: with all that a task adds.
pub(crate) fn as_in_file(task: Option<&str>, modules_to_save: &[String]) -> Vec<String> {
    let own = modules_to_save.iter().map(String::as_str);
    let own =
        own.filter(|name| !CLASSIFIERS.contains(name) || task != Some(SEQUENCE_CLASSIFICATION));
    let added = CLASSIFIERS
        .iter()
        .copied()
        .filter(|_| task == Some(SEQUENCE_CLASSIFICATION));
    own.chain(added).map(str::to_owned).collect()
}

/// Refuses a classifier's task for a method that trains no head, which such an adapter has.
///
/// # Errors
/// [`Error::Config`] naming `task_type`.
pub(crate) fn require_tokens(task: Option<&str>, peft_type: &str) -> Result<()> {
    if task != Some(SEQUENCE_CLASSIFICATION) {
        return Ok(());
    }
    let message = format!(
        "is {SEQUENCE_CLASSIFICATION}, and {peft_type} trains no head of a classifier here; take a method that changes \
         weights, such as LORA"
    );
    Err(Error::config("task_type", message))
}
