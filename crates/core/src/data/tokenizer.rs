//! The tokenizer of a model directory, as transformers would load it.

mod files;
#[cfg(test)]
mod tests;
mod words;

use crate::data::chat_template::ChatTemplate;
use crate::suggest::did_you_mean;
use crate::{Error, Result};
use files::Settings;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use words::Words;

/// Whether encoding adds the tokens that the model expects around a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// As the tokenizer's post-processor says: usually one BOS in front.
    Add,
    /// None: the text brings its own, as a rendered chat template does.
    Omit,
}

/// What decoding does with special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoding {
    /// Writes them out.
    KeepSpecialTokens,
    /// Leaves them out.
    SkipSpecialTokens,
}

/// Token ids and where each comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids, `[T]`.
    pub ids: Vec<u32>,
    /// The bytes of the text that each token covers, `[T]`; (0, 0) for added special tokens.
    pub offsets: Vec<(usize, usize)>,
}

/// A tokenizer with its special tokens, chat templates and files.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same, for those whose words are known.
    words: Option<Arc<Words>>,
    path: PathBuf,
    special_tokens: BTreeMap<String, String>,
    chat_templates: BTreeMap<String, ChatTemplate>,
    stop_ids: Vec<u32>,
    added_ids: BTreeSet<u32>,
    files: Vec<PathBuf>,
    /// Whether encoding with special tokens ends with an EOS token.
    appends_eos: bool,
}

impl Tokenizer {
    /// Loads the tokenizer of a model directory: `tokenizer.json`, `tokenizer_config.json`,
    /// `special_tokens_map.json`, `chat_template.jinja` (which wins over the configuration's) and
    /// `generation_config.json` (for stop tokens). Padding, truncation and dropout settings inside
    /// `tokenizer.json` are not used; nor are `add_bos_token` and `add_eos_token`, as in transformers from 5 on: what
    /// `tokenizer.json` adds to a text is added.
    ///
    /// # Errors
    /// [`Error::Model`] with the file; [`Error::Template`] when a chat template does not parse.
    pub fn from_dir(directory: &Path) -> Result<Self> {
        let path = files::tokenizer_json(directory)?;
        let mut inner = tokenizers::Tokenizer::from_file(&path)
            .map_err(|e| Error::model(&path, format!("not a tokenizer.json: {e}")))?;
        make_deterministic(&mut inner, &path)?;
        let settings = Settings::read(directory)?;
        settings.check_eos(&inner)?;
        let chat_templates = settings.compile_templates()?;
        let mut tokenizer = Self {
            stop_ids: Vec::new(),
            added_ids: inner.get_added_tokens_decoder().into_keys().collect(),
            files: files::existing(directory),
            appends_eos: false,
            special_tokens: settings.special_tokens,
            words: Words::of(&inner).map(Arc::new),
            inner,
            path,
            chat_templates,
        };
        tokenizer.appends_eos = tokenizer.puts_eos_behind()?;
        tokenizer.stop_ids = tokenizer.eos_id().into_iter().collect();
        for id in settings.generation_eos_ids {
            if !tokenizer.stop_ids.contains(&id) {
                tokenizer.stop_ids.push(id);
            }
        }
        Ok(tokenizer)
    }

    /// Whether the post-processor puts an EOS token behind every text.
    fn puts_eos_behind(&self) -> Result<bool> {
        let plain = self.encode("a", SpecialTokens::Omit)?;
        let full = self.encode("a", SpecialTokens::Add)?;
        let eos = self.eos_id();
        Ok(eos.is_some() && full.last() == eos.as_ref() && plain.last() != eos.as_ref())
    }

    fn by_words(&self, text: &str, special: bool, offsets: bool) -> Result<Option<Encoded>> {
        let Some(words) = &self.words else {
            return Ok(None);
        };
        let encoded = words
            .encode(&self.inner, text, special, offsets)
            .map_err(|e| self.error(&e))?;
        Ok(encoded)
    }

    fn error(&self, error: &tokenizers::Error) -> Error {
        Error::model(&self.path, format!("cannot tokenise: {error}"))
    }

    /// Token ids of a text.
    ///
    /// # Errors
    /// [`Error::Model`] when the tokenizer refuses the text.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>> {
        let add = special == SpecialTokens::Add;
        if let Some(encoded) = self.by_words(text, add, false)? {
            return Ok(encoded.ids);
        }
        let encoding = self.inner.encode_fast(text, add);
        Ok(encoding.map_err(|e| self.error(&e))?.get_ids().to_vec())
    }

    /// Token ids of a text that is to be continued: with special tokens, but without the EOS token
    /// that some tokenizers put behind every text.
    ///
    /// # Errors
    /// [`Error::Model`] when the tokenizer refuses the text.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, SpecialTokens::Add)?;
        if self.appends_eos {
            ids.pop();
        }
        Ok(ids)
    }

    /// Token ids of a text and the bytes that each covers.
    ///
    /// # Errors
    /// [`Error::Model`] when the tokenizer refuses the text.
    pub fn encode_with_offsets(&self, text: &str, special: SpecialTokens) -> Result<Encoded> {
        let add = special == SpecialTokens::Add;
        if let Some(encoded) = self.by_words(text, add, true)? {
            return Ok(encoded);
        }
        let encoding = self.inner.encode(text, add).map_err(|e| self.error(&e))?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding.get_offsets().to_vec(),
        })
    }

    /// The text of token ids.
    ///
    /// # Errors
    /// [`Error::Model`] when the decoder fails.
    pub fn decode(&self, ids: &[u32], decoding: Decoding) -> Result<String> {
        self.inner
            .decode(ids, decoding == Decoding::SkipSpecialTokens)
            .map_err(|e| Error::model(&self.path, format!("cannot decode: {e}")))
    }

    /// The id of a token, as it is written in the vocabulary.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Checks that a token which the configuration names is one of the vocabulary.
    ///
    /// # Errors
    /// [`Error::Config`] about `key` with the nearest of the added tokens.
    pub fn require_token(&self, key: &str, token: &str) -> Result<()> {
        if self.token_id(token).is_some() {
            return Ok(());
        }
        let added: Vec<String> = self
            .added_ids
            .iter()
            .filter_map(|&id| self.token(id))
            .collect();
        let hint = did_you_mean(token, added.iter().map(String::as_str));
        let message = format!(
            "`{token}` is not a token of the vocabulary of {}{hint}",
            self.path.display()
        );
        Err(Error::config(key, message))
    }

    /// Whether a token was added to the vocabulary of text, as those that end a turn are.
    #[must_use]
    pub fn is_added(&self, id: u32) -> bool {
        self.added_ids.contains(&id)
    }

    /// A token, as it is written in the vocabulary.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The number of tokens, added tokens included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Checks that every id has a row in the embedding of a model, whose `config.json` says
    /// `vocab_size`.
    ///
    /// # Errors
    /// [`Error::Model`] naming both files, the largest id and the size.
    pub fn check_fits<'a>(
        &self,
        ids: impl IntoIterator<Item = &'a u32>,
        vocab_size: usize,
        config: &Path,
    ) -> Result<()> {
        let largest = ids.into_iter().max().copied().unwrap_or(0);
        if (largest as usize) < vocab_size {
            return Ok(());
        }
        Err(Error::model(
            &self.path,
            format!(
                "gives token id {largest}, but vocab_size in {} is {vocab_size}; tokenizer and \
                 model must belong together",
                config.display()
            ),
        ))
    }

    /// The special tokens by name (`bos_token`, `eos_token`, ...): variables of chat templates.
    #[must_use]
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    fn special_id(&self, name: &str) -> Option<u32> {
        self.token_id(self.special_tokens.get(name)?)
    }

    /// The token that begins a text.
    #[must_use]
    pub fn bos_id(&self) -> Option<u32> {
        self.special_id("bos_token")
    }

    /// The token that ends a text.
    #[must_use]
    pub fn eos_id(&self) -> Option<u32> {
        self.special_id("eos_token")
    }

    /// The padding token.
    #[must_use]
    pub fn pad_id(&self) -> Option<u32> {
        self.special_id("pad_token")
    }

    /// The token that ends a text, as text.
    #[must_use]
    pub fn eos_token(&self) -> Option<&str> {
        self.special_tokens.get("eos_token").map(String::as_str)
    }

    /// Where generation stops: the EOS token, then those of `generation_config.json`.
    #[must_use]
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// The chat template; the one named `tool_use` for a conversation with tools, where there is
    /// one.
    #[must_use]
    pub fn chat_template(&self, tools: Option<&Value>) -> Option<&ChatTemplate> {
        let named = |name: &str| self.chat_templates.get(name);
        tools
            .and_then(|_| named("tool_use"))
            .or_else(|| named("default"))
    }

    /// The chat templates as they were given.
    pub(crate) fn chat_template_sources(&self) -> impl Iterator<Item = &str> {
        self.chat_templates.values().map(ChatTemplate::source)
    }

    /// Replaces the chat templates by one (`chat_template_path`).
    ///
    /// # Errors
    /// [`Error::Template`] when it does not parse.
    pub fn set_chat_template(&mut self, source: &str) -> Result<()> {
        let template = ChatTemplate::new(source, &self.special_tokens)?;
        self.chat_templates = BTreeMap::from([("default".to_owned(), template)]);
        Ok(())
    }

    /// The file that errors about this tokenizer name.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tokenizer's files, to be copied beside an adapter as they are.
    #[must_use]
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }
}

/// Switches off what would change an encoding by length, batch or chance.
fn make_deterministic(tokenizer: &mut tokenizers::Tokenizer, path: &Path) -> Result<()> {
    tokenizer.with_padding(None);
    tokenizer
        .with_truncation(None)
        .map_err(|e| Error::model(path, e.to_string()))?;
    if let tokenizers::ModelWrapper::BPE(bpe) = tokenizer.get_model()
        && bpe.dropout.is_some()
    {
        let mut bpe = bpe.clone();
        bpe.dropout = None;
        tokenizer.with_model(bpe);
    }
    Ok(())
}
