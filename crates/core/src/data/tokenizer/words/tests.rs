//! Word by word is the same as the library's own way.

use super::{Words, form};
use crate::data::fixtures::{folders, read_json, repository};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;

/// Patterns of models: GPT-4o and gpt-oss, DeepSeek V3, Mistral's Tekken, Qwen 3.5.
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];
const ONLY_WORDS: &str = r"\p{L}+";

fn load(file: &Value) -> tokenizers::Tokenizer {
    serde_json::from_value(file.clone()).expect("the file is a tokenizer")
}

fn fixture(name: &str) -> Value {
    read_json(
        &repository()
            .join("tokenizers")
            .join(name)
            .join("tokenizer.json"),
    )
}

/// The byte-level fixture with other steps before its bytes.
fn with_steps(steps: &[Value], use_regex: bool) -> Value {
    let mut file = fixture("bpe_qwen2");
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                       "use_regex": use_regex});
    let steps = [steps, &[bytes]].concat();
    file["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": steps});
    file
}

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

/// Added tokens that take spaces with them, that match normalised text, and that begin alike.
fn with_added(mut file: Value) -> Value {
    let added = file["added_tokens"].as_array_mut().expect("a list");
    for (id, content, lstrip, rstrip, normalized) in [
        (900, "<x>", false, true, false),
        (901, "<x><x>", true, true, false),
        (902, "<é>", true, false, true),
        (903, "ab", false, false, true),
    ] {
        added.push(
            json!({"id": id, "content": content, "lstrip": lstrip, "rstrip": rstrip,
            "single_word": false, "normalized": normalized, "special": false}),
        );
    }
    file
}

/// Every tokenizer that is to be encoded word by word, by name.
fn known() -> Vec<(String, tokenizers::Tokenizer)> {
    let mut files = vec![
        ("o200k".to_owned(), with_steps(&[split(O200K)], false)),
        ("deepseek".into(), with_steps(&DEEPSEEK.map(split), false)),
        ("gaps".into(), with_steps(&[split(ONLY_WORDS)], false)),
        (
            "digits".into(),
            with_steps(
                &[json!({"type": "Digits", "individual_digits": true})],
                true,
            ),
        ),
        (
            "runs".into(),
            with_steps(
                &[json!({"type": "Digits", "individual_digits": false})],
                true,
            ),
        ),
    ];
    let llama = |normalizer: Value, pre_tokenizer: Value| {
        let mut file = fixture("bpe_bytefallback_llama2");
        file["normalizer"] = normalizer;
        file["pre_tokenizer"] = pre_tokenizer;
        file
    };
    let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": false});
    for scheme in ["never", "first", "always"] {
        files.push((scheme.to_owned(), llama(Value::Null, metaspace(scheme))));
    }
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let idle = json!({"type": "Split", "pattern": {"String": " "},
                      "behavior": "MergedWithPrevious", "invert": false});
    files.push(("gemma".to_owned(), llama(replace, idle)));
    files.push((
        "whole".to_owned(),
        with_added(llama(Value::Null, Value::Null)),
    ));
    let mut fused = fixture("bpe_bytefallback_llama2");
    fused["model"]["byte_fallback"] = json!(false);
    files.push(("unknown".to_owned(), fused));
    let mut plain = with_added(fixture("bpe_llama3"));
    plain["normalizer"] = Value::Null;
    files.push(("added".into(), plain));
    for name in [
        "bpe_llama3",
        "bpe_qwen2",
        "bpe_bytelevel",
        "bpe_bytefallback_llama2",
    ] {
        files.push((name.to_owned(), fixture(name)));
    }
    files
        .into_iter()
        .map(|(name, file)| (name, load(&file)))
        .collect()
}

/// Compares with the library, special tokens and offsets included.
fn check(name: &str, tokenizer: &tokenizers::Tokenizer, words: &Words, text: &str) -> bool {
    let mut taken = false;
    for special in [false, true] {
        let expected = tokenizer
            .encode(text, special)
            .expect("the library encodes");
        let found = words
            .encode(tokenizer, text, special, true)
            .expect("it encodes");
        if let Some(found) = found {
            taken = true;
            assert_eq!(found.ids, expected.get_ids(), "{name}: {text:?}");
            assert_eq!(found.offsets, expected.get_offsets(), "{name}: {text:?}");
        }
    }
    taken
}

fn all() -> Vec<(String, tokenizers::Tokenizer, Words)> {
    let of = |(name, tokenizer): (String, tokenizers::Tokenizer)| {
        let words = Words::of(&tokenizer).unwrap_or_else(|| panic!("{name} has words"));
        (name, tokenizer, words)
    };
    known().into_iter().map(of).collect()
}

#[test]
fn texts_with_every_trap_are_the_same() {
    let texts = [
        "",
        " ",
        "  ",
        "\n",
        " \n ",
        "a",
        " a",
        "  a",
        "a  b   c\t\td \n\n e",
        "it's IT'S we'LL o'clock",
        "12345 1 22 ³½ ٣٤٥",
        "日本語のテキスト 漢字かな交じり、です。",
        "naïve café Größe ǅ ʰ",
        "a\u{301}e\u{300}\u{323} \u{1e9b}\u{323}",
        "👩‍👩‍👧 🙂🙂",
        "<|im_start|>user\nhi<|im_end|>",
        "<x> <x><x>  b  <é> ab",
        "\u{a0}\u{2003}x\u{2003}\u{a0}",
        "\u{2581}a \u{2581}\u{2581}b",
        "\r\n\r x\r",
        "...!!! ?? //\n/",
        "\u{1c}\u{85}x\u{85}y",
        "</s>a</s> b",
        " <s> ",
        "a<|im_end|>\n<|im_start|>",
        "\0\u{7f}\u{80}",
        "snake_case CamelCaseXYz",
        "\u{feff}bom",
    ];
    for (name, tokenizer, words) in all() {
        let taken = texts
            .iter()
            .filter(|text| check(&name, &tokenizer, &words, text))
            .count();
        assert!(
            taken >= texts.len() - 1,
            "{name}: {taken} texts of {}",
            texts.len()
        );
    }
}

#[test]
fn recorded_texts_are_the_same_twice() {
    let mut probes = 0;
    for (name, tokenizer, words) in all() {
        for folder in folders(&repository().join("tokenizers")) {
            let path = folder.join("encodings.json");
            let recorded = if path.is_file() {
                read_json(&path)
            } else {
                Value::Null
            };
            for probe in recorded["probes"].as_array().into_iter().flatten() {
                let text = probe["text"].as_str().expect("a probe has a text");
                // The second time words come from memory.
                for _ in 0..2 {
                    check(&name, &tokenizer, &words, text);
                    probes += 1;
                }
            }
        }
    }
    assert!(probes > 500, "{probes}");
}

/// Text of what tokenizers trip over.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just(" ".to_owned()),
        Just("  ".to_owned()),
        Just("\n".to_owned()),
        Just("\r\n".to_owned()),
        Just("\t".to_owned()),
        Just("'s".to_owned()),
        Just("'LL".to_owned()),
        Just("\u{2581}".to_owned()),
        Just("<|im_start|>".to_owned()),
        Just("<x>".to_owned()),
        Just("<é>".to_owned()),
        Just("</s>".to_owned()),
        Just("\u{301}".to_owned()),
        Just("\u{3000}".to_owned()),
        "[a-zA-Z]{1,6}",
        "[0-9]{1,5}",
        "[!-/:-@]{1,3}",
        "\\PC{1,3}",
        any::<char>().prop_map(String::from),
        "[\u{4e00}-\u{4e20}\u{3040}-\u{30ff}]{1,3}",
        "[\u{c0}-\u{24f}]{1,3}",
    ];
    proptest::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

#[test]
fn any_text_is_the_same() {
    let all = all();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(1500));
    let same = runner.run(&text(), |text| {
        for (name, tokenizer, words) in &all {
            check(name, tokenizer, words, &text);
        }
        Ok(())
    });
    same.unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn text_that_is_not_normalised_goes_the_long_way() {
    let tokenizer = load(&fixture("bpe_qwen2"));
    let words = Words::of(&tokenizer).expect("it has words");
    let encode = |text| {
        words
            .encode(&tokenizer, text, false, false)
            .expect("it encodes")
    };
    assert!(encode("caf\u{e9}").is_some());
    assert!(encode("cafe\u{301}").is_none());
}

#[test]
fn tokenizers_of_other_kinds_have_no_words() {
    let mut prefix = fixture("bpe_bytelevel");
    prefix["pre_tokenizer"]["add_prefix_space"] = json!(true);
    let possessive = with_steps(&[split(r"\p{L}++|\s+")], false);
    let lookbehind = with_steps(&[split(r"(?<=a)b")], false);
    let mut bytes = fixture("bpe_bytefallback_llama2");
    bytes["model"]["vocab"]["<0x41><0x42>"] = json!(5000);
    let mut unknown = fixture("bpe_bytefallback_llama2");
    unknown["model"]["vocab"]["<unk>a"] = json!(5000);
    let mut single = fixture("bpe_bytelevel");
    single["added_tokens"][0]["single_word"] = json!(true);
    let normalized = with_added(fixture("bpe_qwen2"));
    for (name, file) in [
        ("a space before", prefix),
        ("possessive", possessive),
        ("lookbehind", lookbehind),
        ("merged bytes", bytes),
        ("merged unknown", unknown),
        ("whole words", single),
        ("normalised added tokens", normalized),
        ("unigram", fixture("unigram_xlmr")),
        ("wordpiece", fixture("wordpiece_bert")),
    ] {
        assert!(Words::of(&load(&file)).is_none(), "{name}");
    }
}

#[test]
fn offsets_that_are_trimmed_are_left_to_the_library() {
    let mut file = fixture("bpe_bytelevel");
    file["post_processor"]["trim_offsets"] = json!(true);
    let tokenizer = load(&file);
    assert_eq!(form::keeps_offsets(&tokenizer), Some(false));
    let words = Words::of(&tokenizer).expect("it has words");
    assert!(
        words
            .encode(&tokenizer, "a b", false, true)
            .expect("it encodes")
            .is_none()
    );
    assert!(
        words
            .encode(&tokenizer, "a b", false, false)
            .expect("it encodes")
            .is_some()
    );
}

/// The demonstration's tokenizer is one that people train, so it should be quick too.
#[test]
fn the_demo_has_words() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/demo/base/tokenizer.json");
    assert!(Words::of(&load(&read_json(&path))).is_some());
}
