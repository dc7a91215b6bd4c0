use super::{integers, read_json, text};
use crate::parity::case::Case;
use crate::parity::compare::Comparison;
use ferrotune_core::data::{Decoding, SpecialTokens, Tokenizer};
use ferrotune_core::{Error, Result};
use serde_json::{Value, json};

/// Ids, tokens, offsets and text of every probe, and the special tokens.
pub(in crate::parity) fn compare(case: &Case) -> Result<Comparison> {
    let tokenizer = Tokenizer::from_dir(&case.directory)?;
    let path = case.path("encodings.json");
    let recorded = read_json(&path)?;
    let mut comparison = Comparison::default();
    let probes = recorded.get("probes").and_then(Value::as_array);
    for (i, probe) in probes.into_iter().flatten().enumerate() {
        compare_probe(&tokenizer, &format!("probe {i}"), probe, &mut comparison)?;
    }
    let first = probes.and_then(|p| text(p.first()?, "text"));
    let first = first.ok_or_else(|| Error::data(&path, None, "`probes` is empty"))?;
    if let Some(rows) = recorded.pointer("/padded/input_ids") {
        let ids = tokenizer.encode(first, SpecialTokens::Add)?;
        let theirs = integers(&rows[0]);
        let ours: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        comparison.exact("padded", "first row", theirs.starts_with(&ours));
    }
    let id = |name: &str| tokenizer.special_tokens().get(name);
    for (key, name) in [
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("pad", "pad_token"),
        ("unk", "unk_token"),
    ] {
        let ours = id(name).and_then(|token| tokenizer.token_id(token));
        comparison.exact("special tokens", key, json!(ours) == recorded[key]);
    }
    let size = json!(tokenizer.vocab_size());
    comparison.exact("vocab_size", "vocab_size", size == recorded["vocab_size"]);
    Ok(comparison)
}

fn compare_probe(
    tokenizer: &Tokenizer,
    name: &str,
    probe: &Value,
    comparison: &mut Comparison,
) -> Result<()> {
    let written = text(probe, "text").unwrap_or_default();
    let ids = tokenizer.encode(written, SpecialTokens::Add)?;
    comparison.exact("ids", name, json!(ids) == probe["ids"]);
    let plain = tokenizer.encode_with_offsets(written, SpecialTokens::Omit)?;
    comparison.exact(
        "ids without special tokens",
        name,
        json!(plain.ids) == probe["ids_no_special"],
    );
    let tokens: Vec<_> = plain.ids.iter().map(|&id| tokenizer.token(id)).collect();
    comparison.exact("tokens", name, json!(tokens) == probe["tokens"]);
    // Theirs count characters; a token may hold a part of one.
    let characters = |bytes: usize| written.char_indices().take_while(|c| c.0 < bytes).count();
    let whole = |byte: usize| match written.is_char_boundary(byte) {
        true => characters(byte),
        false => characters(byte) - 1,
    };
    let offsets: Vec<_> = plain
        .offsets
        .iter()
        .map(|o| [whole(o.0), characters(o.1)])
        .collect();
    comparison.exact("offsets", name, json!(offsets) == probe["offsets"]);
    for (key, decoding) in [
        ("decoded", Decoding::KeepSpecialTokens),
        ("decoded_skip_special", Decoding::SkipSpecialTokens),
    ] {
        let decoded = tokenizer.decode(&plain.ids, decoding)?;
        comparison.exact(key, name, json!(decoded) == probe[key]);
    }
    Ok(())
}
