//! What a method attaches to: a table of modules, one row for what is alike in all layers.

use super::adapter::Attached;
use ferrotune_core::adapter::{Attachment, Site, SiteKind};
use serde_json::{Value, json};
use std::collections::HashMap;

/// Modules of one name, shape and attachment, in every layer that has them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Matched {
    /// The module's name, with `N` for the layer; none for what belongs to no module.
    pub(super) name: Option<String>,
    /// Rows and columns of the weight, or the length of a norm.
    shape: Vec<usize>,
    /// What stands there.
    attached: String,
    /// How many there are.
    pub(super) count: usize,
    /// Trainable scalars of all of them.
    pub(super) trainable: usize,
}

/// The table of a method on the sites of a model. Its trainable scalars are all there are.
pub(super) fn table(attached: &Attached) -> Vec<Matched> {
    let mut scalars = scalars(attached);
    let mut rows: Vec<Matched> = Vec::new();
    for site in &attached.sites {
        let here = attached.attachments.iter().filter(|(id, _)| *id == site.id);
        let words: Vec<String> = here.filter_map(|(_, a)| describe(a)).collect();
        let trainable = scalars.remove(&Some(site.id.0)).unwrap_or(0);
        if words.is_empty() && trainable == 0 {
            continue;
        }
        let row = Matched {
            name: Some(name(site)),
            shape: shape(site),
            attached: words.join(" and "),
            count: 1,
            trainable,
        };
        let is_alike = |r: &&mut Matched| {
            (&r.name, &r.shape, &r.attached) == (&row.name, &row.shape, &row.attached)
        };
        match rows.iter_mut().find(is_alike) {
            Some(found) => {
                found.count += 1;
                found.trainable += trainable;
            }
            None => rows.push(row),
        }
    }
    rows.extend(scalars.remove(&None).map(|trainable| Matched {
        name: None,
        shape: Vec::new(),
        attached: "shared".into(),
        count: 1,
        trainable,
    }));
    rows
}

/// Trainable scalars by the index of their site, which is the module that a tensor is named after.
fn scalars(attached: &Attached) -> HashMap<Option<usize>, usize> {
    let sites = attached.sites.iter();
    let sites: HashMap<&str, usize> = sites.map(|site| (site.name.as_str(), site.id.0)).collect();
    let mut scalars = HashMap::new();
    for (_, segment) in attached.layout.by_name() {
        let name = &segment.spec.name;
        let dots = || name.match_indices('.').map(|(at, _)| at);
        let begins = || std::iter::once(0).chain(dots().map(|at| at + 1));
        let ends = || std::iter::once(name.len()).chain(dots());
        let site = begins().find_map(|begin| {
            let names = ends().filter_map(|end| name.get(begin..end));
            let found = names.filter_map(|part| Some((part.len(), *sites.get(part)?)));
            found.max().map(|(_, site)| site)
        });
        *scalars.entry(site).or_default() += segment.spec.len();
    }
    scalars
}

fn name(site: &Site) -> String {
    match site.layer {
        Some(layer) => site.name.replacen(&format!(".{layer}."), ".N.", 1),
        None => site.name.clone(),
    }
}

fn shape(site: &Site) -> Vec<usize> {
    match site.kind {
        SiteKind::Norm => vec![site.out_features],
        SiteKind::Linear | SiteKind::Embedding => vec![site.out_features, site.in_features],
    }
}

/// What stands at a site, in words; nothing for what trains nothing there.
fn describe(attachment: &Attachment) -> Option<String> {
    Some(match attachment {
        Attachment::LowRank(update) => format!("rank {}", update.rank),
        Attachment::Factors(factors) => format!("rank {}", factors.rank()),
        Attachment::Weight(_) => "a new weight".into(),
        Attachment::TrainBase { .. } => "trained whole".into(),
        Attachment::TrainBias(_) => "its bias".into(),
        Attachment::TrainRows { indices, .. } => format!("{} rows", indices.len()),
        Attachment::Prompt(prompt) => format!("{} virtual tokens", prompt.tokens),
        Attachment::Custom(_) => "an own pass".into(),
        Attachment::KeepBase | Attachment::Invocation(_) => return None,
    })
}

/// The rows, in columns.
pub(super) fn lines(table: &[Matched]) -> Vec<String> {
    let name = |row: &Matched| row.name.clone().unwrap_or_else(|| "(all modules)".into());
    let shape = |row: &Matched| {
        let sizes: Vec<String> = row.shape.iter().map(ToString::to_string).collect();
        sizes.join(" x ")
    };
    let widest = |cell: &dyn Fn(&Matched) -> String| {
        let widths = table.iter().map(|row| cell(row).len());
        widths.max().unwrap_or(0)
    };
    let (names, shapes) = (widest(&name), widest(&shape));
    let words = widest(&|row| row.attached.clone());
    table
        .iter()
        .map(|row| {
            format!(
                "{:>4} x  {:names$}  {:>shapes$}  {:words$}  {:>12} trainable",
                row.count,
                name(row),
                shape(row),
                row.attached,
                row.trainable
            )
        })
        .collect()
}

/// The rows for machines.
pub(super) fn to_json(table: &[Matched]) -> Value {
    let rows = table.iter().map(|row| {
        json!({
            "name": row.name,
            "count": row.count,
            "shape": row.shape,
            "attached": row.attached,
            "trainable_parameters": row.trainable,
        })
    });
    rows.collect()
}
