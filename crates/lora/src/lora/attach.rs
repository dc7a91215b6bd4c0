//! What a LoRA trains where: its updates, and the parts of the base that it trains beside them.

#[cfg(test)]
mod tests;

use super::config::LoraBias;
use super::names::{self, Part};
use super::{LoraConfig, files, saved, tokens};
use crate::target::{self, Target, TargetModules, is_suffix};
use ferrotune_core::adapter::{Attachment, LowRank, Magnitude, Site, SiteId, SiteKind};
use ferrotune_core::params::{ParamId, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::{Error, Result};
use std::collections::BTreeSet;

/// Everything that `config` attaches to a model of `sites`.
pub(super) fn attach(
    config: &LoraConfig,
    sites: &[Site],
    params: &mut ParamLayoutBuilder,
) -> Result<Vec<(SiteId, Attachment)>> {
    require_stack(&config.layer_replication, sites)?;
    let mut attachments = Vec::new();
    let tied = config
        .ensure_weight_tying
        .then(|| tied_pair(sites))
        .flatten();
    let saved = saved_sites(config, sites, tied)?;
    let open: Vec<Site> = sites
        .iter()
        .filter(|site| !saved::shadows(&config.modules_to_save, &site.name))
        .cloned()
        .collect();
    require_targets_open(config, sites, &open)?;
    let selection = config.selection()?;
    let mut targets = target::resolve(&open, &selection, &config.rank_and_alpha())?;
    if *selection.target_modules == TargetModules::AllLinear {
        files::require_expressible(&open, &targets)?;
    }
    let embedding =
        tied.and_then(|[embedding, head]| move_to_embedding(&mut targets, embedding, head));
    if let Some([table, head]) = tied
        && saved.iter().any(|site| site.id == table.id)
        && targets.iter().any(|target| target.site.id == table.id)
    {
        let message = format!(
            "keeps `{}` and `{}` one weight, and one of them is adapted and the other trained as a whole; leave one \
             out of `target_modules` or `modules_to_save`",
            table.name, head.name
        );
        return Err(Error::config("ensure_weight_tying", message));
    }
    if config.use_dora && embedding.is_some() {
        let message = "true beside `use_dora`: an update whose norms are those of the embedding's columns is none \
                       of the head's rows; switch one off, or leave the embedding out";
        return Err(Error::config("ensure_weight_tying", message));
    }
    for target in &targets {
        require_adaptable(config, target.site)?;
        require_startable(config, target)?;
        let low_rank = declare(config, target, params);
        attachments.push((target.site.id, Attachment::LowRank(low_rank)));
        if let (Some(head), true) = (embedding, target.site.kind == SiteKind::Embedding) {
            attachments.push((head.id, Attachment::LowRank(low_rank)));
        }
    }
    for site in &saved {
        let head = sites.iter().find(|other| other.tied_to == Some(site.id));
        let sharing = head.filter(|_| tied.is_some());
        attachments.push((site.id, train(site, sharing, params)));
        if let (Some(head), None) = (head, tied)
            && !saved.iter().any(|site| site.id == head.id)
            && !targets.iter().any(|target| target.site.id == head.id)
        {
            attachments.push((head.id, Attachment::KeepBase));
        }
    }
    let taken: BTreeSet<SiteId> = attachments.iter().map(|(id, _)| *id).collect();
    if let Some(indices) = &config.trainable_token_indices {
        let key = "trainable_token_indices";
        for rows in tokens::rows(key, indices, sites, config.ensure_weight_tying)? {
            require_free(sites, rows.site, &taken)?;
            attachments.push((rows.site.id, tokens::declare(rows, Part::TokenRows, params)));
        }
    }
    let adapted: BTreeSet<SiteId> = targets.iter().map(|target| target.site.id).collect();
    let whole: BTreeSet<SiteId> = saved.iter().map(|site| site.id).collect();
    for site in sites.iter().filter(|s| s.bias && !whole.contains(&s.id)) {
        let is_adapted = adapted.contains(&site.id);
        let part = match (config.bias, is_adapted) {
            (LoraBias::None, _) | (LoraBias::LoraOnly, false) => continue,
            (_, true) => Part::AdaptedBias,
            (LoraBias::All, false) => Part::Bias,
        };
        attachments.push((site.id, Attachment::TrainBias(vector(site, part, params))));
    }
    Ok(attachments)
}

/// Refuses sites of another stack of layers than `ranges` make.
fn require_stack(ranges: &[[usize; 2]], sites: &[Site]) -> Result<()> {
    let order: Vec<usize> = ranges.iter().flat_map(|&[start, end]| start..end).collect();
    let fits = |site: &Site| {
        let Some(layer) = site.layer else {
            return true;
        };
        let source = order.get(layer).map(|source| {
            let [at, from] = [layer, *source].map(|number| format!(".{number}."));
            site.name.replacen(&at, &from, 1)
        });
        source.is_some_and(|name| name == site.stored_name)
    };
    let knows_layers = sites.iter().any(|site| site.layer.is_some());
    if order.is_empty() || (knows_layers && sites.iter().all(fits)) {
        return Ok(());
    }
    Err(Error::config(
        "layer_replication",
        "the model has other layers than it asks for: it must be the one that `Adapter::decoder` makes of the base, \
         whose architecture must be known",
    ))
}

/// The input embedding and the head that shares its weight.
fn tied_pair(sites: &[Site]) -> Option<[&Site; 2]> {
    let head = sites.iter().find(|site| site.tied_to.is_some())?;
    let embedding = sites.iter().find(|site| Some(site.id) == head.tied_to)?;
    Some([embedding, head])
}

/// The sites trained as a whole; of a pair that stays tied, the embedding stands for both.
fn saved_sites<'a>(
    config: &LoraConfig,
    sites: &'a [Site],
    tied: Option<[&'a Site; 2]>,
) -> Result<Vec<&'a Site>> {
    let mut saved = saved::sites(sites, &config.modules_to_save)?;
    if let Some([embedding, head]) = tied
        && let Some(at) = saved.iter().position(|site| site.id == head.id)
    {
        saved.remove(at);
        if !saved.iter().any(|site| site.id == embedding.id) {
            saved.insert(0, embedding);
        }
    }
    Ok(saved)
}

/// Refuses entries of a list that name only what is trained as a whole.
fn require_targets_open(config: &LoraConfig, sites: &[Site], open: &[Site]) -> Result<()> {
    let Some(TargetModules::List(entries)) = &config.target_modules else {
        return Ok(());
    };
    let hits = |entry: &String, sites: &[Site]| {
        let mut names = sites.iter().map(|site| &site.name);
        names.any(|name| name == entry || is_suffix(entry, name))
    };
    match entries.iter().find(|e| hits(e, sites) && !hits(e, open)) {
        None => Ok(()),
        Some(entry) => Err(Error::config(
            "target_modules",
            format!(
                "`{entry}` is trained as a whole by `modules_to_save`; take it out of one of them"
            ),
        )),
    }
}

/// Where the pair that stays tied is adapted, the embedding is, and the head follows: returns the head.
fn move_to_embedding<'a>(
    targets: &mut Vec<Target<'a>>,
    embedding: &'a Site,
    head: &'a Site,
) -> Option<&'a Site> {
    let of_pair = |site: &Site| site.id == embedding.id || site.id == head.id;
    let first = targets.iter().position(|target| of_pair(target.site))?;
    let Target { rank, alpha, .. } = targets[first];
    targets.retain(|target| !of_pair(target.site));
    let site = embedding;
    targets.insert(0, Target { site, rank, alpha });
    Some(head)
}

/// Refuses rows of a table that is adapted or trained as a whole, itself or where it is shared.
fn require_free(sites: &[Site], table: &Site, taken: &BTreeSet<SiteId>) -> Result<()> {
    let shares = |site: &&Site| site.id == table.id || site.tied_to == Some(table.id);
    match sites.iter().filter(shares).find(|s| taken.contains(&s.id)) {
        None => Ok(()),
        Some(site) => Err(Error::config(
            "trainable_token_indices",
            format!(
                "trains rows of `{}`, and `{}` is adapted or trained as a whole as well; leave one of \
                 them out",
                table.name, site.name
            ),
        )),
    }
}

/// Declares A and B of one target.
fn declare(config: &LoraConfig, target: &Target<'_>, params: &mut ParamLayoutBuilder) -> LowRank {
    let (site, rank) = (target.site, target.rank);
    let mut add = |part, shape: [usize; 2]| {
        let name = names::tensor(&site.name, part);
        let spec = ParamSpec::new(name, shape, site.execution_order);
        let transposed = matches!(part, Part::EmbeddingA | Part::EmbeddingB);
        params.add(if transposed { spec.transposed() } else { spec })
    };
    // A table is the transpose of PEFT's linear from tokens to features: its A and B change places.
    let [a, b] = match site.kind {
        SiteKind::Embedding => [Part::EmbeddingB, Part::EmbeddingA],
        _ => [Part::A, Part::B],
    };
    let (a, b) = (
        add(a, [rank, site.in_features]),
        add(b, [site.out_features, rank]),
    );
    LowRank {
        a,
        b,
        rank,
        scale: config.scale(rank, target.alpha),
        dropout: config.dropout as f32,
        bias: config
            .lora_bias
            .then(|| vector(site, Part::BiasOfB, params)),
        magnitude: config.use_dora.then(|| magnitude(site, params)),
    }
}

/// Declares weight and bias of a site that is trained as a whole, and whose weight is also that of `sharing`.
fn train(site: &Site, sharing: Option<&Site>, params: &mut ParamLayoutBuilder) -> Attachment {
    let shape = match site.kind {
        SiteKind::Norm => vec![site.out_features],
        SiteKind::Linear | SiteKind::Embedding => vec![site.out_features, site.in_features],
    };
    let name = names::tensor(&site.name, Part::Weight);
    let mut weight = ParamSpec::new(name, shape, site.execution_order);
    weight.transposed = site.stored_transposed;
    weight.also = sharing.map(|site| names::tensor(&site.name, Part::Weight));
    Attachment::TrainBase {
        weight: params.add(weight),
        bias: site.bias.then(|| vector(site, Part::Bias, params)),
    }
}

/// Declares DoRA's norms, one per feature of the output.
fn magnitude(site: &Site, params: &mut ParamLayoutBuilder) -> Magnitude {
    match site.kind {
        SiteKind::Embedding => {
            let name = names::tensor(&site.name, Part::Magnitude);
            let spec = ParamSpec::new(name, [site.in_features], site.execution_order);
            Magnitude::OfColumns(params.add(spec))
        }
        SiteKind::Linear | SiteKind::Norm => {
            Magnitude::OfRows(vector(site, Part::Magnitude, params))
        }
    }
}

fn vector(site: &Site, part: Part, params: &mut ParamLayoutBuilder) -> ParamId {
    let name = names::tensor(&site.name, part);
    params.add(ParamSpec::new(
        name,
        [site.out_features],
        site.execution_order,
    ))
}

/// Refuses targets whose weight or input a start cannot be made of.
fn require_startable(config: &LoraConfig, target: &Target<'_>) -> Result<()> {
    let (init, Target { site, rank, .. }) = (config.init_lora_weights, *target);
    let Some((most, why)) = init.most([site.out_features, site.in_features]) else {
        return Ok(());
    };
    let name = init.name();
    if site.kind != SiteKind::Linear || site.output_head {
        let message = format!(
            "{name} is for linears inside the layers, and `{}` is none; leave that out",
            site.name
        );
        return Err(Error::config("init_lora_weights", message));
    }
    if rank > most {
        let message = format!(
            "{rank} is more than {most}, the most that {name} finds for `{}` of {} x {}, where a rank takes {why}; \
             lower it, for that module alone by `rank_pattern`",
            site.name, site.out_features, site.in_features
        );
        return Err(Error::config("r", message));
    }
    Ok(())
}

fn require_adaptable(config: &LoraConfig, site: &Site) -> Result<()> {
    if site.kind == SiteKind::Norm {
        return Err(Error::config(
            "target_modules",
            format!(
                "`{}` is a norm, and LoRA needs a linear layer or an embedding; leave it out, put it into \
                 `exclude_modules`, or train it as a whole with `modules_to_save`",
                site.name
            ),
        ));
    }
    if config.lora_bias && site.kind == SiteKind::Embedding {
        return Err(Error::config(
            "lora_bias",
            format!(
                "true gives B a bias, and PEFT has none for an embedding such as `{}`; leave that out of \
                 `target_modules`, or this off",
                site.name
            ),
        ));
    }
    if config.use_dora && site.output_head {
        return Err(Error::config(
            "use_dora",
            format!(
                "true is not supported yet on `{}`, only on linears inside the layers and on embeddings; leave \
                 that out",
                site.name
            ),
        ));
    }
    Ok(())
}
