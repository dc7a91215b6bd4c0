//! The kinds of tokenizer whose words are known, told by what their files say.

use super::Result;
use super::cache::Token;
use super::spaces::Spaces;
use super::split::Split;
use serde_json::Value;
use std::sync::LazyLock;
use unicode_normalization_alignments::{IsNormalized, is_nfc_quick};

/// How text becomes words.
#[derive(Debug)]
pub(super) enum Form {
    /// Words by splits, each byte a character of the vocabulary.
    Bytes {
        /// Applied one after the other.
        splits: Vec<Split>,
        /// Text is normalised to NFC.
        nfc: bool,
    },
    /// One word, as far as the tokenizer says.
    Text(Spaces),
}

impl Form {
    pub(super) fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let normalizer = serde_json::to_value(tokenizer.get_normalizer()).ok()?;
        let pre_tokenizer = serde_json::to_value(tokenizer.get_pre_tokenizer()).ok()?;
        if let Some(spaces) = Spaces::of(&normalizer, &pre_tokenizer, tokenizer.get_model()) {
            return Some(Self::Text(spaces));
        }
        let nfc = match normalizer.get("type").and_then(Value::as_str) {
            None if normalizer.is_null() => false,
            Some("NFC") => true,
            _ => return None,
        };
        Some(Self::Bytes {
            splits: Split::of_byte_level(&pre_tokenizer)?,
            nfc,
        })
    }

    /// Whether normalising leaves every text that is taken as it is.
    pub(super) fn leaves_text(&self) -> bool {
        match self {
            Self::Bytes { nfc, .. } => !nfc,
            Self::Text(spaces) => spaces.leave_text(),
        }
    }

    /// Whether a text can be cut without being normalised.
    pub(super) fn takes(&self, text: &str) -> bool {
        match self {
            Self::Bytes { nfc: true, .. } => {
                text.is_ascii() || is_nfc_quick(text.chars()) == IsNormalized::Yes
            }
            _ => true,
        }
    }
}

/// Whether the post-processor leaves offsets alone; nothing for one that is not known.
pub(super) fn keeps_offsets(tokenizer: &tokenizers::Tokenizer) -> Option<bool> {
    let processor = serde_json::to_value(tokenizer.get_post_processor()).ok()?;
    let mut waiting = vec![&processor];
    let mut keeps = true;
    while let Some(processor) = waiting.pop() {
        if processor.is_null() {
            continue;
        }
        match processor.get("type").and_then(Value::as_str)? {
            "Sequence" => waiting.extend(processor.get("processors")?.as_array()?),
            "TemplateProcessing" | "BertProcessing" => {}
            "ByteLevel" | "RobertaProcessing" => {
                keeps &= processor.get("trim_offsets") == Some(&Value::Bool(false));
            }
            _ => return None,
        }
    }
    Some(keeps)
}

/// The character that stands for each byte.
///
/// # Source
/// `bytes_to_unicode` of GPT-2: bytes that print stand for themselves, the others for the characters
/// from U+0100 on.
static BYTE_CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        let byte = byte as u32;
        let code = if matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) {
            byte
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).unwrap_or_default()
    })
});

/// The tokens of a word of bytes, by those of the characters that stand for them.
pub(super) fn tokens_of_bytes(
    word: &str,
    tokenize: impl FnOnce(&str) -> Result<Vec<tokenizers::Token>>,
) -> Result<Option<Vec<Token>>> {
    let mapped: String = word.bytes().map(|b| BYTE_CHARS[b as usize]).collect();
    let mut origin = Vec::with_capacity(mapped.len());
    for (byte, c) in mapped.chars().enumerate() {
        origin.extend(std::iter::repeat_n(byte as u32, c.len_utf8()));
    }
    let place = |token: tokenizers::Token| {
        let (begin, end) = token.offsets;
        Some(Token {
            id: token.id,
            begin: *origin.get(begin)?,
            end: *origin.get(end.checked_sub(1).filter(|last| *last >= begin)?)? + 1,
        })
    };
    Ok(tokenize(&mapped)?.into_iter().map(place).collect())
}
