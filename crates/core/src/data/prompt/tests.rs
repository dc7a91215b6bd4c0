use super::Prompt;
use crate::data::batch::IGNORE_INDEX;
use crate::data::fixtures::{put_behind_every_text, read_json, repository};
use crate::data::{PrepareOptions, Preparer, Record, Row, Tokenizer};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// Shows everything that a row can bring: tools, a variable, roles and contents.
const TEMPLATE: &str = "{% if tools %}<tools>{{ tools | tojson }}{% endif %}\
    {% if style is defined %}<style>{{ style }}{% endif %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A tokenizer of the fixtures with another configuration.
fn tokenizer(name: &str, config: &Value) -> Tokenizer {
    tokenizer_with(name, config, None)
}

/// The same that puts a token, which has an id, behind every text.
fn tokenizer_with(name: &str, config: &Value, behind: Option<(&str, u32)>) -> Tokenizer {
    let source = repository().join("tokenizers").join(name);
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let mut settings = read_json(&source.join("tokenizer_config.json"));
    let keys = config.as_object().expect("an object of keys").clone();
    settings.as_object_mut().expect("an object").extend(keys);
    let at = |file: &str| directory.path().join(file);
    std::fs::copy(source.join("tokenizer.json"), at("tokenizer.json")).expect("copied");
    std::fs::write(at("tokenizer_config.json"), settings.to_string()).expect("written");
    if let Some((token, id)) = behind {
        put_behind_every_text(directory.path(), token, id);
    }
    Tokenizer::from_dir(directory.path()).expect("the tokenizer loads")
}

fn record(row: &Value) -> Record {
    let row = row.as_object().expect("a row is an object");
    Record::from_row(row, "text").expect("the row is well formed")
}

/// Token ids of the row's prompt, and the token ids that training makes of the row: those before
/// the first that is trained, where the prompt is masked, else all.
fn asked_and_trained(tokenizer: &Tokenizer, row: &Value) -> (Vec<u32>, Vec<u32>) {
    let (prompt, _) = Prompt::with_answer(record(row)).expect("the row has an answer");
    let asked = prompt.encode(tokenizer).expect("the prompt can be encoded");
    let row = Row {
        record: record(row),
        path: Arc::from(Path::new("rows.jsonl")),
        line: 1,
        label: None,
    };
    let options = PrepareOptions::default();
    let preparer = Preparer::new(tokenizer, &options, row.record.kind()).expect("applies");
    let example = preparer.prepare(&row).expect("the row can be prepared");
    let masked = example.labels.iter().take_while(|l| **l == IGNORE_INDEX);
    let given = match masked.count() {
        0 => asked.len(),
        count => count,
    };
    (asked, example.input_ids[..given].to_vec())
}

#[test]
fn text_is_asked_with_the_special_tokens_of_training() {
    let row = json!({"prompt": "hello", "completion": "x"});
    for (name, eos) in [
        ("bpe_llama3", ("<|eot_id|>", 11)),
        ("bpe_qwen2", ("<|im_end|>", 5)),
        ("bpe_bytefallback_llama2", ("</s>", 3)),
    ] {
        for behind in [None, Some(eos)] {
            let config = json!({"chat_template": TEMPLATE});
            let tokenizer = tokenizer_with(name, &config, behind);
            assert_eq!(tokenizer.eos_id(), Some(eos.1), "{name}");
            let (asked, trained) = asked_and_trained(&tokenizer, &row);
            assert_eq!(asked, trained, "{name} {behind:?}");
            assert_ne!(
                asked.last().copied(),
                tokenizer.eos_id(),
                "{name} {behind:?}"
            );
        }
    }
}

#[test]
fn an_eos_token_that_the_prompt_itself_ends_with_stays() {
    let prompt = Prompt::Text("hello<|eot_id|>".into());
    for (behind, expected) in [
        (None, &[7, 106, 327, 418, 11][..]),
        (Some(("<|eot_id|>", 11)), &[106, 327, 418, 11]),
    ] {
        let tokenizer = tokenizer_with("bpe_llama3", &json!({}), behind);
        let ids = prompt.encode(&tokenizer).expect("encoded");
        assert_eq!(ids, expected, "{behind:?}");
    }
}

#[test]
fn conversations_are_asked_with_the_tools_and_variables_of_their_row() {
    let tokenizer = tokenizer("bpe_qwen2", &json!({"chat_template": TEMPLATE}));
    let user = json!({"role": "user", "content": "hello"});
    let assistant = json!({"role": "assistant", "content": "x"});
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let pair = json!({"prompt": [user], "completion": [assistant]});
    let conversation = json!({"messages": [user, assistant]});
    let mut lengths = Vec::new();
    for row in [pair, conversation] {
        for extra in [
            json!({}),
            json!({ "tools": tools }),
            json!({"chat_template_kwargs": {"style": "short"}}),
        ] {
            let mut row = row.clone();
            let extra = extra.as_object().expect("an object").clone();
            row.as_object_mut().expect("an object").extend(extra);
            let (asked, trained) = asked_and_trained(&tokenizer, &row);
            assert_eq!(asked, trained, "{row}");
            lengths.push(asked.len());
        }
    }
    assert_eq!(lengths[..3], lengths[3..]);
    assert!(lengths[0] < lengths[1] && lengths[0] < lengths[2]);
}

#[test]
fn a_conversation_without_a_chat_template_is_refused() {
    let tokenizer = tokenizer("bpe_llama3", &json!({}));
    let message = Prompt::user("hello").encode(&tokenizer);
    let message = message.expect_err("no template").to_string();
    assert!(
        message.contains("tokenizer.json") && message.contains("no chat template"),
        "{message}"
    );
}

#[test]
fn rows_are_read_with_or_without_their_answer() {
    let turn = json!([{"role": "user", "content": "a"}]);
    let read = |row: &Value| Prompt::from_row(row.as_object().expect("an object"));
    let chat = Ok(Prompt::user("a"));
    let text = Ok(Prompt::Text("a".into()));
    for (row, expected) in [
        (json!({"prompt": "a"}), &text),
        (json!({"prompt": "a", "completion": "b"}), &text),
        (json!({"prompt": "a", "messages": turn}), &text),
        (json!({ "prompt": turn }), &chat),
        (json!({"prompt": turn, "completion": turn}), &chat),
        (json!({ "messages": turn }), &chat),
    ] {
        assert_eq!(&read(&row), expected, "{row}");
    }
    for (row, expected) in [
        (json!({"prompt": 1}), "found a number"),
        (json!({"prompt": []}), "`prompt` holds no message"),
        (json!({"text": "a"}), "found `text`; expected `prompt`"),
        (json!({"messages": [1]}), "`messages[0]`"),
    ] {
        let message = read(&row).expect_err("the row is wrong");
        assert!(message.contains(expected), "{message} lacks {expected}");
    }
}
