//! Expressions of a template, rewritten so that the engine evaluates them as Python does.
//!
//! Where an operator of the engine differs from Python's, the expression becomes a call of a function
//! of [`super::python`]: `a % b` is `_percent(a, b)`. The grammar is Jinja's, operator by operator.

use super::lexer::{Kind, Token};
use super::literal;
use super::python::is_method;

/// Deeper expressions are refused: the parser recurses, and so does the engine's.
const MAX_DEPTH: usize = 60;

/// Reads the tokens of one tag and writes them again.
pub(super) struct Parser<'a> {
    tokens: &'a [Token<'a>],
    at: usize,
    depth: usize,
    /// Whether `+` may meet text that has been escaped, which escapes what it is added to.
    has_markup: bool,
}

type Parsed = Result<String, String>;

/// The first operand, and the others with the operators before them.
type Operands = (String, Vec<(&'static str, String)>);

impl<'a> Parser<'a> {
    pub(super) fn new(tokens: &'a [Token<'a>], has_markup: bool) -> Self {
        Self {
            tokens,
            at: 0,
            depth: 0,
            has_markup,
        }
    }

    pub(super) fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at).copied()
    }

    fn next(&mut self) -> Option<Token<'a>> {
        let token = self.peek();
        self.at += 1;
        token
    }

    /// Takes the next token if it is this operator or keyword.
    pub(super) fn take(&mut self, text: &str) -> bool {
        let found = self.is(text);
        self.at += usize::from(found);
        found
    }

    fn is(&self, text: &str) -> bool {
        self.peek()
            .is_some_and(|t| t.text == text && t.kind != Kind::Text)
    }

    fn is_one_of(&self, texts: &[&str]) -> bool {
        texts.iter().any(|text| self.is(text))
    }

    pub(super) fn expect(&mut self, text: &str) -> Result<(), String> {
        if self.take(text) {
            return Ok(());
        }
        Err(format!("expected `{text}`, found {}", self.found()))
    }

    fn found(&self) -> String {
        self.peek()
            .map_or_else(|| "the end of the tag".into(), |t| format!("`{}`", t.text))
    }

    /// The next token, whatever it is.
    pub(super) fn token(&mut self) -> Result<Token<'a>, String> {
        self.next()
            .ok_or_else(|| "unexpected end of the tag".into())
    }

    /// How many tokens have been read.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Whether the tokens read since a position hold one of these names.
    pub(super) fn mentions(&self, from: usize, names: &[&str]) -> bool {
        self.tokens[from..self.at]
            .iter()
            .any(|t| t.kind == Kind::Name && names.contains(&t.text))
    }

    /// Nothing is left of the tag.
    pub(super) fn end(&self) -> Result<(), String> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(format!("unexpected {}", self.found())),
        }
    }

    pub(super) fn name(&mut self) -> Result<&'a str, String> {
        match self.peek() {
            Some(token) if token.kind == Kind::Name => {
                self.at += 1;
                Ok(token.text)
            }
            _ => Err(format!("expected a name, found {}", self.found())),
        }
    }

    /// Expressions with commas between them are a tuple.
    pub(super) fn tuple(&mut self, conditional: bool) -> Parsed {
        let mut items = Vec::new();
        let mut is_tuple = false;
        loop {
            let ends = self.peek().is_none() || self.is_one_of(&[")", "if", "recursive"]);
            if ends && (is_tuple || !items.is_empty()) {
                break;
            }
            items.push(if conditional {
                self.expression()?
            } else {
                self.or()?
            });
            if !self.take(",") {
                break;
            }
            is_tuple = true;
        }
        match (is_tuple, items.as_slice()) {
            (false, [item]) => Ok(item.clone()),
            (_, [item]) => Ok(format!("({item},)")),
            _ => Ok(format!("({})", items.join(", "))),
        }
    }

    /// An expression, which may be conditional.
    pub(super) fn expression(&mut self) -> Parsed {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("an expression is nested deeper than {MAX_DEPTH}"));
        }
        let mut value = self.or()?;
        while self.take("if") {
            let condition = self.or()?;
            value = if self.take("else") {
                format!("({value} if {condition} else {})", self.expression()?)
            } else {
                format!("({value} if {condition})")
            };
        }
        self.depth -= 1;
        Ok(value)
    }

    /// Operands of one precedence, with the operators between them.
    fn chain(
        &mut self,
        operators: &[&'static str],
        operand: fn(&mut Self) -> Parsed,
    ) -> Result<Operands, String> {
        let first = operand(self)?;
        let mut rest = Vec::new();
        while let Some(operator) = operators.iter().find(|operator| self.is(operator)) {
            self.at += 1;
            rest.push((*operator, operand(self)?));
        }
        Ok((first, rest))
    }

    pub(super) fn or(&mut self) -> Parsed {
        Ok(infix(self.chain(&["or"], Self::and)?))
    }

    fn and(&mut self) -> Parsed {
        Ok(infix(self.chain(&["and"], Self::not)?))
    }

    fn not(&mut self) -> Parsed {
        let mut negations = 0;
        while self.take("not") {
            negations += 1;
        }
        let value = self.compare()?;
        Ok(match negations {
            0 => value,
            odd if odd % 2 == 1 => format!("(not {value})"),
            _ => format!("(not (not {value}))"),
        })
    }

    fn compare(&mut self) -> Parsed {
        const OPERATORS: [&str; 7] = ["==", "!=", "<=", ">=", "<", ">", "in"];
        let first = self.add()?;
        let mut rest: Vec<(&str, String)> = Vec::new();
        loop {
            if let Some(operator) = OPERATORS.iter().find(|operator| self.is(operator)) {
                self.at += 1;
                rest.push((operator, self.add()?));
            } else if self.is("not") && self.tokens.get(self.at + 1).is_some_and(|t| t.text == "in")
            {
                self.at += 2;
                rest.push(("not in", self.add()?));
            } else {
                break;
            }
        }
        match rest.as_slice() {
            [] | [("==" | "!=", _)] => Ok(infix((first, rest))),
            _ => {
                let mut call = format!("_compare({first}");
                for (operator, value) in rest {
                    call.push_str(&format!(", '{operator}', {value}"));
                }
                Ok(call + ")")
            }
        }
    }

    fn add(&mut self) -> Parsed {
        let (mut value, rest) = self.chain(&["+", "-"], Self::concat)?;
        if !self.has_markup {
            return Ok(infix((value, rest)));
        }
        for (operator, right) in rest {
            value = format!("(_beside({value}, {right}) {operator} _beside({right}, {value}))");
        }
        Ok(value)
    }

    fn concat(&mut self) -> Parsed {
        let (first, rest) = self.chain(&["~"], Self::multiply)?;
        if rest.is_empty() {
            return Ok(first);
        }
        let rest: Vec<String> = rest.into_iter().map(|(_, value)| value).collect();
        Ok(format!("_concat({first}, {})", rest.join(", ")))
    }

    fn multiply(&mut self) -> Parsed {
        let (mut value, rest) = self.chain(&["*", "//", "/", "%"], Self::power)?;
        for (operator, right) in rest {
            value = match operator {
                "%" => format!("_percent({value}, {right})"),
                "*" => format!("_multiply({value}, {right})"),
                _ => format!("({value} {operator} {right})"),
            };
        }
        Ok(value)
    }

    fn power(&mut self) -> Parsed {
        let (mut value, rest) = self.chain(&["**"], |parser| parser.unary(true))?;
        for (_, right) in rest {
            value = format!("_real({value} ** {right})");
        }
        Ok(value)
    }

    fn unary(&mut self, with_filters: bool) -> Parsed {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("an expression is nested deeper than {MAX_DEPTH}"));
        }
        let value = if self.take("-") {
            format!("_negative({})", self.unary(false)?)
        } else if self.take("+") {
            format!("_positive({})", self.unary(false)?)
        } else {
            self.primary()?
        };
        let mut value = self.postfix(value)?;
        if with_filters {
            value = self.filters(value)?;
        }
        self.depth -= 1;
        Ok(value)
    }

    fn primary(&mut self) -> Parsed {
        let Some(token) = self.peek() else {
            return Err("expected an expression, found the end of the tag".into());
        };
        match (token.kind, token.text) {
            (Kind::Text, _) => self.text(),
            (Kind::Number, text) => {
                self.at += 1;
                Ok(text.to_owned())
            }
            (Kind::Name, "varargs" | "kwargs") => Err(format!(
                "`{}` is not supported: give the macro all its parameters by name",
                token.text
            )),
            (Kind::Name, text) => {
                self.at += 1;
                Ok(match text == "self" && !self.is(".") {
                    true => "_self".into(),
                    false => text.to_owned(),
                })
            }
            (_, "(") => {
                self.at += 1;
                if self.take(")") {
                    return Ok("()".into());
                }
                let value = self.tuple(true)?;
                self.expect(")")?;
                Ok(value)
            }
            (_, "[") => {
                self.at += 1;
                let items = self.list("]", Self::expression)?;
                Ok(format!("[{items}]"))
            }
            (_, "{") => {
                self.at += 1;
                let items = self.list("}", |parser| {
                    let key = parser.expression()?;
                    parser.expect(":")?;
                    Ok(format!("{key}: {}", parser.expression()?))
                })?;
                Ok(format!("{{ {items} }}"))
            }
            _ => Err(format!("unexpected {}", self.found())),
        }
    }

    /// Strings beside each other are one.
    fn text(&mut self) -> Parsed {
        let mut text = String::new();
        while let Some(token) = self.peek().filter(|t| t.kind == Kind::Text) {
            text.push_str(&literal::decode(token.text)?);
            self.at += 1;
        }
        Ok(literal::encode(&text))
    }

    /// Items up to a closing bracket, with commas between them.
    fn list(&mut self, close: &str, item: fn(&mut Self) -> Parsed) -> Parsed {
        let mut items = Vec::new();
        while !self.take(close) {
            if !items.is_empty() {
                self.expect(",")?;
                if self.take(close) {
                    break;
                }
            }
            items.push(item(self)?);
        }
        Ok(items.join(", "))
    }

    fn postfix(&mut self, mut value: String) -> Parsed {
        loop {
            if self.take(".") {
                value = self.attribute(&value)?;
            } else if self.take("[") {
                value = self.subscript(&value)?;
            } else if self.is("(") {
                value.push_str(&self.arguments()?);
            } else {
                return Ok(value);
            }
        }
    }

    fn attribute(&mut self, value: &str) -> Parsed {
        let Some(token) = self.next() else {
            return Err("expected a name or a number after `.`".into());
        };
        match token.kind {
            // Of a macro they are a tuple.
            Kind::Name if (is_method(token.text) || token.text == "arguments") && !self.is("(") => {
                Ok(format!("_method({value}, '{}')", token.text))
            }
            Kind::Name => Ok(format!("{value}.{}", token.text)),
            Kind::Number => Ok(format!("{value}[{}]", token.text)),
            _ => Err(format!(
                "expected a name or a number after `.`, found `{}`",
                token.text
            )),
        }
    }

    fn subscript(&mut self, value: &str) -> Parsed {
        let mut parts = vec![String::new()];
        let mut is_slice = false;
        while !self.take("]") {
            if self.take(":") {
                is_slice = true;
                parts.push(String::new());
            } else if parts.last().is_some_and(String::is_empty) {
                let part = self.expression()?;
                if let Some(last) = parts.last_mut() {
                    *last = part;
                }
            } else {
                return Err(format!("expected `]`, found {}", self.found()));
            }
        }
        match (is_slice, parts.len()) {
            (false, _) if parts[0].is_empty() => Err("nothing between `[` and `]`".into()),
            // A name that is no item may be a method.
            (false, _) if is_method(parts[0].trim_matches('\'')) => {
                Ok(format!("_item({value}, {})", parts[0]))
            }
            (false, _) => Ok(format!("{value}[{}]", parts[0])),
            (true, 2 | 3) => Ok(format!("_sliceable({value})[{}]", parts.join(":"))),
            _ => Err("a slice has at most three parts".into()),
        }
    }

    /// What a call is given, with its parentheses.
    pub(super) fn arguments(&mut self) -> Parsed {
        self.expect("(")?;
        let items = self.list(")", |parser| {
            for star in ["**", "*"] {
                if parser.take(star) {
                    return Ok(format!("{star}{}", parser.expression()?));
                }
            }
            let keyword = parser
                .peek()
                .filter(|t| t.kind == Kind::Name)
                .map(|t| t.text);
            match keyword {
                Some(name)
                    if parser
                        .tokens
                        .get(parser.at + 1)
                        .is_some_and(|t| t.text == "=") =>
                {
                    parser.at += 2;
                    Ok(format!("{name}={}", parser.expression()?))
                }
                _ => parser.expression(),
            }
        })?;
        Ok(format!("({items})"))
    }

    /// Filters and tests of a value.
    fn filters(&mut self, mut value: String) -> Parsed {
        loop {
            if self.take("|") {
                value = format!("({value}|{})", self.call_of_name()?);
            } else if self.take("is") {
                value = self.test(&value)?;
            } else if self.is("(") {
                value = format!("({value}){}", self.arguments()?);
            } else {
                return Ok(value);
            }
        }
    }

    /// Filters that follow the name of a block, as they are.
    pub(super) fn block_filters(&mut self, first: String) -> Parsed {
        let mut text = first;
        while self.take("|") {
            text = format!("{text}|{}", self.call_of_name()?);
        }
        Ok(text)
    }

    /// The name of a filter, and what it is given.
    pub(super) fn call_of_name(&mut self) -> Parsed {
        let mut name = self.name()?.to_owned();
        while self.take(".") {
            name = format!("{name}.{}", self.name()?);
        }
        if self.is("(") {
            name.push_str(&self.arguments()?);
        }
        Ok(name)
    }

    fn test(&mut self, value: &str) -> Parsed {
        let negated = self.take("not");
        let name = self.name()?;
        let operand = self.peek().filter(|t| match t.kind {
            Kind::Name => !["else", "or", "and", "if", "in", "not"].contains(&t.text),
            Kind::Text | Kind::Number => true,
            Kind::Operator => ["[", "{"].contains(&t.text),
        });
        let arguments = match operand {
            _ if self.is("(") => self.arguments()?,
            Some(token) if token.text == "is" && token.kind == Kind::Name => {
                return Err("tests cannot be chained with `is`".into());
            }
            Some(_) => {
                let primary = self.primary()?;
                format!("({})", self.postfix(primary)?)
            }
            None => String::new(),
        };
        let not = if negated { "not " } else { "" };
        Ok(format!("({value} is {not}{name}{arguments})"))
    }
}

fn infix((first, rest): (String, Vec<(&str, String)>)) -> String {
    if rest.is_empty() {
        return first;
    }
    let mut text = format!("({first}");
    for (operator, value) in rest {
        text.push_str(&format!(" {operator} {value}"));
    }
    text + ")"
}
