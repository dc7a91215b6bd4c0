//! String literals: read as Python reads them, written for the engine.

/// The text of a literal with its quotes.
///
/// # Errors
/// An escape that has no text of its own, by name.
pub(super) fn decode(literal: &str) -> Result<String, String> {
    let inner = &literal[1..literal.len() - 1];
    if !inner.contains('\\') {
        return Ok(inner.to_owned());
    }
    let mut text = String::with_capacity(inner.len());
    let mut rest = inner;
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let Some(c) = rest.chars().next() else {
            return Err("a string that ends with a backslash".into());
        };
        let (decoded, length) = match c {
            '\n' => (None, 1),
            '\\' | '\'' | '"' => (Some(c), 1),
            'a' => (Some('\u{7}'), 1),
            'b' => (Some('\u{8}'), 1),
            'f' => (Some('\u{c}'), 1),
            'n' => (Some('\n'), 1),
            'r' => (Some('\r'), 1),
            't' => (Some('\t'), 1),
            'v' => (Some('\u{b}'), 1),
            '0'..='7' => {
                let digits = rest
                    .bytes()
                    .take(3)
                    .take_while(|b| (b'0'..=b'7').contains(b));
                let length = digits.count();
                (Some(code_point(&rest[..length], 8)?), length)
            }
            'x' => (Some(hexadecimal(rest, 2)?), 3),
            'u' => (Some(hexadecimal(rest, 4)?), 5),
            'U' => (Some(hexadecimal(rest, 8)?), 9),
            'N' => return Err("`\\N{...}` is not supported: write the character itself".into()),
            other => {
                text.push('\\');
                (Some(other), other.len_utf8())
            }
        };
        text.extend(decoded);
        rest = &rest[length..];
    }
    text.push_str(rest);
    Ok(text)
}

fn hexadecimal(escape: &str, digits: usize) -> Result<char, String> {
    let text = escape.get(1..=digits).unwrap_or("");
    if text.len() != digits || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(format!(
            "`\\{}` needs {digits} hexadecimal digits",
            &escape[..1]
        ));
    }
    code_point(text, 16)
}

fn code_point(digits: &str, radix: u32) -> Result<char, String> {
    u32::from_str_radix(digits, radix)
        .ok()
        .and_then(char::from_u32)
        .ok_or_else(|| {
            format!(
                "the escape of {digits} is half of a surrogate pair: write the character itself"
            )
        })
}

/// A literal of the engine.
pub(super) fn encode(text: &str) -> String {
    let mut literal = String::with_capacity(text.len() + 2);
    literal.push('\'');
    for c in text.chars() {
        match c {
            '\'' => literal.push_str("\\'"),
            '\\' => literal.push_str("\\\\"),
            '\n' => literal.push_str("\\n"),
            '\r' => literal.push_str("\\r"),
            c => literal.push(c),
        }
    }
    literal.push('\'');
    literal
}
