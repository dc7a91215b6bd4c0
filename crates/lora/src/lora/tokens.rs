//! Which rows of which tables are trained.

use crate::target::nearest_end;
use ferrotune_core::adapter::{Attachment, Site, SiteKind};
use ferrotune_core::params::{ParamLayoutBuilder, ParamSpec};
use ferrotune_core::{Error, Result};

use super::names::{self, Part};

/// `trainable_token_indices`, once it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenIndices {
    /// Tokens of the input embedding.
    Embedding(Vec<u32>),
    /// Tokens by module, in the order of the file.
    Modules(Vec<(String, Vec<u32>)>),
}

/// A table with the tokens whose rows are trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rows<'a> {
    pub(crate) site: &'a Site,
    pub(crate) indices: &'a [u32],
}

/// What `key` means on a model of `sites`: a head that is tied is the embedding's.
///
/// # Errors
/// [`Error::Config`] for a module that is no table, for tokens that the table lacks or that are named
/// twice, and for a tied head whose tokens are others than the embedding's.
pub(crate) fn rows<'a>(
    key: &'static str,
    tokens: &'a TokenIndices,
    sites: &'a [Site],
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
                let site = table(key, name, sites)?;
                found.push(Rows { site, indices });
            }
        }
    }
    for rows in &found {
        check_indices(key, *rows)?;
    }
    let twin = |head: &Rows<'_>| {
        found
            .iter()
            .find(|rows| Some(rows.site.id) == head.site.tied_to)
    };
    for head in found.iter().filter(|rows| rows.site.tied_to.is_some()) {
        if twin(head).is_none_or(|twin| twin.indices != head.indices) {
            return Err(Error::config(
                key,
                format!(
                    "`{}` shares its weight with the input embedding: name the embedding, whose rows \
                     it then shares too, or give both the same tokens",
                    head.site.name
                ),
            ));
        }
    }
    found.retain(|rows| rows.site.tied_to.is_none());
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

fn table<'a>(key: &'static str, name: &str, sites: &'a [Site]) -> Result<&'a Site> {
    let is_table = |site: &&Site| site.kind == SiteKind::Embedding || site.output_head;
    let found = sites
        .iter()
        .filter(is_table)
        .find(|s| s.name.ends_with(name));
    found.ok_or_else(|| {
        let tables = sites.iter().filter(is_table).map(|s| s.name.as_str());
        let known: Vec<&str> = tables.clone().collect();
        Error::config(
            key,
            format!(
                "`{name}` is no table of token rows{}; this model has {}",
                nearest_end(name, tables),
                known.join(", ")
            ),
        )
    })
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
                "token {last} is no row of `{}`, which has {} rows",
                site.name, site.out_features
            ),
        )),
        _ => Ok(()),
    }
}
