//! Who may speak in a conversation.
//!
//! A template that does not know a role may drop the message, or write it as a turn that nothing trains.
//! Transformers says nothing then; here it is an error.

use crate::data::chat_template::ChatTemplate;
use crate::data::record::{Message, list};
use crate::suggest::nearest;

/// The roles of the chat formats themselves. A template that refuses one of them says so.
const ROLES: [&str; 6] = [
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
];

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

/// Checks that each message has a role of the chat formats, or one that the template compares roles with.
///
/// # Errors
/// The first other role: which message has it, which roles there are, and the nearest.
pub(super) fn check(messages: &[Message], template: &ChatTemplate) -> Result<(), String> {
    let is_known = |role: &str| ROLES.contains(&role) || template.compares_with(role);
    let unknown = messages.iter().position(|m| !is_known(m.role()));
    let Some(at) = unknown else {
        return Ok(());
    };
    let role = messages[at].role();
    let meant = meant(role).map_or_else(String::new, |meant| format!("; did you mean `{meant}`?"));
    Err(format!(
        "message {at} (counted from 0) has the role `{}`; expected {}, or a role that the chat template \
         compares with, as in `message.role == '...'`{meant}",
        role.escape_debug(),
        list(&ROLES)
    ))
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
    use std::collections::BTreeMap;

    fn complaint(role: &str, template: &str) -> Option<String> {
        let template = ChatTemplate::new(template, &BTreeMap::new()).expect("it compiles");
        let messages = [Message::new("user", "q"), Message::new(role, "a")];
        check(&messages, &template).err()
    }

    #[test]
    fn a_role_is_one_of_the_formats_or_of_the_template() {
        let printing = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
        let comparing = "{% if messages[1].role in ['ipython', 'critic'] %}{% endif %}\
                         {% set role = 'model' %}";
        for role in ROLES {
            assert_eq!(complaint(role, printing), None);
        }
        for role in ["ipython", "critic"] {
            assert_eq!(complaint(role, comparing), None);
            assert!(complaint(role, printing).is_some());
        }
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
            let message = complaint(role, comparing).expect("no role");
            let expected = format!("message 1 (counted from 0) has the role `{role}`; expected");
            assert!(message.contains(&expected), "{message}");
            let expected = format!("did you mean `{nearest}`?");
            assert!(message.ends_with(&expected), "{message}");
        }
        for role in ["wizard", "", "\u{1b}[31m"] {
            let message = complaint(role, comparing).expect("no role");
            assert!(!message.contains("did you mean"), "{message}");
            assert!(!message.contains('\u{1b}'), "{message}");
        }
    }
}
