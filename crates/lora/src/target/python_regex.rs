//! What Python's `re` makes of an expression before it is compiled: faults with the position of their cause, and what
//! the two dialects read otherwise.

/// A walk through an expression, character by character.
struct Walk {
    source: Vec<char>,
    at: usize,
    /// Where the groups that are open begin, and whether each is a look-behind.
    open: Vec<(usize, bool)>,
    groups: usize,
}

/// Refuses what Python refuses, and what it reads otherwise than `fancy_regex`.
///
/// # Errors
/// What is wrong, and the position of its cause in characters, as Python counts them.
pub(super) fn check(source: &str) -> Result<(), String> {
    let mut walk = Walk {
        source: source.chars().collect(),
        at: 0,
        open: Vec::new(),
        groups: 0,
    };
    while let Some(next) = walk.peek(0) {
        match next {
            '\\' => walk.escape(false).map(drop)?,
            '[' => walk.set()?,
            '(' => walk.begin_group(),
            ')' if walk.open.pop().is_none() => {
                return Err(format!("unbalanced parenthesis at position {}", walk.at));
            }
            '*' | '+' | '?' => walk.require_fixed()?,
            '{' => walk.repeat()?,
            _ => {}
        }
        walk.at += 1;
    }
    match walk.open.pop() {
        None => Ok(()),
        Some((at, _)) => Err(format!(
            "a parenthesis is not closed, opened at position {at}"
        )),
    }
}

impl Walk {
    fn peek(&self, ahead: usize) -> Option<char> {
        self.source.get(self.at + ahead).copied()
    }

    fn starts_with(&self, text: &str) -> bool {
        let own = self.source[self.at..].iter().copied();
        own.take(text.chars().count()).eq(text.chars())
    }

    fn begin_group(&mut self) {
        let is_look_behind = self.starts_with("(?<=") || self.starts_with("(?<!");
        self.open.push((self.at, is_look_behind));
        self.groups += usize::from(self.peek(1) != Some('?') || self.starts_with("(?P<"));
        // The question mark of `(?` repeats nothing.
        self.at += usize::from(self.peek(1) == Some('?'));
    }

    /// Refuses a repetition inside a look-behind, which Python wants of one width.
    fn require_fixed(&self) -> Result<(), String> {
        match self.open.iter().find(|(_, is_look_behind)| *is_look_behind) {
            None => Ok(()),
            Some((at, _)) => Err(format!(
                "a look-behind must be of one width in Python, at position {at}"
            )),
        }
    }

    /// Leaves the walk at the last character of an escape, which is returned where it stands for itself.
    fn escape(&mut self, in_set: bool) -> Result<Option<char>, String> {
        let begin = self.at;
        self.at += 1;
        let Some(next) = self.peek(0) else {
            return Err(format!("a backslash at the end, position {begin}"));
        };
        let known = match in_set {
            true => "abdDfnrsStuUNvwWx",
            false => "aAbBdDfnrsStuUNvwWxZ",
        };
        if next.is_ascii_alphabetic() && !known.contains(next) {
            return Err(format!(
                "`\\{next}` is no escape of Python's, at position {begin}"
            ));
        }
        if next.is_ascii_digit() && next != '0' && !in_set {
            let digits = self.source[self.at..].iter().take(2);
            let number: String = digits.take_while(|c| c.is_ascii_digit()).collect();
            if number
                .parse()
                .is_ok_and(|number: usize| number > self.groups)
            {
                return Err(format!(
                    "`\\{number}` refers to a group that is not there, at position {}",
                    self.at
                ));
            }
        }
        Ok((!next.is_alphanumeric()).then_some(next))
    }

    /// Leaves the walk at the bracket that closes a set.
    fn set(&mut self) -> Result<(), String> {
        let begin = self.at;
        self.at += 1 + usize::from(self.peek(1) == Some('^'));
        let mut first = true;
        loop {
            let member = self.at;
            let Some(low) = self.peek(0) else {
                return Err(format!("a set is not closed, opened at position {begin}"));
            };
            if low == ']' && !first {
                return Ok(());
            }
            first = false;
            let double = ["&&", "--", "~~", "||"]
                .iter()
                .find(|two| self.starts_with(two));
            if let Some(two) = double.filter(|two| **two != "--" || self.peek(2) != Some(']')) {
                return Err(format!(
                    "`{two}` in a set is no operator in Python, at position {member}; write one of them, or a backslash \
                     before each"
                ));
            }
            if low == '[' {
                return Err(format!(
                    "`[` in a set stands for itself in Python alone, at position {member}; write `\\[`"
                ));
            }
            let low = self.member(low)?;
            self.at += 1;
            if self.peek(0) != Some('-') || self.peek(1).is_none_or(|next| next == ']') {
                continue;
            }
            self.at += 1;
            let Some(high) = self.peek(0) else { continue };
            let high = self.member(high)?;
            self.at += 1;
            if low.zip(high).is_some_and(|(low, high)| low > high) {
                return Err(format!("a range that runs backwards, at position {member}"));
            }
        }
    }

    /// A member of a set, where it is one character.
    fn member(&mut self, next: char) -> Result<Option<char>, String> {
        match next {
            '\\' => self.escape(true),
            other => Ok(Some(other)),
        }
    }

    /// `{m,n}`.
    fn repeat(&mut self) -> Result<(), String> {
        let begin = self.at;
        let rest = &self.source[begin + 1..];
        let Some(end) = rest.iter().position(|c| *c == '}') else {
            return Ok(());
        };
        let bounds: String = rest[..end].iter().collect();
        let (low, high) = bounds.split_once(',').unwrap_or((&bounds, &bounds));
        let number = |text: &str| text.parse::<u64>().ok();
        if number(low).is_none() && number(high).is_none() {
            return Ok(());
        }
        self.require_fixed().or_else(|error| match low == high {
            true => Ok(()),
            false => Err(error),
        })?;
        match number(low).zip(number(high)) {
            Some((low, high)) if low > high => Err(format!(
                "`{{{bounds}}}` repeats at least {low} and at most {high} times, at position {begin}"
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_have_pythons_positions() {
        for (source, parts) in [
            (
                ".*q_proj)|(.*up_proj",
                "unbalanced parenthesis at position 8",
            ),
            ("x)|(?:.*layers.0.*", "unbalanced parenthesis at position 1"),
            ("ü.*q_proj)(", "unbalanced parenthesis at position 9"),
            (r"layers\.(0|1", "opened at position 8"),
            ("layers.[0.*q_proj", "opened at position 7"),
            (".*q_proj[z-a]", "backwards, at position 9"),
            (r".*(q)_proj\2", "not there, at position 11"),
            ("q_pro{3,1}j", "at position 5"),
            (".*[a-z&&q]_proj", "no operator in Python, at position 6"),
            (r"q_proj\z", r"`\z` is no escape of Python's, at position 6"),
            (r"\p{L}", r"`\p` is no escape"),
            ("(?<=q+)_proj", "look-behind must be of one width"),
            ("[[a]", "stands for itself in Python alone"),
            ("q\\", "a backslash at the end, position 1"),
        ] {
            let error = check(source).expect_err(source);
            assert!(error.contains(parts), "{source}: {error}");
        }
    }

    #[test]
    fn what_python_takes_is_taken() {
        for source in [
            r".*\.(q|v)_proj",
            r"(?!.*\.1\.).*up_proj",
            r"((?=.)[a-z_.0-9]*)*\1!",
            r"[]^a-]+",
            r"[^]]",
            r"[\w.-]+",
            r"[+--]",
            r"layers\.\d{1,2}\.mlp",
            r"a{,3}b{2}c{",
            r"(?P<n>q|k)(?P=n)?",
            r"(?<=self_attn\.)q_proj",
            r"(?<!mlp.{2})x",
            r"\Amodel\Z",
            r"(?i:Q)_proj",
        ] {
            assert_eq!(check(source), Ok(()), "{source}");
        }
    }
}
