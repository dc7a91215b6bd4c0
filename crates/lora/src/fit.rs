//! Ranks that a weight has room for.

use crate::target::{PatternMap, Patterns};
use ferrotune_core::adapter::Site;
use ferrotune_core::{Error, Result};

/// A rank, and where it stands in a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GivenRank<'a> {
    /// Such as `r`.
    pub key: &'a str,
    /// The key of other ranks for some modules, such as `rank_pattern`, if the method has one.
    pub pattern: Option<&'a str>,
    /// The entry of `pattern` that decided, if one did.
    pub entry: Option<&'a str>,
    /// The rank itself.
    pub rank: usize,
}

impl<'a> GivenRank<'a> {
    /// A rank that is the same for all modules.
    #[must_use]
    pub const fn of_all(key: &'a str, rank: usize) -> Self {
        Self {
            key,
            pattern: None,
            entry: None,
            rank,
        }
    }

    /// The rank of `module`: `default`, or that of the first entry of `pattern` that matches. `keys` are of these two.
    pub(crate) fn of(
        keys: [&'static str; 2],
        default: usize,
        pattern: &'a PatternMap<usize>,
        module: &str,
    ) -> Result<Self> {
        let first = Patterns::compile(keys[1], pattern)?.first(module)?;
        let entry = first.map(|at| &pattern[at]);
        Ok(Self {
            key: keys[0],
            pattern: Some(keys[1]),
            entry: entry.map(|(entry, _)| entry.as_str()),
            rank: entry.map_or(default, |(_, rank)| *rank),
        })
    }

    /// An error under the key at fault, with what it says and what else could be done for one module.
    pub(crate) fn error(&self, fault: impl FnOnce(&str) -> String) -> Error {
        let rank = self.rank;
        match (self.pattern, self.entry) {
            (Some(pattern), Some(entry)) => {
                Error::config(pattern, format!("gives `{entry}` {rank}, {}", fault("")))
            }
            (Some(pattern), None) => {
                let others = format!(", or a `{pattern}` for this module");
                Error::config(self.key, format!("is {rank}, {}", fault(&others)))
            }
            (None, _) => Error::config(self.key, format!("is {rank}, {}", fault(""))),
        }
    }
}

/// Refuses a rank above both dimensions of the weight at `site`: more is trained than the weight has, for the same
/// updates.
///
/// # Errors
/// [`Error::Config`] under the key that gives the rank, naming the entry of the pattern if it is one.
pub fn require_rank(site: &Site, given: GivenRank<'_>) -> Result<()> {
    let rank = given.rank;
    let [rows, columns] = [site.out_features, site.in_features];
    if rank <= rows.max(columns) {
        return Ok(());
    }
    Err(given.error(|others| {
        format!(
            "but the weight of `{}` is {rows} x {columns}: no update of it has a rank above {}; take a smaller \
             one{others}",
            site.name,
            rows.min(columns)
        )
    }))
}
