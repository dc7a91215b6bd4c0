//! What is changed in the source of a template before it is compiled.
//!
//! The engine is not Jinja, whose expressions are Python's. So every tag is read by Jinja's grammar and
//! written again in words that mean the same to the engine (see [`super::expression`]). It has no
//! custom tags, so a generation tag becomes a self-contained block that prints a marker; it stays a
//! block tag, so that the whitespace around it is trimmed as the original's would be. And what is
//! assigned to an attribute of a namespace goes through the filter [`CHECK_FILTER`]: only there can a
//! value come to hold itself, which no printing survives.

use super::environment::shorten;
use super::expression::Parser;
use super::generation::{BEGIN, END};
use super::lexer::{Kind, Tag, Token, tag};
use super::literal;

/// The filter that values assigned to an attribute pass.
pub(super) const CHECK_FILTER: &str = "_assignable";

/// `elif`s of a template: the engine has a chain of them inside one another, each taking some of the stack.
const MOST_BRANCHES: usize = 500;

/// The rewritten source, and whether it had a generation tag.
///
/// # Errors
/// What does not parse, and on which line.
pub(super) fn rewrite(source: &str) -> Result<(String, bool), String> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len() * 2);
    let has_markup = has_markup(&source);
    let (mut has_generation_tags, mut branches) = (false, 0);
    let mut rest = source.as_str();
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let piece = match rest.as_bytes().get(1) {
            Some(b'#') => comment(rest),
            Some(b'{') => variable(rest, has_markup),
            Some(b'%') => {
                branches += usize::from(is_branch(rest));
                match branches > MOST_BRANCHES {
                    true => Err(format!("more than {MOST_BRANCHES} `elif`")),
                    false => block(rest, has_markup, &mut has_generation_tags),
                }
            }
            _ => Ok(("{".to_owned(), &rest[1..])),
        };
        let (text, after) = piece.map_err(|mut message| {
            shorten(&mut message);
            let line = 1 + source[..source.len() - rest.len()].matches('\n').count();
            format!("{message} (line {line} of the template)")
        })?;
        out.push_str(&text);
        rest = after;
    }
    out.push_str(rest);
    Ok((out, has_generation_tags))
}

/// Whether `text` begins with an `elif`.
fn is_branch(text: &str) -> bool {
    let tag = text[2..].trim_start_matches(['-', '+']).trim_start();
    tag.starts_with("elif")
}

type Piece<'a> = Result<(String, &'a str), String>;

fn comment(text: &str) -> Piece<'_> {
    let end = text.find("#}").ok_or("a comment that is not closed")? + 2;
    Ok((text[..end].to_owned(), &text[end..]))
}

/// Whether a filter of the template makes text that counts as escaped.
fn has_markup(source: &str) -> bool {
    source.split('|').skip(1).any(|after| {
        let after = after.trim_start();
        let ends = |c: char| !(c.is_alphanumeric() || c == '_');
        let name = &after[..after.find(ends).unwrap_or(after.len())];
        ["e", "escape", "forceescape", "safe"].contains(&name)
    })
}

fn variable(text: &str, has_markup: bool) -> Piece<'_> {
    let tag = tag(text, "}}")?;
    let mut parser = Parser::new(&tag.tokens, has_markup);
    let value = parser.tuple(true)?;
    parser.end()?;
    let Tag { left, right, .. } = tag;
    let lines = line_breaks(text, tag.after);
    Ok((format!("{{{{{left} {value} {lines}{right}}}}}"), tag.after))
}

/// The line breaks of a tag, so that lines keep their numbers.
fn line_breaks(text: &str, after: &str) -> String {
    let tag = &text[..text.len() - after.len()];
    "\n".repeat(tag.matches('\n').count())
}

fn block<'a>(text: &'a str, has_markup: bool, has_generation_tags: &mut bool) -> Piece<'a> {
    let tag = tag(text, "%}")?;
    let marker = match tag.tokens.as_slice() {
        [only] if only.text == "raw" => return raw(&tag),
        [only] if only.text == "generation" => Some(BEGIN),
        [only] if only.text == "endgeneration" => Some(END),
        _ => None,
    };
    *has_generation_tags |= marker == Some(BEGIN);
    let mut parser = Parser::new(&tag.tokens, has_markup);
    let statements = match marker {
        Some(marker) => vec![
            "if true".into(),
            literal::encode(&marker.to_string()),
            "endif".into(),
        ],
        None => statement(&mut parser, &tag.tokens)?,
    };
    let mut out = String::new();
    let last = statements.len() - 1;
    for (i, statement) in statements.iter().enumerate() {
        let left = if i == 0 { tag.left } else { "" };
        let right = if i == last { tag.right } else { "" };
        let lines = if i == last {
            line_breaks(text, tag.after)
        } else {
            String::new()
        };
        if marker.is_some() && i == 1 {
            out.push_str(&format!("{{{{ {statement} }}}}"));
        } else {
            out.push_str(&format!("{{%{left} {statement} {lines}{right}%}}"));
        }
    }
    Ok((out, tag.after))
}

/// A raw block prints its text; the line break after `{% raw %}` stays.
fn raw<'a>(open: &Tag<'a>) -> Piece<'a> {
    let mut from = 0;
    while let Some(at) = open.after[from..].find("{%") {
        let (content, rest) = open.after.split_at(from + at);
        let word = rest[2..].trim_start_matches(['-', '+']).trim_start();
        let close = word.starts_with("endraw").then(|| tag(rest, "%}").ok());
        let close = close
            .flatten()
            .filter(|t| matches!(t.tokens[..], [t] if t.text == "endraw"));
        let Some(close) = close else {
            from += at + 2;
            continue;
        };
        let lines = "\n".repeat(content.matches('\n').count());
        let content = match open.right {
            "-" => content.trim_start(),
            _ => content,
        };
        let line = content.rfind('\n').map_or(content.len(), |at| at + 1);
        let content = match close.left {
            "-" => content.trim_end(),
            "" if content[line..].trim().is_empty() => &content[..line],
            _ => content,
        };
        return Ok((
            format!(
                "{{%{} if true %}}{{{{ {} {lines}}}}}{{% endif {}%}}",
                open.left,
                literal::encode(content),
                close.right
            ),
            close.after,
        ));
    }
    Err("`raw` without `endraw`".into())
}

/// The statements that a block tag becomes, without their delimiters.
fn statement(parser: &mut Parser, tokens: &[Token]) -> Result<Vec<String>, String> {
    let keyword = parser.name()?;
    let statement = match keyword {
        "if" | "elif" => format!("{keyword} {}", parser.tuple(false)?),
        "for" => for_loop(parser)?,
        "set" => assignment(parser)?,
        "with" => with(parser)?,
        "filter" => {
            let first = parser.call_of_name()?;
            format!("filter {}", parser.block_filters(first)?)
        }
        "call" => {
            let parameters = match parser.peek() {
                Some(token) if token.text == "(" => parser.arguments()?,
                _ => String::new(),
            };
            format!("call{parameters} {}", parser.expression()?)
        }
        "macro" => return macro_head(parser),
        _ => {
            let words: Vec<&str> = tokens.iter().map(|token| token.text).collect();
            return Ok(vec![words.join(" ")]);
        }
    };
    parser.end()?;
    Ok(vec![statement])
}

/// Names that are assigned to, up to a keyword or `=`.
fn targets(parser: &mut Parser, end: &str) -> Result<String, String> {
    let mut text = String::new();
    while !parser.take(end) {
        let token = parser
            .token()
            .map_err(|_| format!("expected `{end}`, found the end of the tag"))?;
        match token.kind {
            Kind::Name if text.ends_with('.') && token.text.starts_with('_') => {
                return Err(format!(
                    "an attribute of a namespace cannot begin with an underscore: `{}`",
                    token.text
                ));
            }
            Kind::Name => {}
            _ if [",", ".", "(", ")"].contains(&token.text) => {}
            _ => return Err(format!("cannot assign to `{}`", token.text)),
        }
        text.push_str(token.text);
    }
    Ok(text)
}

fn for_loop(parser: &mut Parser) -> Result<String, String> {
    let targets = targets(parser, "in")?;
    let mut head = format!("for {targets} in _iterable({})", parser.tuple(false)?);
    if parser.take("if") {
        head.push_str(&format!(" if {}", parser.expression()?));
    }
    if parser.take("recursive") {
        head.push_str(" recursive");
    }
    Ok(head)
}

fn assignment(parser: &mut Parser) -> Result<String, String> {
    let name = parser.name()?;
    if parser.peek().is_none_or(|token| token.text == "|") {
        return Ok(format!("set {}", parser.block_filters(name.to_owned())?));
    }
    let targets = name.to_owned() + &targets(parser, "=")?;
    let value = parser.tuple(true)?;
    Ok(match targets.contains('.') {
        true => format!("set {targets} = ({value})|{CHECK_FILTER}"),
        false => format!("set {targets} = {value}"),
    })
}

fn with(parser: &mut Parser) -> Result<String, String> {
    let mut pairs = Vec::new();
    while parser.peek().is_some() {
        if !pairs.is_empty() {
            parser.expect(",")?;
        }
        let name = parser.name()?;
        parser.expect("=")?;
        pairs.push(format!("{name} = {}", parser.expression()?));
    }
    Ok(format!("with {}", pairs.join(", ")))
}

/// The head of a macro. A default may use the parameters before it, which the engine's may not: the
/// parameter is then set in the body.
fn macro_head(parser: &mut Parser) -> Result<Vec<String>, String> {
    let mut parameters: Vec<String> = Vec::new();
    let mut names: Vec<&str> = Vec::new();
    let mut statements = Vec::new();
    let name = parser.name()?;
    parser.expect("(")?;
    while !parser.take(")") {
        if !parameters.is_empty() {
            parser.expect(",")?;
            if parser.take(")") {
                break;
            }
        }
        let parameter = parser.name()?;
        names.push(parameter);
        if !parser.take("=") {
            parameters.push(parameter.to_owned());
            continue;
        }
        let from = parser.position();
        let default = parser.expression()?;
        if parser.mentions(from, &names) {
            parameters.push(parameter.to_owned());
            statements.push(format!(
                "set {parameter} = ({default} if {parameter} is undefined else {parameter})"
            ));
        } else {
            parameters.push(format!("{parameter}={default}"));
        }
    }
    parser.end()?;
    statements.insert(0, format!("macro {name}({})", parameters.join(", ")));
    Ok(statements)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_rewritten_with_their_whitespace_signs() {
        let (rewritten, found) =
            rewrite("a {%- generation -%} b {% endgeneration %}{% if x %}").expect("it parses");
        assert!(found);
        assert_eq!(
            rewritten,
            format!(
                "a {{%- if true %}}{{{{ '{BEGIN}' }}}}{{% endif -%}} b \
                 {{% if true %}}{{{{ '{END}' }}}}{{% endif %}}{{% if x %}}"
            )
        );
    }

    #[test]
    fn values_assigned_to_attributes_are_checked() {
        assert_eq!(
            rewrite("{%- set ns.x = '%}' if a == 'b=' else [1] -%}").expect("it parses"),
            (
                "{%- set ns.x = (('%}' if (a == 'b=') else [1]))|_assignable -%}".to_owned(),
                false
            )
        );
    }

    #[test]
    fn comments_raw_blocks_and_other_text_hold_no_tags() {
        for kept in ["{# {% generation %} #}", "{ {% else %} }", "a { b"] {
            assert_eq!(rewrite(kept), Ok((kept.to_owned(), false)));
        }
        assert_eq!(
            rewrite("{% raw %}{% generation %}{% endraw %}"),
            Ok((
                "{% if true %}{{ '{% generation %}' }}{% endif %}".to_owned(),
                false
            ))
        );
    }

    #[test]
    fn what_does_not_parse_is_named_with_its_line() {
        for (source, expected) in [
            (
                "\n\n{{ 1 + }}",
                "expected an expression, found the end of the tag (line 3",
            ),
            ("{% for x of y %}", "expected `in`"),
            ("{{ 'a", "a string that is not closed"),
            ("{{ a", "a tag that is not closed"),
            ("{{ a b }}", "unexpected `b`"),
            ("{% raw %}", "`raw` without `endraw`"),
            ("{# x", "a comment that is not closed"),
            ("{{ kwargs }}", "`kwargs` is not supported"),
        ] {
            let message = rewrite(source).expect_err(source);
            assert!(message.contains(expected), "{source}: {message}");
        }
    }
}
