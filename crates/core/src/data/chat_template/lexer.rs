//! The tokens of a tag.

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Name,
    Number,
    /// A string literal, with its quotes.
    Text,
    Operator,
}

/// A piece of a tag.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token<'a> {
    pub kind: Kind,
    pub text: &'a str,
}

/// A tag: its tokens, the whitespace signs at both ends, and what follows it.
pub(super) struct Tag<'a> {
    pub left: &'a str,
    pub tokens: Vec<Token<'a>>,
    pub right: &'a str,
    pub after: &'a str,
}

/// A longer tag is refused: what is made of it grows with the square of its length.
const MAX_TOKENS: usize = 10_000;

const OPERATORS: [&str; 26] = [
    "**", "//", "==", "!=", "<=", ">=", "<", ">", "+", "-", "*", "/", "%", "~", "|", ".", ",", ":",
    "(", ")", "[", "]", "{", "}", "=", ";",
];

/// Reads the tag that starts with `text`, up to `close` (`%}` or `}}`).
///
/// # Errors
/// What is wrong with it.
pub(super) fn tag<'a>(text: &'a str, close: &str) -> Result<Tag<'a>, String> {
    let body = &text[2..];
    let (left, mut rest) = match body.as_bytes().first() {
        Some(b'-' | b'+') => body.split_at(1),
        _ => ("", body),
    };
    let mut tokens = Vec::new();
    let mut open = 0_usize;
    loop {
        rest = rest.trim_start();
        if open == 0 {
            let sign = match rest.as_bytes().first() {
                Some(b'-' | b'+') => 1,
                _ => 0,
            };
            if let Some(after) = rest[sign..].strip_prefix(close) {
                return Ok(Tag {
                    left,
                    tokens,
                    right: &rest[..sign],
                    after,
                });
            }
        }
        if tokens.len() == MAX_TOKENS {
            return Err(format!("a tag of more than {MAX_TOKENS} words and signs"));
        }
        let token = token(rest, tokens.last().copied())?;
        match token.text {
            "(" | "[" | "{" => open += 1,
            ")" | "]" | "}" => open = open.checked_sub(1).ok_or("a bracket that was not opened")?,
            _ => {}
        }
        tokens.push(token);
        rest = &rest[token.text.len()..];
    }
}

fn token<'a>(text: &'a str, before: Option<Token>) -> Result<Token<'a>, String> {
    let Some(first) = text.chars().next() else {
        return Err("a tag that is not closed".into());
    };
    let (kind, length) = if first.is_alphabetic() || first == '_' {
        let ends = |c: char| !(c.is_alphanumeric() || c == '_');
        (Kind::Name, text.find(ends).unwrap_or(text.len()))
    } else if first.is_ascii_digit() {
        let index = before.is_some_and(|t| t.text == ".");
        (Kind::Number, number_length(text, index))
    } else if first == '\'' || first == '"' {
        (Kind::Text, text_length(text, first)?)
    } else {
        let operator = OPERATORS
            .iter()
            .find(|operator| text.starts_with(**operator));
        let operator = operator.ok_or_else(|| format!("unexpected `{first}`"))?;
        (Kind::Operator, operator.len())
    };
    Ok(Token {
        kind,
        text: &text[..length],
    })
}

fn number_length(text: &str, index: bool) -> usize {
    let digits = |from: usize| {
        let run = text[from..].find(|c: char| !(c.is_ascii_digit() || c == '_'));
        run.map_or(text.len(), |length| from + length)
    };
    if index {
        return digits(0);
    }
    let bytes = text.as_bytes();
    if bytes[0] == b'0' && matches!(bytes.get(1), Some(b'x' | b'X' | b'b' | b'B' | b'o' | b'O')) {
        let run = text[2..].find(|c: char| !(c.is_ascii_hexdigit() || c == '_'));
        return run.map_or(text.len(), |length| length + 2);
    }
    let mut end = digits(0);
    if bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) {
        end = digits(end + 1);
    }
    if matches!(bytes.get(end), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
        if bytes.get(end + 1 + sign).is_some_and(u8::is_ascii_digit) {
            end = digits(end + 1 + sign);
        }
    }
    end
}

/// The bytes of a string literal, with its quotes.
fn text_length(text: &str, quote: char) -> Result<usize, String> {
    let mut escaped = false;
    for (i, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Ok(i + 1),
            _ => {}
        }
    }
    Err("a string that is not closed".into())
}
