//! Words that a template compares something with, such as the roles it tells apart.

use super::lexer::{Kind, Token, tag};
use super::literal;
use std::collections::BTreeSet;

/// The string literals of a template that stand beside `==`, `!=` or `in`, in a list, or as the key of a
/// mapping. What is only printed is not among them.
pub(super) fn compared(source: &str) -> BTreeSet<String> {
    let mut words = BTreeSet::new();
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        rest = &rest[at..];
        let close = match rest.as_bytes().get(1) {
            Some(b'{') => "}}",
            Some(b'%') => "%}",
            Some(b'#') => {
                rest = rest.split_once("#}").map_or("", |(_, after)| after);
                continue;
            }
            _ => {
                rest = &rest[1..];
                continue;
            }
        };
        match tag(rest, close) {
            Ok(tag) => {
                words.extend(of_tag(&tag.tokens));
                rest = tag.after;
            }
            // A raw block may hold what is no tag.
            Err(_) => rest = &rest[2..],
        }
    }
    words
}

fn of_tag(tokens: &[Token]) -> impl Iterator<Item = String> {
    let text = |at: Option<usize>| at.and_then(|at| tokens.get(at)).map_or("", |t| t.text);
    // As in `message['role']`.
    let is_key = move |at: usize| {
        let of = at.checked_sub(2).and_then(|at| tokens.get(at));
        text(Some(at - 1)) == "["
            && of.is_some_and(|t| {
                t.kind == Kind::Name && t.text != "in" || [")", "]"].contains(&t.text)
            })
    };
    let is_compared = move |at: &usize| {
        let (before, after) = (text(at.checked_sub(1)), text(Some(at + 1)));
        ["==", "!=", "in"].contains(&before)
            || ["==", "!=", "in", "not", ":"].contains(&after)
            || (["[", "(", ","].contains(&before)
                && ["]", ")", ","].contains(&after)
                && !is_key(*at))
    };
    let words = (0..tokens.len()).filter(|&at| tokens[at].kind == Kind::Text);
    words
        .filter(is_compared)
        .filter_map(|at| literal::decode(tokens[at].text).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_are_compared_are_told_from_those_that_are_printed() {
        let source = "{# {% if x == 'comment' %} #}{% if m.role == 'a' or \"b\" != m['role'] %}\
                      {% set role = 'printed' %}{{ 'printed' + m.role }}{% endif %}\
                      {%- if m.role in ['c', 'd'] and 'e' not in m.role -%}{% endif %}\
                      {{ {'f': 'printed'}[m.role] }} { {% raw %}{{ % }}{% endraw %}";
        let found: Vec<String> = compared(source).into_iter().collect();
        assert_eq!(found, ["a", "b", "c", "d", "e", "f"]);
    }
}
