//! Which modules an adapter attaches to, and with which rank and alpha.
//!
//! Matching follows PEFT, name by name; what PEFT leaves silent is an error here: a list entry,
//! an excluded name, a layer index or a pattern that matches nothing.
//!
//! # Source
//! PEFT's `check_target_module_exists`, `get_pattern_key` and the `all-linear` shorthand.

mod defaults;
mod layers;
mod pattern;
mod python_regex;
#[cfg(test)]
mod tests;

pub use defaults::default_target_modules;
pub use pattern::PatternMap;
pub(crate) use pattern::{Expression, Patterns};

use crate::fit::GivenRank;
use layers::Layers;

use ferrotune_core::adapter::{Site, SiteKind};
use ferrotune_core::config::{ALL_LINEAR, Names, is_metacharacter};
use ferrotune_core::{Error, Result, suggest};
use std::collections::BTreeSet;

/// `target_modules` once it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// `"all-linear"`: every linear layer but the output head.
    AllLinear,
    /// Names, each a whole module path or the end of one after a dot.
    List(Vec<String>),
    /// A regular expression that matches the whole module path.
    Regex(String),
}

impl TargetModules {
    /// What a single string means: the shorthand `all-linear`, or a regular expression.
    #[must_use]
    pub fn from_text(text: &str) -> Self {
        if text.eq_ignore_ascii_case(ALL_LINEAR) {
            Self::AllLinear
        } else {
            Self::Regex(text.into())
        }
    }
}

impl From<&Names> for TargetModules {
    fn from(names: &Names) -> Self {
        match names {
            Names::Pattern(text) => Self::from_text(text),
            Names::List(list) => Self::List(list.clone()),
        }
    }
}

/// `exclude_modules` once it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExcludeModules {
    /// Names, each a whole module path or the end of one after a dot.
    List(Vec<String>),
    /// A regular expression that matches the whole module path.
    Regex(String),
}

impl From<&Names> for ExcludeModules {
    fn from(names: &Names) -> Self {
        match names {
            Names::Pattern(text) => Self::Regex(text.clone()),
            Names::List(list) => Self::List(list.clone()),
        }
    }
}

/// Everything that decides which modules are adapted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection<'a> {
    /// What to adapt.
    pub target_modules: &'a TargetModules,
    /// What not to adapt, whatever `target_modules` says.
    pub exclude_modules: Option<&'a ExcludeModules>,
    /// Only these layers; entries of a list that are whole paths are exempt.
    pub layers_to_transform: Option<&'a [usize]>,
    /// The path segment before the layer's number; any segment if empty.
    pub layers_pattern: &'a [String],
}

/// A module that is adapted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target<'a> {
    /// Where.
    pub site: &'a Site,
    /// Rank of the update.
    pub rank: usize,
    /// Numerator of the update's scale. Not rescaled when the rank differs from the default.
    pub alpha: f64,
}

/// Rank and alpha by module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RankAndAlpha<'a> {
    /// Rank where no pattern matches.
    pub rank: usize,
    /// Alpha where no pattern matches.
    pub alpha: f64,
    /// Rank by module.
    pub rank_pattern: &'a PatternMap<usize>,
    /// Alpha by module.
    pub alpha_pattern: &'a PatternMap<f64>,
}

impl<'a> RankAndAlpha<'a> {
    /// Alpha of one module.
    ///
    /// # Errors
    /// [`Error::Config`] if a pattern is no regular expression.
    pub fn alpha_of(&self, name: &str) -> Result<f64> {
        let alphas = Patterns::compile("alpha_pattern", self.alpha_pattern)?;
        Ok(alphas.value(name)?.unwrap_or(self.alpha))
    }

    /// Where the rank of one module stands, by PEFT's keys.
    ///
    /// # Errors
    /// [`Error::Config`] if a pattern is no regular expression.
    pub fn given_rank(&self, name: &str) -> Result<GivenRank<'a>> {
        GivenRank::of(["r", "rank_pattern"], self.rank, self.rank_pattern, name)
    }

    /// Rank and alpha of one module.
    ///
    /// # Errors
    /// [`Error::Config`] if a pattern is no regular expression.
    pub fn of(&self, name: &str) -> Result<(usize, f64)> {
        let ranks = Patterns::compile("rank_pattern", self.rank_pattern)?;
        let rank = ranks.value(name)?.unwrap_or(self.rank);
        Ok((rank, self.alpha_of(name)?))
    }

    /// Refuses an entry of a pattern whose modules, among `names`, are all those of entries before it.
    ///
    /// # Errors
    /// [`Error::Config`] naming both.
    pub fn require_each_decides(&self, names: &[&str]) -> Result<()> {
        Patterns::compile("rank_pattern", self.rank_pattern)?.require_each_decides(names)?;
        Patterns::compile("alpha_pattern", self.alpha_pattern)?.require_each_decides(names)
    }

    /// Rank and alpha of each of `names`, in their order.
    ///
    /// # Errors
    /// [`Error::Config`] if a pattern is no regular expression or matches none of the names.
    pub fn resolve(&self, names: &[&str]) -> Result<Vec<(usize, f64)>> {
        let ranks = Patterns::compile("rank_pattern", self.rank_pattern)?;
        let alphas = Patterns::compile("alpha_pattern", self.alpha_pattern)?;
        ranks.require_all_used(names)?;
        alphas.require_all_used(names)?;
        names
            .iter()
            .map(|name| {
                Ok((
                    ranks.value(name)?.unwrap_or(self.rank),
                    alphas.value(name)?.unwrap_or(self.alpha),
                ))
            })
            .collect()
    }
}

/// The modules to adapt with the rank and alpha of each, in the order of `sites`.
///
/// # Errors
/// As [`select`] and [`RankAndAlpha::resolve`].
pub fn resolve<'a>(
    sites: &'a [Site],
    selection: &Selection<'_>,
    rank_and_alpha: &RankAndAlpha<'_>,
) -> Result<Vec<Target<'a>>> {
    let selected = select(sites, selection)?;
    let names: Vec<&str> = selected.iter().map(|site| site.name.as_str()).collect();
    let values = rank_and_alpha.resolve(&names)?;
    Ok(selected
        .into_iter()
        .zip(values)
        .map(|(site, (rank, alpha))| Target { site, rank, alpha })
        .collect())
}

/// The modules to adapt, in the order of `sites`. At least one.
///
/// # Errors
/// [`Error::Config`] if nothing is left to adapt, or if an entry of a list, an excluded name or a
/// layer index matches nothing: with the nearest names.
pub fn select<'a>(sites: &'a [Site], selection: &Selection<'_>) -> Result<Vec<&'a Site>> {
    let targets = Targets::compile(selection.target_modules, sites)?;
    let excluded = Excluded::compile(selection.exclude_modules, sites)?;
    let layers = Layers::compile(selection)?;
    let mut selected = Vec::new();
    let [mut targeted, mut left_out] = [Vec::new(), Vec::new()];
    for site in sites {
        let hit = targets.hit(site)?;
        if hit == Hit::No {
            continue;
        }
        if excluded.contains(&site.name)? {
            left_out.push(site.name.as_str());
            continue;
        }
        targeted.push(site.name.as_str());
        if let Some(layers) = &layers {
            let layer = layers.index(&site.name)?;
            let is_wanted = layer.is_some_and(|layer| layers.wanted.contains(&layer));
            if hit == Hit::Suffix && !is_wanted {
                continue;
            }
        }
        selected.push(site);
    }
    if let (true, Some(first)) = (targeted.is_empty(), left_out.first()) {
        let message = format!(
            "takes out every module that `target_modules` names, such as `{first}`, so nothing is left to adapt"
        );
        return Err(Error::config("exclude_modules", message));
    }
    if let Some(layers) = &layers {
        layers.require_all_used(&targeted, sites)?;
    }
    if selected.is_empty() {
        return Err(nothing_selected(selection.target_modules, sites));
    }
    Ok(selected)
}

/// How a name was hit by `target_modules`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hit {
    No,
    /// The whole path is in the list: the layer filter does not apply.
    Exact,
    Suffix,
}

enum Targets<'a> {
    AllLinear,
    List(&'a [String]),
    Regex(Expression),
}

impl<'a> Targets<'a> {
    fn compile(target_modules: &'a TargetModules, sites: &[Site]) -> Result<Self> {
        Ok(match target_modules {
            TargetModules::AllLinear => Self::AllLinear,
            TargetModules::List(entries) => {
                if entries.is_empty() {
                    return Err(Error::config(
                        "target_modules",
                        "the list is empty, so nothing would be adapted; name modules or use `all-linear`",
                    ));
                }
                require_entries_exist("target_modules", entries, sites)?;
                Self::List(entries)
            }
            TargetModules::Regex(source) => {
                Self::Regex(Expression::full("target_modules", source)?)
            }
        })
    }

    fn hit(&self, site: &Site) -> Result<Hit> {
        let (exact, suffix) = match self {
            Self::AllLinear => (false, site.kind == SiteKind::Linear && !site.output_head),
            Self::List(entries) => (
                entries.contains(&site.name),
                entries.iter().any(|entry| is_suffix(entry, &site.name)),
            ),
            Self::Regex(expression) => (false, expression.matches(&site.name)?),
        };
        Ok(match (exact, suffix) {
            (true, _) => Hit::Exact,
            (false, true) => Hit::Suffix,
            (false, false) => Hit::No,
        })
    }
}

enum Excluded<'a> {
    None,
    List(&'a [String]),
    Regex(Expression),
}

impl<'a> Excluded<'a> {
    fn compile(exclude: Option<&'a ExcludeModules>, sites: &[Site]) -> Result<Self> {
        let key = "exclude_modules";
        Ok(match exclude {
            None => Self::None,
            Some(ExcludeModules::List(entries)) => {
                require_entries_exist(key, entries, sites)?;
                Self::List(entries)
            }
            Some(ExcludeModules::Regex(source)) => {
                let expression = Expression::full(key, source)?;
                let mut used = false;
                for site in sites {
                    used = used || expression.matches(&site.name)?;
                }
                if !used {
                    return Err(unmatched_regex(key, source, sites));
                }
                Self::Regex(expression)
            }
        })
    }

    fn contains(&self, name: &str) -> Result<bool> {
        Ok(match self {
            Self::None => false,
            Self::List(entries) => entries
                .iter()
                .any(|entry| entry == name || is_suffix(entry, name)),
            Self::Regex(expression) => expression.matches(name)?,
        })
    }
}

/// Whether `name` ends in `.entry`.
pub(crate) fn is_suffix(entry: &str, name: &str) -> bool {
    name.strip_suffix(entry)
        .is_some_and(|head| head.ends_with('.'))
}

/// Refuses list entries that are regular expressions or match no site.
fn require_entries_exist(key: &'static str, entries: &[String], sites: &[Site]) -> Result<()> {
    for entry in entries {
        if sites
            .iter()
            .any(|site| site.name == *entry || is_suffix(entry, &site.name))
        {
            continue;
        }
        if entry.eq_ignore_ascii_case(ALL_LINEAR) {
            return Err(Error::config(
                key,
                format!(
                    "`{entry}` is a value of its own, not an entry of a list: write `{key}: {ALL_LINEAR}`"
                ),
            ));
        }
        if entry.contains(is_metacharacter) {
            return Err(Error::config(
                key,
                format!(
                    "entry `{entry}` looks like a regular expression, but entries of a list are \
                     plain names; write the expression as one string instead of a list"
                ),
            ));
        }
        return Err(Error::config(
            key,
            format!(
                "entry `{entry}` matches no module{}; {}",
                nearest_end(entry, sites.iter().map(|site| site.name.as_str())),
                known_names(sites),
            ),
        ));
    }
    Ok(())
}

fn unmatched_regex(key: &'static str, source: &str, sites: &[Site]) -> Error {
    let hint = if source.contains(is_metacharacter) {
        String::new()
    } else {
        let list = source.split(',').map(|name| format!("\"{}\"", name.trim()));
        let list = list.collect::<Vec<_>>().join(", ");
        format!("; to name modules by the end of their path, write a list: [{list}]")
    };
    // What stands in it as it is, such as the name of a module.
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let words = source.split(|c| !is_name(c));
    let word = words.max_by_key(|word| word.len()).unwrap_or_default();
    let names = || sites.iter().map(|site| site.name.as_str());
    let shorthand = source.to_lowercase().replace('_', "-");
    let nearest = match suggest::nearest(&shorthand, [ALL_LINEAR]) {
        Some(shorthand) => format!("; did you mean `{shorthand}`?"),
        None => nearest_end(word, names()),
    };
    Error::config(
        key,
        format!(
            "the regular expression `{source}` matches no module's whole path (such as `{}`){}{hint}; {}",
            sites
                .iter()
                .find(|s| s.layer.is_some() && s.kind == SiteKind::Linear)
                .or(sites.first())
                .map_or("", |s| &s.name),
            nearest,
            known_names(sites),
        ),
    )
}

fn nothing_selected(targets: &TargetModules, sites: &[Site]) -> Error {
    let key = "target_modules";
    match targets {
        TargetModules::Regex(source) => unmatched_regex(key, source, sites),
        TargetModules::AllLinear => Error::config(
            key,
            "`all-linear` leaves no module to adapt: the model has no linear layer but the output head",
        ),
        TargetModules::List(_) => Error::config(
            key,
            "no module is left to adapt after `layers_to_transform`",
        ),
    }
}

/// `; did you mean ...`, from path ends with as many segments as `entry` has.
pub(crate) fn nearest_end<'a>(entry: &str, names: impl Iterator<Item = &'a str>) -> String {
    let segments = entry.split('.').count();
    let ends: BTreeSet<&str> = names.map(|name| last_segments(name, segments)).collect();
    suggest::did_you_mean(entry, ends)
}

/// The last segment of a module path.
pub(crate) fn last_segment(module: &str) -> &str {
    last_segments(module, 1)
}

/// The last `count` segments of a module path.
fn last_segments(name: &str, count: usize) -> &str {
    let start = name
        .rmatch_indices('.')
        .nth(count.saturating_sub(1))
        .map_or(0, |(dot, _)| dot + 1);
    &name[start..]
}

fn known_names(sites: &[Site]) -> String {
    let linears = sites.iter().filter(|site| site.kind == SiteKind::Linear);
    let names = last_names(linears.map(|site| site.name.as_str()));
    format!("linear layers of this model: {names}")
}

/// The last segments of paths, each once.
fn last_names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let ends: BTreeSet<&str> = names.map(|name| last_segments(name, 1)).collect();
    ends.into_iter().collect::<Vec<_>>().join(", ")
}
