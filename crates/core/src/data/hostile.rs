//! Rows and templates that cannot be used: each is refused with file, line and reason, or skipped where
//! the options say so, in bounded time and memory.

use crate::data::fixtures::repository;
use crate::data::{BadRows, Dataset, PrepareOptions, Tokenizer};
use std::path::Path;
use std::time::{Duration, Instant};

/// What a run of a table may take. A minute is far beyond what bounded work needs; an endless loop or a
/// file that fills memory is beyond it too.
const LONGEST: Duration = Duration::from_secs(60);

const CHAT: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const GOOD_TEXT: &str = r#"{"text": "good"}"#;
const GOOD_CHAT: &str =
    r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#;
const GOOD_PAIR: &str = r#"{"prompt": "q", "completion": "a"}"#;
const GOOD_TOKENS: &str = r#"{"input_ids": [7, 8], "labels": [-100, 8]}"#;

fn load(
    directory: &Path,
    lines: &[&[u8]],
    template: &str,
    options: &PrepareOptions,
) -> Result<Dataset, String> {
    let path = directory.join("rows.jsonl");
    std::fs::write(&path, lines.join(b"\n".as_slice())).expect("the file is writable");
    let mut tokenizer = Tokenizer::from_dir(&repository().join("tokenizers/bpe_llama3"))
        .expect("the tokenizer loads");
    tokenizer
        .set_chat_template(template)
        .map_err(|e| e.to_string())?;
    Dataset::load(&[path], &tokenizer, options).map_err(|e| e.to_string())
}

fn options(bad_rows: BadRows) -> PrepareOptions {
    PrepareOptions {
        bad_rows,
        ..PrepareOptions::default()
    }
}

/// A bad row in line 2 between good ones: refused by default, and left out with the same words.
fn check(name: &str, good: &str, bad: &[u8], template: &str, reason: &str) {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let begin = Instant::now();
    let lines = [good.as_bytes(), bad, good.as_bytes()];
    let refused = load(directory.path(), &lines, template, &options(BadRows::Error));
    let message = refused.expect_err(name);
    let place = "rows.jsonl:2: ";
    assert!(
        message.contains(place) && message.contains(reason),
        "{name}: {message} lacks {place} or {reason}"
    );
    assert!(message.len() < 2000, "{name}: {} bytes", message.len());
    let skipped = load(directory.path(), &lines, template, &options(BadRows::Skip));
    let dataset = skipped.unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(dataset.examples.len(), 2, "{name}");
    assert_eq!(dataset.report.bad_rows, 1, "{name}");
    assert_eq!(dataset.report.bad_row_messages, [message], "{name}");
    assert!(begin.elapsed() < LONGEST, "{name}: {:?}", begin.elapsed());
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table of rows")]
fn rows_that_cannot_be_used_are_refused_or_skipped() {
    let deep = format!(
        r#"{{"text": {}1{}}}"#,
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let wide = format!(r#"{{"text": "{}"}}"#, "x".repeat(65 << 20));
    let chat = |fields: &str| format!(r#"{{"messages": {fields}}}"#);
    let empty_list = chat("[]");
    let number_role = chat(r#"[{"role": 7, "content": "x"}]"#);
    let no_role = chat(r#"[{"content": "x"}]"#);
    let no_content = chat(r#"[{"role": "user", "content": "q"}, {"role": "assistant"}]"#);
    let not_a_message = chat(r#"["x"]"#);
    let object = chat("{}");
    let bad_tools = r#"{"messages": [{"role": "user", "content": "x"}], "tools": "{"}"#;
    let bad_kwargs =
        r#"{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": 1}"#;
    let kwargs = r#"{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": 1}}"#;
    let unknown_role = chat(r#"[{"role": "wizard", "content": "x"}]"#);
    let role_by_case =
        chat(r#"[{"role": "user", "content": "q"}, {"role": "Assistant", "content": "a"}]"#);
    let table: [(&str, &str, &[u8], &str); 28] = [
        (
            "broken JSON",
            GOOD_TEXT,
            br#"{"text": "a"#,
            "not valid JSON",
        ),
        (
            "two objects",
            GOOD_TEXT,
            br#"{"text": "a"} {}"#,
            "not valid JSON",
        ),
        ("NaN", GOOD_TEXT, br#"{"text": NaN}"#, "not valid JSON"),
        (
            "no object",
            GOOD_TEXT,
            br#"["text"]"#,
            "expected a JSON object",
        ),
        (
            "invalid UTF-8",
            GOOD_TEXT,
            b"{\"text\": \"\xff\"}",
            "is not valid UTF-8",
        ),
        (
            "half a surrogate",
            GOOD_TEXT,
            br#"{"text": "\ud800"}"#,
            "not valid JSON",
        ),
        (
            "deep nesting",
            GOOD_TEXT,
            deep.as_bytes(),
            "recursion limit",
        ),
        ("huge line", GOOD_TEXT, wide.as_bytes(), "longer than"),
        (
            "wrong type",
            GOOD_TEXT,
            br#"{"text": 1}"#,
            "must be a string",
        ),
        ("no column", GOOD_TEXT, br#"{"txt": "a"}"#, "is it `txt`?"),
        (
            "null column",
            GOOD_TEXT,
            br#"{"text": null}"#,
            "`text` is null",
        ),
        (
            "another kind",
            GOOD_TEXT,
            GOOD_PAIR.as_bytes(),
            "all rows must be of one kind",
        ),
        (
            "mixed kinds",
            GOOD_PAIR,
            br#"{"prompt": "a", "completion": []}"#,
            "both be strings",
        ),
        (
            "no messages",
            GOOD_CHAT,
            empty_list.as_bytes(),
            "holds no message",
        ),
        (
            "number as role",
            GOOD_CHAT,
            number_role.as_bytes(),
            "`role` must be a string",
        ),
        (
            "a message that says nothing",
            GOOD_CHAT,
            no_content.as_bytes(),
            "messages[1]",
        ),
        (
            "no role",
            GOOD_CHAT,
            no_role.as_bytes(),
            "`role` is missing",
        ),
        (
            "no message",
            GOOD_CHAT,
            not_a_message.as_bytes(),
            "expected an object",
        ),
        (
            "no list",
            GOOD_CHAT,
            object.as_bytes(),
            "must be a list of messages",
        ),
        (
            "bad tools",
            GOOD_CHAT,
            bad_tools.as_bytes(),
            "`tools` is not JSON",
        ),
        (
            "bad kwargs",
            GOOD_CHAT,
            bad_kwargs.as_bytes(),
            "must be an object",
        ),
        (
            "half a token",
            GOOD_TOKENS,
            br#"{"input_ids": [1.5]}"#,
            "expected an integer",
        ),
        (
            "lengths",
            GOOD_TOKENS,
            br#"{"input_ids": [1], "labels": [1, 2]}"#,
            "must be as many",
        ),
        (
            "a token beyond the vocabulary",
            GOOD_TOKENS,
            br#"{"input_ids": [1, 999999]}"#,
            "`input_ids` holds the token id 999999, and the vocabulary has 420 ids",
        ),
        (
            "a label beyond the vocabulary",
            GOOD_TOKENS,
            br#"{"input_ids": [1, 2], "labels": [-100, 888888]}"#,
            "`labels` holds the token id 888888, and",
        ),
        (
            "kwargs that are none",
            GOOD_CHAT,
            kwargs.as_bytes(),
            "holds `messages`, which is no variable",
        ),
        (
            "unknown role",
            GOOD_CHAT,
            unknown_role.as_bytes(),
            "message 0 (counted from 0) has the role `wizard`",
        ),
        (
            "a role in other letters",
            GOOD_CHAT,
            role_by_case.as_bytes(),
            "did you mean `assistant`?",
        ),
    ];
    for (name, good, bad, reason) in table {
        check(name, good, bad, CHAT, reason);
    }
    let double = br#"{"text": "<|begin_of_text|>x"}"#;
    check("two BOS", GOOD_TEXT, double, CHAT, "begins with two");
}

#[test]
fn rows_that_a_template_refuses_are_refused_or_skipped() {
    // Each does harm for the second row alone.
    let bad = GOOD_CHAT.replace("\"q\"", "\"bad\"");
    let table = [
        (
            "unknown role",
            "{{ raise_exception('unknown role') }}",
            "unknown role",
        ),
        (
            "endless loop",
            "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
            "works for too long",
        ),
        ("attribute escape", "{{ ''.__class__.__mro__ }}", ""),
        (
            "a call of what is not there",
            "{{ messages.__init__() }}",
            "__init__",
        ),
        (
            "include",
            "{% include '/etc/passwd' %}",
            "not available to chat templates",
        ),
        (
            "import",
            "{% import 'os' as os %}{{ os.environ }}",
            "not available to chat templates",
        ),
        (
            "endless recursion",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "recursion",
        ),
        ("much memory", "{{ 'x' * 999999999999 }}", ""),
    ];
    for (name, harm, reason) in table {
        let template = format!("{{% if messages[0].content == 'bad' %}}{harm}{{% endif %}}{CHAT}");
        if name == "attribute escape" {
            // Python's way out of its sandbox is an undefined value here, and prints nothing.
            let directory = tempfile::tempdir().expect("a temporary directory can be made");
            let harmless = template.replace("__class__.__mro__", "__class__");
            let lines = [GOOD_CHAT.as_bytes(), bad.as_bytes()];
            let options = options(BadRows::Error);
            let dataset = load(directory.path(), &lines, &harmless, &options).expect(name);
            assert_eq!(dataset.examples.len(), 2);
            continue;
        }
        check(name, GOOD_CHAT, bad.as_bytes(), &template, reason);
    }
}

#[test]
fn nothing_behind_a_row_that_is_refused_is_rendered() {
    // Each row uses up its budget of work before it fails; a thousand of them would take minutes.
    let slow =
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}";
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let lines = vec![GOOD_CHAT.as_bytes(); 1000];
    let begin = Instant::now();
    let refused = load(directory.path(), &lines, slow, &options(BadRows::Error));
    let message = refused.expect_err("every row is refused");
    assert!(message.contains("rows.jsonl:1: "), "{message}");
    assert!(begin.elapsed() < LONGEST, "{:?}", begin.elapsed());
}

#[test]
fn a_template_that_does_not_compile_is_an_error_whatever_the_rows() {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    for template in [
        "{% if %}",
        "{{ 'a' ",
        "{% for %}{% endfor %}",
        "{% unknown %}",
    ] {
        let options = options(BadRows::Skip);
        let error = load(
            directory.path(),
            &[GOOD_CHAT.as_bytes()],
            template,
            &options,
        )
        .expect_err("the template is broken");
        assert!(error.contains("line 1 of the template"), "{error}");
    }
}

#[test]
fn a_template_that_is_too_long_is_refused_and_none_is_quoted_at_length() {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let name = "x".repeat(1 << 19);
    let table = [
        (" ".repeat(100 << 20), "more than 1048576 bytes"),
        (format!("{{{{ a {name} }}}}"), "unexpected `x"),
        (format!("{{% {name} %}}"), "x"),
        (format!("{{{{ raise_exception('{name}') }}}}"), "x"),
        ("{{ (".repeat(1 << 17), "line 1 of the template"),
        (
            format!("{{{{ {}1 }}}}", "(".repeat(1 << 19)),
            "line 1 of the template",
        ),
        (
            format!(
                "{{% if 1 %}}{}{{% endif %}}",
                "{% elif 0 %}b".repeat(60_000)
            ),
            "more than 500 `elif` (line 1 of the template)",
        ),
    ];
    for (template, reason) in table {
        let begin = Instant::now();
        let rows = [GOOD_CHAT.as_bytes()];
        let error = load(directory.path(), &rows, &template, &options(BadRows::Error));
        let error = error.expect_err("it is refused");
        assert!(error.contains(reason), "{error}");
        assert!(error.len() < 2000, "{} bytes", error.len());
        assert!(begin.elapsed() < LONGEST, "{:?}", begin.elapsed());
    }
}

#[test]
fn files_that_are_not_what_they_seem_are_refused_though_rows_are_skipped() {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let tokenizer = Tokenizer::from_dir(&repository().join("tokenizers/bpe_llama3"))
        .expect("the tokenizer loads");
    let bomb = zstd::encode_all(vec![b' '; 300 << 20].as_slice(), 3).expect("memory is writable");
    let table: [(&str, &[u8], &str); 4] = [
        ("bomb.jsonl.zst", &bomb, "expands to more than"),
        (
            "broken.jsonl.gz",
            b"\x1f\x8b\x08\x00broken",
            "broken.jsonl.gz",
        ),
        (
            "broken.parquet",
            b"PAR1 and nothing else",
            "not a whole parquet file",
        ),
        ("empty.jsonl", b"", "no rows"),
    ];
    for (name, bytes, reason) in table {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).expect("the file is writable");
        let begin = Instant::now();
        let error = Dataset::load(&[path], &tokenizer, &options(BadRows::Error))
            .expect_err(name)
            .to_string();
        assert!(error.contains(reason), "{name}: {error}");
        assert!(begin.elapsed() < LONGEST, "{name}");
    }
}
