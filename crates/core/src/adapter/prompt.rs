//! Trained rows that stand before every document.

use crate::params::ParamId;

/// A prompt of virtual tokens: the same before every document, in training and in generation.
///
/// Documents do not know of it: their positions are moved on by its length, and logits are those of their
/// own tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// One row per virtual token.
    pub rows: ParamId,
    /// How many there are.
    pub tokens: usize,
    /// What the rows are.
    pub of: PromptOf,
}

/// What the rows of a [`Prompt`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptOf {
    /// Embeddings, `[tokens, hidden]`.
    Embeddings,
    /// Keys and values of every layer as attention reads them: `[tokens, layers * 2 * keys]`, of each layer
    /// keys, then values.
    KeysAndValues,
}
