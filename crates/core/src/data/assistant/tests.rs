use super::mask_of_spans;
use crate::data::fixtures::{folders, read_json, report, roots};
use crate::data::prepare::{PrepareOptions, Preparer, Row};
use crate::data::record::{Record, RecordKind};
use crate::data::tokenizer::{SpecialTokens, Tokenizer};
use crate::data::{Conversation, Ending, IGNORE_INDEX};
use serde_json::{Map, Value, json};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Templates that write what is said more than once, or otherwise than it is said, or have the head of a
/// turn, or what may be in the generation prompt, inside their tags: how they render is recorded, and
/// what they train is what their tags say.
const ODD: [&str; 6] = [
    "hard_documents",
    "hard_features2",
    "hard_gen_macro",
    "hard_python",
    "hard_reasoning",
    "hard_zephyr_gen",
];

/// A recorded template with its conversations, and whether it has tags of its own.
struct Recorded {
    name: String,
    source: String,
    tagged: bool,
    tokenizer: Tokenizer,
    conversations: Vec<Value>,
}

fn recorded(root: &Path) -> Vec<Recorded> {
    let read = |folder: &std::path::PathBuf| {
        let cases = read_json(&folder.join("cases.json"));
        let name = cases["tokenizer"].as_str().expect("a tokenizer is named");
        let name = name.rsplit('/').next().expect("a path has a last part");
        let path = root.join("tokenizers").join(name);
        let source = std::fs::read_to_string(folder.join("template.jinja"));
        let source = source.expect("the template is readable");
        let mut tokenizer = Tokenizer::from_dir(&path).expect("the tokenizer loads");
        tokenizer
            .set_chat_template(&source)
            .expect("the template compiles");
        let tagged = tokenizer
            .chat_template(None)
            .is_some_and(crate::data::ChatTemplate::has_generation_tags);
        let closed = cases["cases"].as_array().into_iter().flatten().filter(|c| {
            c["add_generation_prompt"] == false
                && c["kwargs"].get("continue_final_message").is_none()
                && c.get("error").is_none()
                // This template prints what a tool says as the assistant's words.
                && !(folder.ends_with("alpaca_plain") && c["conversation"] == "tools")
        });
        Recorded {
            name: folder.display().to_string(),
            source,
            tagged,
            tokenizer,
            conversations: closed.cloned().collect(),
        }
    };
    folders(&root.join("chat_templates"))
        .iter()
        .filter(|folder| !ODD.iter().any(|name| folder.ends_with(name)))
        .map(read)
        .collect()
}

fn row(case: &Value) -> Row {
    let mut variables = case["kwargs"].as_object().cloned().unwrap_or_default();
    let tools = variables.remove("tools").unwrap_or(Value::Null);
    let row = json!({"messages": case["messages"], "tools": tools,
                     "chat_template_kwargs": variables});
    let row = row.as_object().expect("a row is an object");
    Row {
        record: Record::from_row(row, "text").expect("the row is well formed"),
        path: Arc::from(Path::new("rows.jsonl")),
        line: 1,
        label: None,
    }
}

/// Text and whether it is trained, of every token.
fn trained(tokenizer: &Tokenizer, case: &Value) -> Result<Vec<(String, bool)>, String> {
    let options = PrepareOptions {
        assistant_only_loss: true,
        ..PrepareOptions::default()
    };
    let preparer =
        Preparer::new(tokenizer, &options, RecordKind::Messages).expect("the options apply");
    let row = row(case);
    let example = preparer.prepare(&row).map_err(|e| e.to_string())?;
    let Record::Messages { messages, inputs } = &row.record else {
        panic!("the row holds messages");
    };
    let tools = inputs.tools.as_ref();
    let rendered = tokenizer
        .chat_template(tools)
        .expect("there is a template")
        .render(&Conversation {
            messages,
            tools,
            variables: &inputs.chat_template_kwargs,
            ending: Ending::Closed,
        })
        .expect("it rendered before");
    let encoded = tokenizer
        .encode_with_offsets(&rendered.text, SpecialTokens::Omit)
        .expect("it was encoded before");
    assert_eq!(encoded.ids, example.input_ids);
    let tokens = encoded.offsets.iter().zip(&example.labels);
    Ok(tokens
        .map(|(o, label)| {
            let text = rendered.text.get(o.0..o.1).unwrap_or("\u{fffd}");
            (text.to_owned(), *label != IGNORE_INDEX)
        })
        .collect())
}

/// The text of the tokens that are trained, or of those that are not.
fn text(tokens: &[(String, bool)], trained: bool) -> String {
    let chosen = tokens.iter().filter(|(_, t)| *t == trained);
    chosen.map(|(text, _)| text.as_str()).collect()
}

/// The template without its tags. What was a tag stays a block, so the white space around it is as before.
fn untagged(source: &str) -> String {
    source
        .replace(" endgeneration ", " endif ")
        .replace(" generation ", " if true ")
}

/// Trains every recorded conversation of every template that has tags, with them and without: how many
/// templates and conversations are the same, and how many are refused with one of `reasons`.
fn compare_without_tags(
    root: &Path,
    without: impl Fn(&str) -> String,
    reasons: &[&str],
) -> [usize; 3] {
    let (mut same, mut refused, mut templates) = (0, 0, 0);
    for template in recorded(root).iter_mut().filter(|t| t.tagged) {
        templates += 1;
        let tagged: Vec<_> = template
            .conversations
            .iter()
            .map(|case| trained(&template.tokenizer, case).expect("it has tags"))
            .collect();
        template
            .tokenizer
            .set_chat_template(&without(&template.source))
            .expect("the template compiles");
        for (case, tagged) in template.conversations.iter().zip(tagged) {
            match trained(&template.tokenizer, case) {
                Ok(found) => {
                    // Line breaks around a turn are inside some tags and outside others.
                    let differs = found
                        .iter()
                        .zip(&tagged)
                        .find(|(a, b)| a.1 != b.1 && !a.0.trim().is_empty());
                    assert_eq!(differs, None, "{} {}", template.name, case["messages"]);
                    same += 1;
                }
                Err(message) => {
                    let is_told = reasons.iter().any(|reason| message.contains(reason));
                    assert!(is_told, "{message}");
                    refused += 1;
                }
            }
        }
    }
    [templates, same, refused]
}

#[test]
fn without_its_tags_a_template_trains_the_same_tokens() {
    for root in roots("templates without their tags") {
        let reasons = ["differently once others"];
        let [templates, same, refused] = compare_without_tags(&root, untagged, &reasons);
        report(&format!(
            "{templates} templates: {same} conversations, {refused} whose history is rewritten"
        ));
        assert!(templates >= 8 && same >= 80 && refused <= 8);
    }
}

#[test]
fn without_tags_and_without_a_generation_prompt_the_header_is_not_trained() {
    for root in roots("templates without tags and generation prompt") {
        let reasons = ["differently once others", "ignores `add_generation_prompt`"];
        let without = |source: &str| untagged(source).replace("add_generation_prompt", "false");
        let [templates, same, refused] = compare_without_tags(&root, without, &reasons);
        report(&format!(
            "{templates} templates: {same} conversations, {refused} refused"
        ));
        assert!(templates >= 8 && same >= 70 && refused <= 16);
    }
}

#[test]
fn every_stock_template_trains_exactly_what_the_assistant_says() {
    for root in roots("stock templates") {
        let (mut run, mut rewriting) = (0, Vec::new());
        for template in recorded(&root) {
            for case in &template.conversations {
                let tokens = match trained(&template.tokenizer, case) {
                    Ok(tokens) => tokens,
                    Err(message) => {
                        assert!(message.contains("rows.jsonl:1: "), "{message}");
                        let is_told = ["the template renders", "the template ignores"];
                        assert!(
                            is_told.iter().any(|part| message.contains(part)),
                            "{message}"
                        );
                        rewriting.push(format!("{} {}", template.name, case["conversation"]));
                        continue;
                    }
                };
                let (ours, others) = (text(&tokens, true), text(&tokens, false));
                for message in case["messages"].as_array().into_iter().flatten() {
                    let Some(content) = message["content"].as_str().map(str::trim) else {
                        continue;
                    };
                    let in_full = format!("{ours}{others}").contains(content);
                    let place = if message["role"] == "assistant" {
                        &ours
                    } else {
                        &others
                    };
                    assert!(
                        !in_full || place.contains(content),
                        "{} {}: `{content}` of {}",
                        template.name,
                        case["conversation"],
                        message["role"]
                    );
                }
                run += 1;
            }
        }
        report(&format!(
            "{run} conversations; history is rewritten in {rewriting:?}"
        ));
        assert!(run >= 150, "{run}");
    }
}

#[test]
fn turns_end_with_their_own_token_in_the_middle_and_at_the_end() {
    // As Phi-3 does: a token of the whole conversation after the last turn.
    let ends_conversation = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n\
                             {% endfor %}{% if add_generation_prompt %}<|assistant|>\n\
                             {% else %}<|endoftext|>{% endif %}";
    // As GPT-OSS does: another token after the last turn.
    let other_last = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\
                      {% if loop.last and m.role == 'assistant' %}<|im_end|>{% else %}<|end|>\
                      {% endif %}{% endfor %}\
                      {% if add_generation_prompt %}<|assistant|>{% endif %}";
    let table = [
        (ends_conversation, "w1<|end|>\nw3<|end|>\n<|endoftext|>"),
        (other_last, "w1<|end|>w3<|im_end|>"),
    ];
    for (source, expected) in table {
        assert_eq!(said(source, &turns(4)), Ok(expected.to_owned()));
    }
}

/// Turns of user and assistant, which say `w0`, `w1` and so on.
fn turns(n: usize) -> Vec<Value> {
    let role = |i: usize| ["user", "assistant"][i % 2];
    (0..n)
        .map(|i| json!({"role": role(i), "content": format!("w{i}")}))
        .collect()
}

/// The text that a template trains of a conversation.
fn said(source: &str, messages: &[Value]) -> Result<String, String> {
    let path = crate::data::fixtures::repository().join("tokenizers/bpe_llama3");
    let mut tokenizer = Tokenizer::from_dir(&path).expect("the tokenizer loads");
    tokenizer
        .set_chat_template(source)
        .expect("the template compiles");
    let case = json!({"messages": messages, "kwargs": Map::new()});
    Ok(text(&trained(&tokenizer, &case)?, true))
}

#[test]
fn another_name_that_the_template_has_for_the_assistant_is_the_assistant() {
    let source = "{% for m in messages %}{% if m.role in ['assistant', 'model'] %}<|model|>{% else %}<|{{ m.role }}|>\
                  {% endif %}{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|model|>{% endif %}";
    let mut messages = turns(4);
    messages[1]["role"] = json!("model");
    assert_eq!(said(source, &messages), Ok("w1<|end|>w3<|end|>".to_owned()));
}

const PLAIN: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}";
const PROMPT: &str = "{% if add_generation_prompt %}<|assistant|>{% endif %}";

#[test]
fn what_a_template_writes_behind_a_conversation_is_not_trained() {
    let footer = "{% if not add_generation_prompt %}FOOTER of {{ messages|length }}{% endif %}";
    for count in [2, 4] {
        let all = ["w1<|end|>", "w1<|end|>w3<|end|>"][count / 2 - 1].to_owned();
        let source = format!("{PLAIN}{PROMPT}{footer}");
        assert_eq!(said(&source, &turns(count)), Ok(all.clone()));
        // Behind an answer alone, so that no rendering of what comes before it shows it.
        let behind_answer =
            footer.replace("not add", "messages[-1].role == 'assistant' and not add");
        let source = format!("{PLAIN}{PROMPT}{behind_answer}");
        assert_eq!(said(&source, &turns(count)), Ok(all.clone()));
        // No generation prompt either: neither header nor footer.
        let source = format!("{PLAIN}{footer}");
        assert_eq!(said(&source, &turns(count)), Ok(all));
    }
    // A footer that says what the assistant says cannot be told from it.
    let echo = "{% if not add_generation_prompt %}You said {{ messages[-1].content }}{% endif %}";
    let message = said(&format!("{PLAIN}{PROMPT}{echo}"), &turns(2)).expect_err("an echo");
    assert!(message.contains("rows.jsonl:1: "), "{message}");
}

#[test]
fn a_turn_that_says_nothing_is_trained_to_its_end_or_refused() {
    let empty = |at: usize| {
        let mut turns = turns(4);
        turns[at]["content"] = json!("");
        turns
    };
    let plain = format!("{PLAIN}{PROMPT}");
    for (at, expected) in [(1, "<|end|>w3<|end|>"), (3, "w1<|end|><|end|>")] {
        assert_eq!(said(&plain, &empty(at)), Ok(expected.to_owned()));
    }
    // Thoughts are written of the last turn alone, as Qwen 3 does.
    let thinks = "{% for m in messages %}<|{{ m.role }}|>\
                  {% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}\
                  {{ m.content }}<|end|>{% endfor %}";
    let source = format!("{thinks}{PROMPT}");
    for messages in [turns(4), empty(1)] {
        let message = said(&source, &messages).expect_err("the history is rewritten");
        assert!(message.contains("message 1 (counted from 0)"), "{message}");
    }
    let expected = Ok("<think></think>w1<|end|>".to_owned());
    assert_eq!(said(&source, &turns(2)), expected);
}

/// Recorded with transformers 5.24.0: before, of a character that takes several tokens and ends a block only
/// the first token was the assistant's.
#[test]
fn a_block_has_all_tokens_of_its_last_character() {
    let template = "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}\
                    {{ m.content }}{% endgeneration %}.{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let recorded = [
        ("bpe_qwen2", "b\u{1f44d}", "000000011111000000"),
        ("bpe_qwen2", "\u{65e5}\u{672c}", "0000000111111000000"),
        ("bpe_llama3", "\u{e9}\u{301}", "00000001111000000"),
        (
            "bpe_bytefallback_llama2",
            "b\u{1f44d}",
            "000000001111110000000",
        ),
        (
            "bpe_bytefallback_llama2",
            "\u{1f44d}",
            "00000000111110000000",
        ),
        ("bpe_qwen2", "", "0000000000000"),
    ];
    for (name, content, mask) in recorded {
        let path = crate::data::fixtures::repository()
            .join("tokenizers")
            .join(name);
        let mut tokenizer = Tokenizer::from_dir(&path).expect("the tokenizer loads");
        tokenizer.set_chat_template(template).expect("it compiles");
        let messages = json!([{"role": "user", "content": "a\u{1f44d}"},
            {"role": "assistant", "content": content}, {"role": "user", "content": "\u{1f44d}"}]);
        let case = json!({"messages": messages, "kwargs": Map::new()});
        let found = trained(&tokenizer, &case).expect("it has tags");
        let found: String = found
            .iter()
            .map(|(_, t)| ["0", "1"][usize::from(*t)])
            .collect();
        assert_eq!(found, mask, "{name} {content}");
    }
}

/// The bytes of the tokens that are trained where `spans` of a text are the assistant's.
fn trained_of(tokenizer: &str, text: &str, spans: &[Range<usize>]) -> Vec<Range<usize>> {
    let path = roots("trained_of")[0].join("tokenizers").join(tokenizer);
    let tokenizer = Tokenizer::from_dir(&path).expect("the tokenizer loads");
    let encoded = tokenizer.encode_with_offsets(text, SpecialTokens::Omit);
    let encoded = encoded.expect("encodes");
    let mask = mask_of_spans(&encoded, spans);
    let tokens = encoded.offsets.iter().zip(mask);
    let trained = tokens.filter(|(_, trained)| *trained);
    trained.map(|(&(begin, end), _)| begin..end).collect()
}

/// A combining mark that the tokenizer's normaliser joins with the letter before it has no token: what is trained ends
/// with the letter, not with the row.
#[test]
fn a_last_character_without_a_token_ends_the_span_before_it() {
    for answer in ["cafe\u{301}", "a\u{323}"] {
        let text = format!("{answer} then {answer} SECRET");
        let second = answer.len() + " then ".len();
        let spans = [0..answer.len(), second..second + answer.len()];
        let trained = trained_of("bpe_qwen2", &text, &spans);
        // A token may begin with the space before the answer.
        let within = |token: &Range<usize>, span: &Range<usize>| {
            span.start < token.end && token.end <= span.end
        };
        for span in &spans {
            let inside = trained.iter().filter(|token| within(token, span));
            let begin = inside.map(|token| token.start).min();
            assert!(
                begin.is_some_and(|at| at <= span.start),
                "{answer}: {trained:?}"
            );
        }
        let in_one = |token: &Range<usize>| spans.iter().any(|span| within(token, span));
        assert!(trained.iter().all(in_one), "{answer}: {trained:?}");
    }
}

/// A first character that the normaliser drops leaves what comes after it trained.
#[test]
fn a_first_character_without_a_token_leaves_the_rest_trained() {
    let text = "user:  hi there";
    let answer = 5..text.len();
    let trained = trained_of("wordpiece_bert", text, std::slice::from_ref(&answer));
    let words: String = trained.into_iter().map(|token| &text[token]).collect();
    assert_eq!(words, "hithere");
}
