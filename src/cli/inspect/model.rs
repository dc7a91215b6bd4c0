//! `inspect model`: what a base is made of, and what an adapter would attach to.

use super::super::{Outcome, overrides, print_line};
use ferrotune::core::adapter::{Adapter, Site, SiteKind};
use ferrotune::core::config::Names;
use ferrotune::core::io::ModelFiles;
use ferrotune::core::model::{DecoderConfig, ModelPlan, WeightSource};
use ferrotune::core::params::ParamLayoutBuilder;
use ferrotune::core::{Error, ExitCode, Result};
use ferrotune::hub;
use ferrotune::lora::{LoraAdapter, LoraConfig, TargetModules};
use serde_json::{Value, json};
use std::collections::BTreeMap;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Directory of the base model, or its name on the hub: OWNER/NAME or OWNER/NAME@REVISION
    directory: String,
    /// What a LoRA would target: names, or one of all-linear and a regular expression; else PEFT's choice
    /// and all-linear are shown
    #[arg(long, num_args = 1..)]
    target_modules: Vec<String>,
    /// Rank of that LoRA
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Sites of one name and shape in every layer that has them.
struct Row {
    name: String,
    kind: &'static str,
    shape: String,
    bias: bool,
    count: usize,
}

/// What a choice of targets would come to.
struct Choice {
    targets: String,
    modules: Vec<String>,
    trained: usize,
}

pub(super) fn run(args: &Args) -> Outcome {
    let directory = hub::model(&args.directory, None, "directory")?;
    let decoder = DecoderConfig::open(&directory)?;
    let files = ModelFiles::open(&directory)?;
    let plan = ModelPlan::new(&decoder);
    files.check(&plan)?;
    let sites = plan.sites;
    let choices = choices(args, &decoder.model_type, &sites)?;
    let mut dtypes: BTreeMap<String, usize> = BTreeMap::new();
    for name in files.names() {
        if let Some(meta) = files.meta(name) {
            *dtypes.entry(format!("{:?}", meta.dtype)).or_default() += 1;
        }
    }
    let mut bytes = 0;
    for shard in files.shards() {
        bytes += std::fs::metadata(shard.path())
            .map_err(Error::read(shard.path()))?
            .len();
    }
    let parameters = decoder.parameters();
    let quantised = files.quantisation();
    if args.json {
        let modules = sites.iter().map(|site| {
            json!({
                "name": site.name, "kind": kind(site), "shape": shape(site), "bias": site.bias,
                "tied_to": site.tied_to.map(|id| &sites[id.0].name),
            })
        });
        let choices = choices.iter().map(|c| {
            json!({"target_modules": c.targets, "modules": c.modules, "trained_values": c.trained})
        });
        print_line(json!({
            "model_type": decoder.model_type, "parameters": parameters, "bytes": bytes,
            "files": files.shards().len(), "dtypes": dtypes, "quantised": quantised,
            "modules": modules.collect::<Vec<Value>>(), "rank": args.rank,
            "choices": choices.collect::<Vec<Value>>(),
        }))?;
        return Ok(ExitCode::Done);
    }
    let types: Vec<String> = dtypes
        .iter()
        .map(|(d, n)| format!("{n} tensors of {d}"))
        .collect();
    print_line(format_args!(
        "{}: {} layers, hidden {}, vocabulary {}, {parameters} parameters; {:.1} MB in {} files, {}{}",
        decoder.model_type,
        decoder.layers,
        decoder.hidden_size,
        decoder.vocab_size,
        bytes as f64 / 1e6,
        files.shards().len(),
        types.join(", "),
        quantised.map_or_else(String::new, |name| format!(", linears in {name}"))
    ))?;
    print_rows(&rows(&sites))?;
    for choice in &choices {
        print_line(format_args!(
            "{}: {} modules, {} trained values at rank {} ({:.2} %)",
            choice.targets,
            choice.modules.len(),
            choice.trained,
            args.rank,
            100.0 * choice.trained as f64 / parameters as f64
        ))?;
    }
    Ok(ExitCode::Done)
}

fn choices(args: &Args, model_type: &str, sites: &[Site]) -> Result<Vec<Choice>> {
    let asked = match &args.target_modules[..] {
        [] => {
            let default = ferrotune::lora::target::default_target_modules(model_type);
            default
                .into_iter()
                .chain([TargetModules::AllLinear])
                .collect()
        }
        words => {
            let names = Names::from_text(&overrides::list(words));
            let names = names.map_err(|expected| {
                let message = format!("is {}; expected {expected}", words.join(" "));
                Error::config("target_modules", message)
            });
            vec![TargetModules::from(&names?)]
        }
    };
    asked
        .into_iter()
        .map(|targets| {
            let name = match &targets {
                TargetModules::AllLinear => "all-linear".to_owned(),
                TargetModules::Regex(source) => source.clone(),
                TargetModules::List(names) => names.join(", "),
            };
            let config = LoraConfig {
                rank: args.rank,
                target_modules: Some(targets),
                ..LoraConfig::default()
            };
            let mut params = ParamLayoutBuilder::new();
            let attached = LoraAdapter::new(config, model_type)?.attach(sites, &mut params)?;
            let modules = attached.iter().map(|(id, _)| sites[id.0].name.clone());
            Ok(Choice {
                targets: name,
                modules: modules.collect(),
                trained: params.build()?.trainable(),
            })
        })
        .collect()
}

fn kind(site: &Site) -> &'static str {
    match (site.kind, site.output_head) {
        (_, true) if site.tied_to.is_some() => "head, the embedding's weight",
        (_, true) => "head",
        (SiteKind::Linear, _) => "linear",
        (SiteKind::Embedding, _) => "embedding",
        (SiteKind::Norm, _) => "norm",
    }
}

fn shape(site: &Site) -> Vec<usize> {
    match site.kind {
        SiteKind::Norm => vec![site.out_features],
        SiteKind::Linear | SiteKind::Embedding => vec![site.out_features, site.in_features],
    }
}

/// One row for what is alike in all layers.
fn rows(sites: &[Site]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for site in sites {
        let name = match site.layer {
            Some(layer) => site.name.replacen(&format!(".{layer}."), ".N.", 1),
            None => site.name.clone(),
        };
        let shape: Vec<String> = shape(site).iter().map(ToString::to_string).collect();
        let row = Row {
            name,
            kind: kind(site),
            shape: shape.join(" x "),
            bias: site.bias,
            count: 1,
        };
        let alike = |r: &&mut Row| (&r.name, &r.shape, r.bias) == (&row.name, &row.shape, row.bias);
        match rows.iter_mut().find(alike) {
            Some(found) => found.count += 1,
            None => rows.push(row),
        }
    }
    rows
}

fn print_rows(rows: &[Row]) -> Result<()> {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    print_line("")?;
    for row in rows {
        let bias = if row.bias { ", with a bias" } else { "" };
        print_line(format_args!(
            "{:>4} x  {:width$}  {:>15}  {}{bias}",
            row.count, row.name, row.shape, row.kind
        ))?;
    }
    print_line("")
}
