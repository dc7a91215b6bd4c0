use ferrotune_core::adapter::{Adapter, Attachment, Site, SiteId};
use ferrotune_core::config::{
    InitLoraWeights as Init, LoraArguments, LoraBias as Bias, TokenIndices as Tokens, TrainConfig,
};
use ferrotune_core::full::FullFineTuning;
use ferrotune_core::model::{DecoderConfig, ModelPlan};
use ferrotune_core::params::{ParamLayout, ParamLayoutBuilder};
use ferrotune_core::{Error, Result};
use ferrotune_lora::target::RankAndAlpha;
use ferrotune_lora::{
    ExcludeModules, GivenRank, InitLoraWeights, LoraAdapter, LoraBias, LoraConfig, LoraFa,
    LoraPlus, PeftConfig, Start, TargetModules, TokenIndices, require_rank,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The method a configuration asks for: LoRA, or full fine-tuning with `use_peft: false`.
///
/// # Errors
/// [`Error::Config`] for a setting that contradicts another or is not supported yet.
pub fn adapter_of(
    config: &TrainConfig,
    base: &Path,
    decoder: &DecoderConfig,
) -> Result<Box<dyn Adapter>> {
    adapter_from(config, base, decoder, None)
}

/// [`adapter_of`] that starts from what is known of its start.
pub(super) fn adapter_from(
    config: &TrainConfig,
    base: &Path,
    decoder: &DecoderConfig,
    start: Option<Start>,
) -> Result<Box<dyn Adapter>> {
    if !config.lora.use_peft {
        return Ok(Box::new(FullFineTuning));
    }
    let adapter: Box<dyn Adapter> = match &config.lora.peft_config {
        Some(keys) => {
            require_no_lora_keys(config)?;
            require_same_task(config, keys)?;
            let object = keys.clone().into_iter().collect();
            let method = PeftConfig::from_config(PEFT_CONFIG, &object)?.for_base(base);
            let method = method.for_task(&config.lora.lora_task_type);
            let adapter = method.into_adapter(&decoder.model_type);
            adapter.map_err(|e| in_its_names(config, e))?
        }
        None => {
            let adapter = lora(config, base, decoder)?;
            Box::new(match start {
                Some(start) => adapter.starting_from(start)?,
                None => adapter,
            })
        }
    };
    let adapter = match config.optimizer.use_lora_fa {
        true => Box::new(LoraFa::new(adapter)),
        false => adapter,
    };
    Ok(match config.optimizer.loraplus_lr_ratio {
        Some(ratio) => {
            let optimizer = &config.optimizer;
            let embedding = optimizer.loraplus_lr_embedding / optimizer.learning_rate;
            Box::new(LoraPlus::new(adapter, ratio, embedding))
        }
        None => adapter,
    })
}

/// The LoRA that the keys of one describe.
pub(super) fn lora(
    config: &TrainConfig,
    base: &Path,
    decoder: &DecoderConfig,
) -> Result<LoraAdapter> {
    let adapter = LoraAdapter::new(lora_config(config, base)?, &decoder.model_type);
    let adapter = adapter.map_err(|e| in_its_names(config, e))?;
    Ok(match config.lora.lora_convert_init {
        true => adapter,
        false => adapter.without_conversion(),
    })
}

/// The model that the method works on, made of the base's.
///
/// # Errors
/// [`Error::Config`] as [`adapter_of`], and for layers that the base has not.
pub(super) fn decoder(
    config: &TrainConfig,
    base: &Path,
    of_base: DecoderConfig,
) -> Result<DecoderConfig> {
    let method = adapter_of(config, base, &of_base)?;
    method.decoder(of_base).map_err(|e| in_its_names(config, e))
}

/// What the method attaches to the shape of the base, and the layout of what it trains.
///
/// # Errors
/// [`Error::Config`] as [`adapter_of`], and for targets that match nothing.
pub(super) fn attach(
    config: &TrainConfig,
    base: &Path,
    decoder: &DecoderConfig,
) -> Result<Attached> {
    let sites = ModelPlan::new(decoder).sites;
    let mut builder = ParamLayoutBuilder::new();
    let adapter = adapter_of(config, base, decoder)?;
    let attachments = adapter
        .attach(&sites, &mut builder)
        .map_err(|e| in_its_names(config, e))?;
    require_biases(config, &attachments)?;
    require_ranks(config, &sites, &attachments).map_err(|e| in_its_names(config, e))?;
    let layout = builder.build()?;
    Ok(Attached {
        trainable: layout.trainable(),
        layout,
        frozen: adapter.frozen_bytes(),
        saved_frozen: adapter.saved_frozen_bytes(),
        notes: notes(config, &sites, &attachments),
        sites,
        attachments,
    })
}

/// Refuses a LoRA's rank above both dimensions of a weight; other methods look at their own.
fn require_ranks(
    config: &TrainConfig,
    sites: &[Site],
    attachments: &[(SiteId, Attachment)],
) -> Result<()> {
    let lora = &config.lora;
    let given = RankAndAlpha {
        rank: lora.lora_r,
        alpha: lora.lora_alpha,
        rank_pattern: &lora.lora_rank_pattern.0,
        alpha_pattern: &lora.lora_alpha_pattern.0,
    };
    low_ranks(sites, attachments).try_for_each(|(site, rank)| {
        let given = given.given_rank(&site.name)?;
        require_rank(site, GivenRank { rank, ..given })
    })
}

/// Refuses a `lora_bias` that trains nothing.
fn require_biases(config: &TrainConfig, attachments: &[(SiteId, Attachment)]) -> Result<()> {
    let lora = &config.lora;
    let trains = |(_, a): &(SiteId, Attachment)| {
        // What is trained as a whole has its bias with it.
        matches!(
            a,
            Attachment::TrainBias(_) | Attachment::TrainBase { bias: Some(_), .. }
        )
    };
    if !lora.use_peft || lora.lora_bias == Bias::None || attachments.iter().any(trains) {
        return Ok(());
    }
    let of = match lora.lora_bias {
        Bias::LoraOnly => "no adapted layer of this base has one",
        _ => "this base has none",
    };
    let place = config
        .origin("lora_bias")
        .map(|origin| format!(" ({origin})"));
    Err(Error::config(
        "lora_bias",
        format!(
            "{} trains biases, and {of}; set it to none{}",
            lora.lora_bias.as_str(),
            place.unwrap_or_default()
        ),
    ))
}

/// A method on the shape of a base, before there is room for it.
#[derive(Debug)]
pub(super) struct Attached {
    /// Trainable scalars.
    pub(super) trainable: usize,
    /// The tensors they are of.
    pub(super) layout: Arc<ParamLayout>,
    /// Bytes of tensors that a method draws and nobody trains.
    pub(super) frozen: u64,
    /// Of those, bytes that are saved with what is trained.
    pub(super) saved_frozen: u64,
    /// The modules of the base.
    pub(super) sites: Vec<Site>,
    /// What stands at which site.
    pub(super) attachments: Vec<(SiteId, Attachment)>,
    /// What the user may want to know.
    pub(super) notes: Vec<String>,
}

impl Attached {
    /// Virtual tokens before each document.
    pub(super) fn prompt_tokens(&self) -> usize {
        let prompt = self
            .attachments
            .iter()
            .find_map(|(_, attachment)| match attachment {
                Attachment::Prompt(prompt) => Some(prompt.tokens),
                _ => None,
            });
        prompt.unwrap_or(0)
    }
}

fn notes(
    config: &TrainConfig,
    sites: &[Site],
    attachments: &[(SiteId, Attachment)],
) -> Vec<String> {
    let tying = config.lora.use_peft && config.lora.lora_ensure_weight_tying;
    let of_tying = tying.then(|| tying_note(sites, attachments)).flatten();
    let of_rank = rank_note(sites, attachments);
    of_tying.into_iter().chain(of_rank).collect()
}

/// What there is to keep the same, if anything.
fn tying_note(sites: &[Site], attachments: &[(SiteId, Attachment)]) -> Option<String> {
    let head = sites.iter().find_map(|site| Some((site.id, site.tied_to?)));
    let why = match head {
        None => "head and embedding of this base are two weights",
        Some((head, embedding)) => {
            let of_pair = |(id, _): &(SiteId, Attachment)| *id == head || *id == embedding;
            if attachments.iter().any(of_pair) {
                return None;
            }
            "neither head nor embedding is adapted or trained"
        }
    };
    Some(format!("lora_ensure_weight_tying: does nothing, {why}"))
}

/// The sites of low-rank updates, with their ranks.
fn low_ranks<'a>(
    sites: &'a [Site],
    attachments: &'a [(SiteId, Attachment)],
) -> impl Iterator<Item = (&'a Site, usize)> {
    let each = attachments.iter();
    each.filter_map(|(id, attachment)| match attachment {
        Attachment::LowRank(update) => Some((sites.get(id.0)?, update.rank)),
        _ => None,
    })
}

/// A rank above the smaller dimension of a weight is legal, and for nothing.
fn rank_note(sites: &[Site], attachments: &[(SiteId, Attachment)]) -> Option<String> {
    let too_high: Vec<(&Site, usize)> = low_ranks(sites, attachments)
        .filter(|(site, rank)| *rank > site.in_features.min(site.out_features))
        .collect();
    let (site, rank) = too_high.first()?;
    let (rows, columns) = (site.out_features, site.in_features);
    let others = match too_high.len() - 1 {
        0 => String::new(),
        n => format!(" (and {n} more)"),
    };
    Some(format!(
        "lora_r: rank {rank} of `{}`{others} is more than the smaller dimension of its weight, {rows} x \
         {columns}; no update of it has a rank above {}",
        site.name,
        rows.min(columns)
    ))
}

/// The keys of a LoRA in a configuration, by PEFT's names for them.
const TRL_NAMES: [(&str, &str); 13] = [
    ("alpha_pattern", "lora_alpha_pattern"),
    // Before `bias`, which takes its name in a configuration.
    ("lora_bias", "lora_b_bias"),
    ("bias", "lora_bias"),
    ("ensure_weight_tying", "lora_ensure_weight_tying"),
    ("exclude_modules", "lora_exclude_modules"),
    ("layer_replication", "lora_layer_replication"),
    ("layers_pattern", "lora_layers_pattern"),
    ("layers_to_transform", "lora_layers_to_transform"),
    ("modules_to_save", "lora_modules_to_save"),
    ("r", "lora_r"),
    ("rank_pattern", "lora_rank_pattern"),
    ("target_modules", "lora_target_modules"),
    ("trainable_token_indices", "lora_trainable_token_indices"),
];

/// The method speaks of PEFT's keys; whoever wrote a configuration knows TRL's, and where it is.
fn in_trl_names(config: &TrainConfig, error: Error) -> Error {
    let Error::Config { key, mut message } = error else {
        return error;
    };
    for (peft, trl) in TRL_NAMES {
        message = message.replace(&format!("`{peft}`"), &format!("`{trl}`"));
        message = message.replace(&format!("`{peft}: "), &format!("`{trl}: "));
    }
    let known = TRL_NAMES.iter().find(|(peft, _)| *peft == key);
    let key = known.map_or(key.as_str(), |(_, trl)| trl);
    if let Some(origin) = config.origin(key) {
        message += &format!(" ({origin})");
    }
    Error::config(key, message)
}

/// The key of a method beside LoRA.
const PEFT_CONFIG: &str = "peft_config";

/// Refuses a task of the method's that is not that of the run.
fn require_same_task(config: &TrainConfig, keys: &BTreeMap<String, Value>) -> Result<()> {
    let task = &config.lora.lora_task_type;
    match keys.get("task_type") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(own)) if own == task => Ok(()),
        Some(own) => {
            let message =
                format!("is {own}, and lora_task_type is {task}; set that one, and leave this out");
            Err(Error::config(format!("{PEFT_CONFIG}.task_type"), message))
        }
    }
}

/// Refuses keys of LoRA beside the configuration of another method, where they would do nothing.
fn require_no_lora_keys(config: &TrainConfig) -> Result<()> {
    let others = [
        "corda_config",
        "eva_config",
        "init_lora_weights",
        "loftq_config",
        "use_dora",
        "use_rslora",
    ];
    // The task is no property of LoRA.
    let of_lora = |name: &str| {
        name.starts_with("lora_") && name != "lora_task_type" || others.contains(&name)
    };
    let names = TrainConfig::keys().into_iter().map(|key| key.name);
    let set = names
        .filter(|name| of_lora(name))
        .find_map(|name| Some((name, config.origin(name)?)));
    match set {
        None => Ok(()),
        Some((name, origin)) => Err(Error::config(
            name,
            format!(
                "does nothing beside `{PEFT_CONFIG}` ({origin}): give the method its own keys there, and leave \
                 this one out"
            ),
        )),
    }
}

/// The method speaks of its own keys; this says them as the configuration has them.
fn in_its_names(config: &TrainConfig, error: Error) -> Error {
    match &config.lora.peft_config {
        Some(_) => in_peft_config(config, error),
        None => in_trl_names(config, error),
    }
}

/// An error of a method that `peft_config` configures, with where that stands.
fn in_peft_config(config: &TrainConfig, error: Error) -> Error {
    let Error::Config { key, mut message } = error else {
        return error;
    };
    if let Some(origin) = config.origin(PEFT_CONFIG) {
        message += &format!(" ({origin})");
    }
    Error::config(format!("{PEFT_CONFIG}.{key}"), message)
}

/// Refuses an odd rank for a start that halves it.
fn require_even_ranks(config: &TrainConfig) -> Result<()> {
    let lora = &config.lora;
    let ranks = std::iter::once(&lora.lora_r).chain(lora.lora_rank_pattern.values());
    let odd = ranks.copied().find(|rank| !rank.is_multiple_of(2));
    match (&lora.init_lora_weights, odd) {
        (Init::Method(name), Some(rank)) if name == "orthogonal" => {
            let message = format!(
                "`{name}` needs even ranks, and {rank} is odd; take {}",
                rank + 1
            );
            let key = "init_lora_weights";
            let origin = config.origin(key).map(|origin| format!(" ({origin})"));
            Err(Error::config(key, message + &origin.unwrap_or_default()))
        }
        _ => Ok(()),
    }
}

fn lora_config(config: &TrainConfig, base: &Path) -> Result<LoraConfig> {
    require_even_ranks(config)?;
    let lora = &config.lora;
    let layers = &lora.lora_layers_to_transform;
    Ok(LoraConfig {
        rank: lora.lora_r,
        alpha: lora.lora_alpha,
        dropout: lora.lora_dropout,
        use_rslora: lora.use_rslora,
        use_dora: lora.use_dora,
        target_modules: lora.lora_target_modules.as_ref().map(TargetModules::from),
        exclude_modules: lora.lora_exclude_modules.as_ref().map(ExcludeModules::from),
        layers_to_transform: (!layers.is_empty()).then(|| layers.clone()),
        rank_pattern: lora.lora_rank_pattern.0.clone(),
        alpha_pattern: lora.lora_alpha_pattern.0.clone(),
        layers_pattern: lora.lora_layers_pattern.clone(),
        init_lora_weights: init(lora).map_err(|error| in_trl_names(config, error))?,
        bias: bias(lora.lora_bias),
        lora_bias: lora.lora_b_bias,
        modules_to_save: lora.lora_modules_to_save.clone(),
        trainable_token_indices: token_indices(&lora.lora_trainable_token_indices)?,
        ensure_weight_tying: lora.lora_ensure_weight_tying,
        layer_replication: lora.lora_layer_replication.clone(),
        alora_invocation_tokens: invocation(&lora.alora_invocation_tokens)?,
        base_model_name_or_path: Some(name_of(config, base)),
        ..LoraConfig::default()
    }
    .for_task(&lora.lora_task_type))
}

/// What others are to find the base by: its name on the hub, or where it is.
fn name_of(config: &TrainConfig, base: &Path) -> String {
    let name = config.model.model_name_or_path.as_deref();
    let on_hub = name.filter(|name| !Path::new(name).is_dir());
    on_hub.map_or_else(|| base.display().to_string(), str::to_owned)
}

fn bias(bias: Bias) -> LoraBias {
    match bias {
        Bias::None => LoraBias::None,
        Bias::All => LoraBias::All,
        Bias::LoraOnly => LoraBias::LoraOnly,
    }
}

fn token_ids(key: &str, ids: &[usize]) -> Result<Vec<u32>> {
    let id = |&id: &usize| {
        u32::try_from(id).map_err(|_| Error::config(key, format!("{id} is no token id")))
    };
    ids.iter().map(id).collect()
}

fn invocation(ids: &[usize]) -> Result<Option<Vec<u32>>> {
    let some = !ids.is_empty();
    let ids = some.then(|| token_ids("alora_invocation_tokens", ids));
    ids.transpose()
}

fn token_indices(tokens: &Tokens) -> Result<Option<TokenIndices>> {
    let ids = |list: &[usize]| token_ids("lora_trainable_token_indices", list);
    Ok(match tokens {
        Tokens::Embedding(none) if none.is_empty() => None,
        Tokens::Embedding(list) => Some(TokenIndices::Embedding(ids(list)?)),
        Tokens::Modules(none) if none.0.is_empty() => None,
        Tokens::Modules(modules) => {
            let modules = modules.0.iter();
            let modules = modules.map(|(name, list)| Ok((name.clone(), ids(list)?)));
            Some(TokenIndices::Modules(modules.collect::<Result<_>>()?))
        }
    })
}

/// The start, as its key and the one that says more of it have it.
fn init(lora: &LoraArguments) -> Result<InitLoraWeights> {
    let mut init = match &lora.init_lora_weights {
        Init::Default => InitLoraWeights::Kaiming,
        Init::Random => InitLoraWeights::Random,
        Init::Method(name) => InitLoraWeights::from_name(name)
            .map_err(|fault| Error::config("init_lora_weights", fault))?,
    };
    for (key, settings) in [
        ("corda_config", &lora.corda_config),
        ("eva_config", &lora.eva_config),
        ("loftq_config", &lora.loftq_config),
        ("lora_ga_config", &lora.lora_ga_config),
    ] {
        if let Some(settings) = settings {
            init = init.configured(key, &settings.clone().into_iter().collect())?;
        }
    }
    Ok(init)
}
