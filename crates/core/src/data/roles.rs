//! Who may speak in a conversation.
//!
//! A template that does not know a role may drop the message, or write it as a turn that nothing trains.
//! Transformers says nothing then; here it is an error.

use crate::data::chat_template::Rendered;
use crate::data::record::{Message, list};
use crate::suggest::nearest;

/// The roles of the chat formats themselves. A template that refuses one of them says so.
pub(super) const ROLES: [&str; 6] = [
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
];

/// With those that a template has besides. Each of these is looked up in a few renderings.
const MOST_ROLES: usize = 20;

/// What others call them.
const OTHER_NAMES: [(&str, &str); 10] = [
    ("ai", "assistant"),
    ("bot", "assistant"),
    ("chatgpt", "assistant"),
    ("function_call", "assistant"),
    ("gpt", "assistant"),
    ("human", "user"),
    ("model", "assistant"),
    ("observation", "tool"),
    ("prompter", "user"),
    ("tool_response", "tool"),
];

/// Checks that each message has a role of the chat formats, or one that the template writes in a way of its own;
/// `render` renders messages, where it can.
///
/// # Errors
/// The first other role: which message has it, which roles there are, and the nearest.
pub(super) fn check(
    messages: &[Message],
    render: impl Fn(&[Message]) -> Option<Rendered>,
) -> Result<(), String> {
    let mut known: Vec<&str> = ROLES.to_vec();
    for (at, message) in messages.iter().enumerate() {
        let role = message.role();
        if known.contains(&role) {
            continue;
        }
        if known.len() == MOST_ROLES || !has_own_way(role, messages, &render) {
            return Err(unknown(at, role));
        }
        known.push(role);
    }
    Ok(())
}

fn unknown(at: usize, role: &str) -> String {
    let meant = meant(role).map_or_else(String::new, |meant| format!("; did you mean `{meant}`?"));
    format!(
        "message {at} (counted from 0) has the role `{}`; expected {}, or a role that the chat template knows, \
         which it writes in a way of its own{meant}",
        role.escape_debug(),
        list(&ROLES)
    )
}

/// Whether a template writes messages of `role` otherwise than those of a role that nobody knows: not with its name
/// alone in another place, or as those of a role of the chat formats.
fn has_own_way(
    role: &str,
    messages: &[Message],
    render: impl Fn(&[Message]) -> Option<Rendered>,
) -> bool {
    let render_as = |other: &str| {
        let renamed = messages.iter().map(|message| match message.role() == role {
            true => message.with_role(other),
            false => message.clone(),
        });
        render(&renamed.collect::<Vec<_>>())
    };
    let made_up: String = role.chars().map(other_character).collect();
    match (render(messages), render_as(&made_up)) {
        (None, _) => false,
        (Some(_), None) => true,
        (Some(known), Some(other)) if is_same_but_for_names(&known, &other) => {
            known != other
                && ROLES
                    .iter()
                    .any(|role| render_as(role).as_ref() == Some(&known))
        }
        (Some(_), Some(_)) => true,
    }
}

/// Each character is the same, or one of the role's name, in whatever case or part the template writes it.
fn is_same_but_for_names(known: &Rendered, other: &Rendered) -> bool {
    let is_same = |(a, b): (char, char)| a == b || other_character(a) == b;
    let (known_text, other_text) = (known.text.chars(), other.text.chars());
    known.assistant_spans == other.assistant_spans
        && known_text.clone().count() == other_text.clone().count()
        && known_text.zip(other_text).all(is_same)
}

/// Half an alphabet away, or the neighbour in a script that has no such halves: a name made of these is as long, has
/// capitals at the same places, and is no word.
fn other_character(c: char) -> char {
    let turned = |first: char, count: u32| {
        let at = (u32::from(c) - u32::from(first) + count / 2) % count;
        char::from_u32(u32::from(first) + at)
    };
    let other = match c {
        'a'..='z' => turned('a', 26),
        'A'..='Z' => turned('A', 26),
        '0'..='9' => turned('0', 10),
        _ if c.is_alphanumeric() => char::from_u32(u32::from(c) ^ 1),
        _ => None,
    };
    other.unwrap_or(c)
}

/// The role that is most likely meant.
fn meant(role: &str) -> Option<&'static str> {
    let plain = role.trim().to_lowercase();
    let other = OTHER_NAMES.iter().find(|(name, _)| *name == plain);
    let other = other.map(|(_, meant)| *meant);
    other.or_else(|| nearest(&plain, ROLES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::chat_template::{ChatTemplate, Conversation, Ending};
    use serde_json::Map;
    use std::collections::BTreeMap;

    fn complaint(role: &str, template: &str) -> Option<String> {
        let template = ChatTemplate::new(template, &BTreeMap::new()).expect("it compiles");
        let messages = [Message::new("user", "q"), Message::new(role, "a")];
        let render = |messages: &[Message]| {
            let conversation = Conversation {
                messages,
                tools: None,
                variables: &Map::new(),
                ending: Ending::Closed,
            };
            template.render(&conversation).ok()
        };
        check(&messages, render).err()
    }

    const PRINTING: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";

    #[test]
    fn a_role_is_one_of_the_formats_or_one_that_the_template_writes_in_its_own_way() {
        for role in ROLES {
            assert_eq!(complaint(role, PRINTING), None);
        }
        let each = |test: &str| {
            format!(
                "{{% for m in messages %}}{{% if {test} %}}!{{% endif %}}<{{{{ m.role }}}}>{{{{ m.content }}}}\
                 {{% endfor %}}"
            )
        };
        for (role, test) in [
            ("ipython", "m.role == 'ipython'"),
            ("critic", "m.role in ['ipython', 'critic']"),
            ("tool_result", "m.role.startswith('tool')"),
            ("mytool", "'tool' in m.role"),
            ("Tool", "m['role'] | lower == 'tool'"),
            ("\u{7528}\u{6237}", "m.role == '\u{7528}\u{6237}'"),
        ] {
            assert_eq!(complaint(role, &each(test)), None, "{role}");
            assert!(complaint(role, PRINTING).is_some(), "{role}");
            assert!(complaint("wizard", &each(test)).is_some(), "{role}");
        }
        // Written by its name, as the assistant is.
        let renaming = "{% for m in messages %}<{{ 'model' if m.role == 'assistant' else m.role }}>{% endfor %}";
        assert_eq!(complaint("model", renaming), None);
        let silent = "{% for m in messages %}{{ m.content }}{% endfor %}";
        assert!(complaint("model", silent).is_some());
        // Looked up once, and not without end.
        let many: Vec<Message> = (0..100)
            .map(|i| Message::new(format!("tool{i}"), "a"))
            .collect();
        let calls = std::cell::Cell::new(0);
        let render = |_: &[Message]| {
            calls.set(calls.get() + 1);
            (calls.get() % 2 == 1).then(|| Rendered {
                text: String::new(),
                assistant_spans: Vec::new(),
            })
        };
        assert!(check(&[many[0].clone(), many[0].clone()], render).is_ok());
        assert_eq!(calls.get(), 2);
        assert!(check(&many, render).is_err());
        assert!(calls.get() < 2 * MOST_ROLES, "{}", calls.get());
        // Others are refused by the template, or what it marks as the assistant's is another part.
        for template in [
            "{% for m in messages %}{% if m.role not in ['user', 'critic'] %}{{ raise_exception('no') }}{% endif %}\
             {{ m.content }}{% endfor %}",
            "{% for m in messages %}{% if m.role == 'critic' %}{% generation %}{{ m.content }}{% endgeneration %}\
             {% else %}{{ m.content }}{% endif %}{% endfor %}",
        ] {
            assert_eq!(complaint("critic", template), None);
            assert!(complaint("wizard", template).is_some());
        }
    }

    #[test]
    fn a_role_that_is_only_written_is_unknown_and_the_nearest_is_named() {
        let shouting = "{% for m in messages %}{{ m.role | upper }}:{{ m.role[:2] }}{{ m.role | length }}{% endfor %}";
        let dropping = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}";
        for template in [PRINTING, shouting, dropping] {
            for (role, nearest) in [
                ("Assistant", "assistant"),
                ("assistent", "assistant"),
                (" user", "user"),
                ("USER", "user"),
                ("human", "user"),
                ("model", "assistant"),
                ("function_call", "assistant"),
                ("tools", "tool"),
            ] {
                let message = complaint(role, template).expect("no role");
                let expected =
                    format!("message 1 (counted from 0) has the role `{role}`; expected");
                assert!(message.contains(&expected), "{message}");
                let expected = format!("did you mean `{nearest}`?");
                assert!(message.ends_with(&expected), "{message}");
            }
            for role in ["wizard", "", "\u{1b}[31m", "1\u{e9}"] {
                let message = complaint(role, template).expect("no role");
                assert!(!message.contains("did you mean"), "{message}");
                assert!(!message.contains('\u{1b}'), "{message}");
            }
        }
    }
}
