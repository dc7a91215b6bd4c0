//! Regular expressions over module paths, with the anchoring of Python's `re`.

use super::python_regex;
use fancy_regex::Regex;
use ferrotune_core::{Error, Result};

/// A map from module name, or regular expression, to a value: `rank_pattern`, `alpha_pattern`.
///
/// The order counts: the first key that matches wins.
pub type PatternMap<T> = Vec<(String, T)>;

/// A compiled expression that knows which config key it came from.
#[derive(Debug)]
pub(crate) struct Expression {
    key: &'static str,
    source: String,
    regex: Regex,
}

impl Expression {
    fn compile(key: &'static str, source: &str, anchored: &str) -> Result<Self> {
        let fault = |error: String| {
            Error::config(
                key,
                format!("`{source}` is not a valid regular expression: {error}"),
            )
        };
        // Alone first: what is around it could close its parentheses.
        python_regex::check(source).map_err(fault)?;
        let regex = Regex::new(source).and_then(|_| Regex::new(anchored));
        let regex = regex.map_err(|error| fault(error.to_string()))?;
        Ok(Self {
            key,
            source: source.into(),
            regex,
        })
    }

    /// Python's `re.fullmatch(source, name)`.
    pub(crate) fn full(key: &'static str, source: &str) -> Result<Self> {
        Self::compile(key, source, &format!(r"\A(?:{source})\z"))
    }

    /// The key of a [`PatternMap`]: the whole path, or what stands after one of its dots.
    pub(crate) fn suffix(key: &'static str, source: &str) -> Result<Self> {
        Self::compile(key, source, &format!(r"\A(.*\.)?({source})\z"))
    }

    /// The layer number that follows a segment like `source`, for `layers_pattern`.
    pub(crate) fn layer_after(key: &'static str, source: &str) -> Result<Self> {
        Self::compile(key, source, &format!(r"\A.*?\.{source}\.(?P<layer>\d+)\."))
    }

    fn too_costly(&self, name: &str, error: &fancy_regex::Error) -> Error {
        Error::config(
            self.key,
            format!(
                "`{}` cannot be matched against `{name}`: {error}; simplify the expression",
                self.source
            ),
        )
    }

    /// Whether `name` matches.
    pub(crate) fn matches(&self, name: &str) -> Result<bool> {
        self.regex
            .is_match(name)
            .map_err(|error| self.too_costly(name, &error))
    }

    /// The number captured by [`Expression::layer_after`].
    pub(crate) fn layer(&self, name: &str) -> Result<Option<usize>> {
        let captures = self
            .regex
            .captures(name)
            .map_err(|error| self.too_costly(name, &error))?;
        Ok(captures
            .and_then(|c| c.name("layer"))
            .and_then(|digits| digits.as_str().parse().ok()))
    }
}

/// A [`PatternMap`] with its keys compiled.
#[derive(Debug)]
pub(crate) struct Patterns<'a, T> {
    key: &'static str,
    entries: Vec<(Expression, &'a T)>,
}

impl<'a, T: Copy> Patterns<'a, T> {
    /// Compiles every key of `map`; `key` is the config key it came from.
    pub(crate) fn compile(key: &'static str, map: &'a PatternMap<T>) -> Result<Self> {
        let entries = map
            .iter()
            .map(|(source, value)| Ok((Expression::suffix(key, source)?, value)))
            .collect::<Result<_>>()?;
        Ok(Self { key, entries })
    }

    /// Which key is the first that matches `name`.
    pub(crate) fn first(&self, name: &str) -> Result<Option<usize>> {
        for (at, (expression, _)) in self.entries.iter().enumerate() {
            if expression.matches(name)? {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    /// The value of the first key that matches `name`.
    pub(crate) fn value(&self, name: &str) -> Result<Option<T>> {
        Ok(self.first(name)?.map(|at| *self.entries[at].1))
    }

    /// Refuses a key that matches some of `names`, each of which a key before it matches too.
    pub(crate) fn require_each_decides(&self, names: &[&str]) -> Result<()> {
        let mut decides = vec![false; self.entries.len()];
        // For each key, an earlier one and what both match.
        let mut hidden = vec![None; self.entries.len()];
        for name in names {
            let mut first = None;
            for (at, (expression, _)) in self.entries.iter().enumerate() {
                match (expression.matches(name)?, first) {
                    (false, _) => {}
                    (true, None) => (first, decides[at]) = (Some(at), true),
                    (true, Some(before)) => hidden[at] = Some((before, name)),
                }
            }
        }
        let of_no_use =
            (0..decides.len()).find_map(|at| Some((at, hidden[at].filter(|_| !decides[at])?)));
        let Some((at, (before, name))) = of_no_use else {
            return Ok(());
        };
        let [key, before] = [at, before].map(|at| &self.entries[at].0.source);
        Err(Error::config(
            self.key,
            format!(
                "`{key}` decides nothing: the first key that matches a module does, and `{before}` stands before it and \
                 matches `{name}`, as earlier keys do all that it matches; put `{key}` first, or take it out"
            ),
        ))
    }

    /// Refuses a key that matches none of `names`: it would silently do nothing.
    pub(crate) fn require_all_used(&self, names: &[&str]) -> Result<()> {
        for (expression, _) in &self.entries {
            let mut used = false;
            for name in names {
                used = used || expression.matches(name)?;
            }
            if !used {
                return Err(Error::config(
                    self.key,
                    format!(
                        "`{0}` matches no adapted module{1}; a key is the end of a module's path \
                         or a regular expression that reaches its end; adapted: {2}",
                        expression.source,
                        super::nearest_end(&expression.source, names.iter().copied()),
                        super::last_names(names.iter().copied()),
                    ),
                ));
            }
        }
        Ok(())
    }
}
