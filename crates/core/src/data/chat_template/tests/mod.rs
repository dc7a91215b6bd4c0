mod expressions;

use super::{ChatTemplate, Conversation, Ending};
use crate::data::fixtures::{folders, read_json, report, roots};
use crate::data::record::Message;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// 2026-11-23, the day on which the recorded cases that print a date were made.
const RECORDED_DATE: i64 = 1_795_392_000;

fn read_template(folder: &Path, cases: &Value) -> ChatTemplate {
    let source =
        std::fs::read_to_string(folder.join("template.jinja")).expect("the template is readable");
    let special_tokens = ["bos_token", "eos_token"]
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), cases[*name].as_str()?.to_owned())))
        .collect();
    ChatTemplate::new(&source, &special_tokens)
        .expect("the template compiles")
        .with_date(RECORDED_DATE)
}

fn render_case(template: &ChatTemplate, case: &Value) -> Result<super::Rendered, String> {
    let messages: Vec<Message> = case["messages"]
        .as_array()
        .expect("messages are a list")
        .iter()
        .map(|m| Message::from_json(m).expect("the message is well formed"))
        .collect();
    let mut variables: Map<String, Value> = case["kwargs"].as_object().cloned().unwrap_or_default();
    let tools = variables.remove("tools");
    let ending = if variables.remove("continue_final_message").is_some() {
        Ending::ContinueFinalMessage
    } else if case["add_generation_prompt"] == true {
        Ending::GenerationPrompt
    } else {
        Ending::Closed
    };
    template
        .render(&Conversation {
            messages: &messages,
            tools: tools.as_ref(),
            variables: &variables,
            ending,
        })
        .map_err(|e| e.to_string())
}

#[test]
fn renderings_match_transformers() {
    for root in roots("chat templates") {
        let (mut cases_run, mut failures) = (0, Vec::new());
        let folders = folders(&root.join("chat_templates"));
        for folder in &folders {
            let cases = read_json(&folder.join("cases.json"));
            let template = read_template(folder, &cases);
            for (i, case) in cases["cases"].as_array().into_iter().flatten().enumerate() {
                cases_run += 1;
                let name = format!("{} case {i}", folder.display());
                match (render_case(&template, case), case["rendered"].as_str()) {
                    (Ok(found), Some(expected)) if found.text == expected => {}
                    (Ok(found), Some(expected)) => {
                        failures.push(format!("{name}:\n  {:?}\n  {expected:?}", found.text));
                    }
                    (Ok(found), None) => failures.push(format!(
                        "{name}: rendered {:?}, transformers raises {}",
                        found.text, case["error"]
                    )),
                    (Err(e), Some(_)) => failures.push(format!("{name}: {e}")),
                    (Err(_), None) => {}
                }
            }
        }
        report(&format!(
            "{} of {cases_run} cases of {} templates match",
            cases_run - failures.len(),
            folders.len()
        ));
        assert!(cases_run > 100, "{cases_run} cases in {}", root.display());
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }
}

fn render(source: &str, content: &str) -> Result<String, String> {
    let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
    let template = ChatTemplate::new(source, &tokens).map_err(|e| e.to_string())?;
    template
        .render(&Conversation {
            messages: &[Message::new("user", content)],
            tools: None,
            variables: &Map::new(),
            ending: Ending::Closed,
        })
        .map(|rendered| rendered.text)
        .map_err(|e| e.to_string())
}

#[test]
fn python_spellings_render_as_python_does() {
    let table = [
        (
            "{{ {'a': '<\u{e9}>', 'b': [1, 2.0, none]} | tojson }}",
            "{\"a\": \"<\u{e9}>\", \"b\": [1, 2.0, null]}",
        ),
        (
            "{{ '\u{e9}\u{1f600}' | tojson(ensure_ascii=true) }}",
            r#""\u00e9\ud83d\ude00""#,
        ),
        (
            "{{ {'b': [], 'a': {}} | tojson(indent=2) }}",
            "{\n  \"b\": [],\n  \"a\": {}\n}",
        ),
        (
            "{{ {'b': 1, 'a': [2]} | tojson(sort_keys=true, separators=[',', ':']) }}",
            "{\"a\":[2],\"b\":1}",
        ),
        (
            "{{ [true, none, {'k': \"it's\"}] }}",
            "[True, None, {'k': \"it's\"}]",
        ),
        (
            "{{ 'a.b.c'.rsplit('.', 1) | join('|') }} {{ 'xab'.removeprefix('x') }}",
            "a.b|c ab",
        ),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        (
            "{{ bos_token }}{{ eos_token }}|{{ tools is none }}|{{ documents is none }}",
            "<s>|True|True",
        ),
        (
            "{% if true %}\n  {% set x = 1 %}\n  y\n{% endif %}\n",
            "  y\n",
        ),
        ("a\n  {%- generation %}\n b {% endgeneration %}\nc", "a b c"),
    ];
    for (source, expected) in table {
        assert_eq!(render(source, "x").as_deref(), Ok(expected), "{source}");
    }
}

#[test]
fn hostile_templates_fail_in_bounded_time_with_a_reason() {
    let long = "the template works for too long";
    let table = [
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            long,
        ),
        ("{% for i in range(1000000000) %}x{% endfor %}", ""),
        ("{{ 'x' * 1000000000 }}", ""),
        (
            "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            long,
        ),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "recursion",
        ),
        ("{% include 'x' %}", "not available"),
        ("{% include 'chat_template' %}", ""),
        ("{% import 'os' as os %}{{ os }}", "not available"),
        ("{% extends 'x' %}", "not available"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ""),
        ("{{ messages.__init__.__globals__['os'].system('id') }}", ""),
        ("{{ cycler.__init__.__globals__ }}", ""),
        ("{{ lipsum() }}", "lipsum"),
        ("{{ open('/etc/passwd') }}", "open"),
        ("{{ messages[0].content.nothing() }}", ""),
        ("{{ missing.attribute }}", "`missing` is undefined"),
        (
            "{{ messages[0].nope.deeper }}",
            "`messages[0].nope` is undefined",
        ),
        (
            "{{ raise_exception('as the template says') }}",
            "as the template says (line 1",
        ),
        ("{{ [1] | tojson(indent=1000000000) }}", "indent"),
        ("{% generation %}x", "not closed"),
        ("x{% endgeneration %}{% generation %}", ""),
        ("{{ '%1000000000d' % 1 }}", long),
        ("{{ '{:1000000000}'.format(1) }}", long),
        ("{{ 'x'.center(1000000000) }}", long),
        ("{{ [0] * 1000000000 }}", long),
        ("{{ 'a\tb'.expandtabs(1000000000) }}", long),
        ("{{ 2 ** 2 ** 2 ** 2 ** 2 ** 2 ** 2 ** 2 }}", ""),
        ("{% for %}", "line 1"),
        ("{{ 1 // 0 }}", ""),
    ];
    for (source, expected) in table {
        let begin = std::time::Instant::now();
        let message = render(source, "hello").expect_err(source);
        assert!(message.contains(expected), "{source}: {message}");
        assert!(message.len() < 700, "{source}: {message}");
        let seconds = begin.elapsed().as_secs_f64();
        assert!(seconds < 10.0, "{source}: {seconds} s");
    }
}

#[test]
fn long_sources_are_read_or_refused_in_bounded_time() {
    for (unit, expected) in [
        ("{% raw %}{% ", "without `endraw`"),
        ("{{ 1 * ", "a tag of more than"),
        ("{{ a.b", ""),
        ("{{ x|f", ""),
        ("{{ (", ""),
        ("{# ", "not closed"),
        ("{% if x %}", ""),
    ] {
        let begin = std::time::Instant::now();
        let (open, repeated) = unit.split_at(3);
        let source = open.to_owned() + &repeated.repeat(100_000);
        let message = render(&source, "hello").expect_err(unit);
        assert!(message.contains(expected), "{unit}: {message}");
        assert!(
            begin.elapsed().as_secs() < 20,
            "{unit}: {:?}",
            begin.elapsed()
        );
    }
}

#[test]
fn values_nested_by_a_loop_do_not_exhaust_the_stack() {
    // Each source grows a value by one level in every turn, by a list, a mapping and lazily.
    for grown in [
        "[ns.x]",
        "{'k': ns.x}",
        "ns.x + []",
        "[ns.x + []]",
        "[ns.x] * 1",
        "[ns.x][0:]",
        "ns.x | map('list')",
        "[ns.x] | reverse",
        "dict(k=ns.x)",
        "dict({'k': 1}, k=ns.x)",
    ] {
        let begin = std::time::Instant::now();
        let source = format!(
            "{{% set ns = namespace(x=[]) %}}{{% for j in range(9) %}}{{% for i in range(90000) %}}\
             {{% set ns.x = {grown} %}}{{% endfor %}}{{% endfor %}}done"
        );
        let message = render(&source, "hello").expect_err(&source);
        assert!(message.contains("too long"), "{message}");
        assert!(
            begin.elapsed().as_secs() < 20,
            "{grown}: {:?}",
            begin.elapsed()
        );
    }
    let brackets =
        "{% set x = [] %}".to_owned() + &"{% set x = [[[[[[[[x]]]]]]]] %}".repeat(20_000);
    assert_eq!(render(&brackets, "hello").as_deref(), Ok(""));
}

#[test]
fn a_namespace_cannot_come_to_hold_itself() {
    for value in [
        "ns",
        "[ns]",
        "{'a': [ns]}",
        "namespace(y=1)",
        "dict(a=ns)",
        "[ns] | map('default', 1)",
    ] {
        let source = format!("{{% set ns = namespace() %}}{{% set ns.x = {value} %}}{{{{ ns }}}}");
        let message = render(&source, "hello").expect_err(&source);
        assert!(
            message.contains("a namespace cannot be assigned"),
            "{source}: {message}"
        );
    }
}

#[test]
fn markers_in_the_data_are_refused_where_they_would_mean_something() {
    let tagged = "{% generation %}{{ messages[0].content }}{% endgeneration %}";
    assert_eq!(render(tagged, "ok").as_deref(), Ok("ok"));
    let message = render(tagged, "a\u{fdd1}b").expect_err("the marker is refused");
    assert!(message.contains("U+FDD0"), "{message}");
    assert!(render("{{ messages[0].content }}", "a\u{fdd1}b").is_ok());
}

/// What transformers 5.24 prints.
#[test]
fn reasoning_has_the_names_that_templates_read() {
    let source = "{% for m in messages %}{{ m.items() | map('first') | join(' ') }}: {{ m.thinking }} \
                  {{ m.reasoning is defined }}{% endfor %}";
    let template = ChatTemplate::new(source, &BTreeMap::new()).expect("the template compiles");
    for (message, expected) in [
        (
            json!({"role": "assistant", "content": "a", "reasoning": "r"}),
            "thinking role content reasoning reasoning_content: r True",
        ),
        (
            json!({"role": "assistant", "reasoning_content": "r", "content": "a"}),
            "thinking role reasoning_content content: r False",
        ),
        (
            json!({"role": "assistant", "thinking": "t", "content": "a", "reasoning": "r"}),
            "thinking role content reasoning reasoning_content: t True",
        ),
    ] {
        let case = json!({ "messages": [message] });
        let rendered = render_case(&template, &case).expect("renders");
        assert_eq!(rendered.text, expected);
    }
}
