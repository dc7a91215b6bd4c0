//! What modules are called that are a table over the vocabulary, whatever the architecture.

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
