//! Which rows of which tables are trained.

use crate::target::nearest_end;
use ferrotune_core::adapter::{Attachment, Site, SiteKind};
use ferrotune_core::params::{ParamLayoutBuilder, ParamSpec};
use ferrotune_core::{Error, Result};
use std::collections::BTreeMap;

use crate::names::{self, Part};

/// `trainable_token_indices`, once it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenIndices {
    /// Tokens of the input embedding.
    Embedding(Vec<u32>),
    /// Tokens by module, in the order of the file.
    Modules(Vec<(String, Vec<u32>)>),
}

impl TokenIndices {
    /// The same with each token once.
    pub(crate) fn distinct(self) -> Self {
        let once = |ids: Vec<u32>| counting(&ids).map(|at| ids[at]).collect();
        match self {
            Self::Embedding(ids) => Self::Embedding(once(ids)),
            Self::Modules(modules) => {
                let modules = modules.into_iter();
                Self::Modules(modules.map(|(name, ids)| (name, once(ids))).collect())
            }
        }
    }

    /// The tokens of `module`'s rows.
    pub(crate) fn of(&self, module: &str) -> Option<&[u32]> {
        match self {
            Self::Embedding(ids) => Some(ids),
            Self::Modules(modules) => {
                let found = modules
                    .iter()
                    .find(|(name, _)| module.ends_with(name.as_str()));
                found.map(|(_, ids)| ids.as_slice())
            }
        }
    }
}

/// Which of `ids` count: PEFT writes rows one after the other, so it is the last of a token.
pub(crate) fn counting(ids: &[u32]) -> impl Iterator<Item = usize> {
    let last: BTreeMap<u32, usize> = ids.iter().copied().zip(0..).collect();
    (0..ids.len()).filter(move |at| last[&ids[*at]] == *at)
}

/// A table with the tokens whose rows are trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rows<'a> {
    pub(crate) site: &'a Site,
    pub(crate) indices: &'a [u32],
}

/// What `key` means on a model of `sites`. A tied head that is not named, or named with the embedding's tokens, is
/// the embedding's; named alone or with other tokens it is apart from it, where the latter are not to be `kept_tied`.
///
/// # Errors
/// [`Error::Config`] for a module that is no table or named twice, for tokens that the table lacks or that
/// are named twice, and for a tied head that cannot stay it.
///
/// # Source
/// PEFT's `set_additional_trainable_modules`.
pub(crate) fn rows<'a>(
    key: &'static str,
    tokens: &'a TokenIndices,
    sites: &'a [Site],
    kept_tied: bool,
) -> Result<Vec<Rows<'a>>> {
    let mut found: Vec<Rows<'_>> = Vec::new();
    match tokens {
        TokenIndices::Embedding(indices) => {
            let site = sites.iter().find(|s| s.kind == SiteKind::Embedding);
            let site = site.ok_or_else(|| Error::config(key, "the model has no embedding"))?;
            found.push(Rows { site, indices });
        }
        TokenIndices::Modules(modules) => {
            for (name, indices) in modules {
                for site in tables(key, name, sites)? {
                    if found.iter().any(|rows| rows.site.id == site.id) {
                        let message = format!("`{name}` is `{}`, which is named before", site.name);
                        return Err(Error::config(key, message));
                    }
                    found.push(Rows { site, indices });
                }
            }
        }
    }
    for rows in &found {
        check_indices(key, *rows)?;
    }
    let follows = |head: &Rows<'_>| {
        let same = |rows: &Rows<'_>| {
            Some(rows.site.id) == head.site.tied_to && rows.indices == head.indices
        };
        found.iter().any(same)
    };
    let is_tied = |rows: &Rows<'_>| rows.site.tied_to.is_some();
    let apart = found.iter().find(|rows| is_tied(rows) && !follows(rows));
    // PEFT keeps the two tied where both are named, and looks no further where one is.
    let beside = |head: &Rows<'_>| {
        found
            .iter()
            .any(|rows| Some(rows.site.id) == head.site.tied_to)
    };
    if let Some(head) = apart.filter(|head| kept_tied && beside(head)) {
        return Err(Error::config(
            key,
            format!(
                "names tokens of `{}` that are not those of the input embedding, whose weight it is to keep by \
                 `ensure_weight_tying`; name the embedding alone, or give both the same tokens",
                head.site.name
            ),
        ));
    }
    let apart = apart.map(|head| head.site.id);
    found.retain(|rows| !is_tied(rows) || Some(rows.site.id) == apart);
    Ok(found)
}

/// Declares the trained rows of a table under PEFT's name.
pub(crate) fn declare(rows: Rows<'_>, part: Part, params: &mut ParamLayoutBuilder) -> Attachment {
    let Rows { site, indices } = rows;
    let shape = [indices.len(), site.in_features];
    let name = names::tensor(&site.name, part);
    Attachment::TrainRows {
        rows: params.add(ParamSpec::new(name, shape, site.execution_order)),
        indices: indices.to_vec(),
    }
}

/// The tables whose paths end with `name`.
fn tables<'a>(key: &'static str, name: &str, sites: &'a [Site]) -> Result<Vec<&'a Site>> {
    let is_table = |site: &&Site| site.kind == SiteKind::Embedding || site.output_head;
    let all = || sites.iter().filter(is_table);
    let found: Vec<&Site> = all().filter(|site| site.name.ends_with(name)).collect();
    if !found.is_empty() && !name.is_empty() {
        return Ok(found);
    }
    let names = || all().map(|site| site.name.as_str());
    let known: Vec<&str> = names().collect();
    Err(Error::config(
        key,
        format!(
            "`{name}` is no table of token rows{}; this model has {}",
            nearest_end(name, names()),
            known.join(", ")
        ),
    ))
}

fn check_indices(key: &'static str, rows: Rows<'_>) -> Result<()> {
    let Rows { site, indices } = rows;
    let mut sorted = indices.to_vec();
    sorted.sort_unstable();
    if indices.is_empty() {
        let message = format!("no token of `{}` is named; leave it out instead", site.name);
        return Err(Error::config(key, message));
    }
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::config(
            key,
            format!("token {} is named twice", pair[0]),
        ));
    }
    match sorted.last() {
        Some(&last) if last as usize >= site.out_features => Err(Error::config(
            key,
            format!(
                "token {last} is no row of `{}`, which has {} rows; where the adapter was trained on a base whose \
                 vocabulary was resized, give that base",
                site.name, site.out_features
            ),
        )),
        _ => Ok(()),
    }
}
