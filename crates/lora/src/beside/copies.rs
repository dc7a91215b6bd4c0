//! What PEFT's files have of one parameter once more.

use crate::base_copies::OwnNames;
use crate::files::Weights;
use crate::modules::{EMBEDDINGS, HEADS};
use crate::names::{self, Part};
use crate::target::last_segment;
use ferrotune_core::Error;
use std::collections::BTreeSet;

/// Tensors of `file`, none of `expected` and no copy of the base's, that repeat one of `expected`: with that one's name.
pub(crate) fn repeated<'a>(
    file: &'a Weights,
    expected: &'a BTreeSet<String>,
    own: &'a OwnNames<'_>,
    tied: bool,
) -> impl Iterator<Item = (&'a str, String)> {
    let is_repeated = move |name: &&str| !expected.contains(*name) && !own.are_beside_copy(name);
    let names = file.file.names().filter(is_repeated);
    names.filter_map(move |name| Some((name, twin(name, expected, tied)?)))
}

/// Two tensors of `file` that should be equal.
pub(crate) fn differ(file: &Weights, name: &str, twin: &str) -> Error {
    let message = format!("`{name}` and `{twin}` differ, but are one parameter");
    Error::adapter(&file.path, message)
}

/// The expected tensor that `name` repeats: of a head that is `tied`, or has the same trained rows, the embedding's; of
/// a module trained as a whole, what PEFT saves of it once more.
pub(crate) fn twin(name: &str, expected: &BTreeSet<String>, tied: bool) -> Option<String> {
    let (module, part) = names::parse(name)?;
    if let Some(saved) = names::without(module, names::SAVED) {
        // Inside of a module, the name of the adapter stays.
        let unnamed = names::without(&saved, "default");
        let saved = names::tensor(&unnamed.unwrap_or(saved), part);
        let is_own = expected.contains(&saved);
        return is_own
            .then(|| saved.clone())
            .or_else(|| twin(&saved, expected, tied));
    }
    let of = match part {
        Part::A => Part::EmbeddingB,
        Part::B => Part::EmbeddingA,
        Part::Weight | Part::TokenRows | Part::TokenRowsAlone => part,
        _ => return None,
    };
    let is_table = |other: &str| EMBEDDINGS.contains(&last_segment(other));
    let twin = |other: &&String| names::parse(other).is_some_and(|(m, p)| p == of && is_table(m));
    let shares = tied || part.is_rows();
    let is_head = shares && HEADS.contains(&last_segment(module));
    expected.iter().find(twin).filter(|_| is_head).cloned()
}
