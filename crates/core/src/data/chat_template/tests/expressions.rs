//! One feature of the language at a time, against what transformers rendered.

use crate::data::chat_template::{ChatTemplate, Conversation, Ending};
use crate::data::fixtures::{read_json, report, repository};
use crate::data::record::Message;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// What transformers renders and we refuse, with what the error says.
const REFUSED: &[(&str, &str)] = &[
    ("{{ big * big * big }}", "unable to calculate"),
    ("{{ 2 ** 200 }}", "unable to calculate"),
    (
        r"{{ ['é', '🙂', '\u200b', '\xa0', '\ud83d\ude42' | length] }}",
        "half of a surrogate pair",
    ),
    (r"{{ '\N{BULLET}' }}", r"`\N{...}`"),
    ("{{ '一'.isnumeric() }}", "`isnumeric` of ideographs"),
    ("{{ 'hello'.encode('utf-8') }}", "`encode`"),
    ("{{ 'hello'.encode() | length }}", "`encode`"),
    ("{{ 'a.b'.translate({46: '-'}) }}", "`translate`"),
    ("{{ 'foo bar baz qux' | wordwrap(7) }}", "filter wordwrap"),
    ("{{ 'abcdefghij' | wordwrap(4) }}", "filter wordwrap"),
    ("{{ 'abcdefghij' | wordwrap(4, false) }}", "filter wordwrap"),
    (
        "{{ 'a b c d' | wordwrap(3, wrapstring='|') }}",
        "filter wordwrap",
    ),
    (
        r"{{ 'one\ntwo three' | wordwrap(5, wrapstring='/') }}",
        "filter wordwrap",
    ),
    (
        "{{ '<p>a <b>b</b>  c</p>' | striptags }}",
        "filter striptags",
    ),
    (
        "{{ 'a &amp; b<!-- x --> c' | striptags }}",
        "filter striptags",
    ),
    (
        "{{ {'class': 'a', 'id': none} | xmlattr }}",
        "filter xmlattr",
    ),
    (
        r#"{{ {'class': 'a"b'} | xmlattr(false) }}"#,
        "filter xmlattr",
    ),
    ("{{ 'see http://a.b' | urlize }}", "filter urlize"),
    ("{{ range(5)[1:3] }}", "a slice of a range"),
    (
        "{% for a, b in ['xy', 'zw'] %}{{ a }}{{ b }}{% endfor %}",
        "not iterable",
    ),
    ("{% set a, b = 'xy' %}{{ a }}{{ b }}", "not iterable"),
    ("{{ lipsum(0) }}", "`lipsum` is random"),
    (
        "{% macro say(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ say(1, 2, 3, k=4) }}",
        "`varargs`",
    ),
    (
        "{% for i in [1] %}{{ loop }}{% endfor %}",
        "a loop has no text",
    ),
    (
        "{% set loop = 1 %}{{ loop }}",
        "reserved variable name loop",
    ),
];

fn render(template: &str, recorded: &Value, messages: &[Message]) -> Result<String, String> {
    let template =
        ChatTemplate::new(template, &BTreeMap::new()).map_err(|error| error.to_string())?;
    let variables: &Map<String, Value> = recorded["variables"].as_object().expect("variables");
    template
        .render(&Conversation {
            messages,
            tools: Some(&recorded["tools"]),
            variables,
            ending: Ending::Closed,
        })
        .map(|rendered| rendered.text)
        .map_err(|error| error.to_string())
}

#[test]
fn every_feature_renders_as_in_transformers_or_is_refused_by_name() {
    let recorded = read_json(&repository().join("expressions/cases.json"));
    let messages: Vec<Message> = recorded["messages"]
        .as_array()
        .expect("messages")
        .iter()
        .map(|message| Message::from_json(message).expect("the message is well formed"))
        .collect();
    let cases = recorded["cases"].as_array().expect("cases");
    let mut failures = Vec::new();
    for case in cases {
        let source = case["template"].as_str().expect("a template");
        let found = render(source, &recorded, &messages);
        let refused = REFUSED.iter().find(|(name, _)| *name == source);
        let failure = match (found, case["rendered"].as_str(), refused) {
            (Ok(found), Some(expected), None) if found == expected => continue,
            (Err(_), None, None) => continue,
            (Err(found), Some(_), Some((_, reason))) if found.contains(reason) => continue,
            (found, Some(expected), _) => format!("{found:?}\n    {expected:?}"),
            (found, None, _) => format!("{found:?}\n    raises {}", case["error"]),
        };
        failures.push(format!("{source:?}\n    {failure}"));
    }
    report(&format!(
        "{} of {} templates agree, {} are refused",
        cases.len() - failures.len(),
        cases.len(),
        REFUSED.len()
    ));
    assert!(cases.len() > 1000, "{} cases", cases.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
