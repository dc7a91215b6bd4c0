//! Which tensors of the checkpoint change, and by what. Everything is checked before any output.

use super::output::BaseConfig;
use crate::modules::{EMBEDDINGS, HEADS};
use crate::registry::{lora_of, require_task};
use crate::{AdapterBase, LoraConfig, PeftConfig};
use ferrotune_core::adapter::{Adapter, Attachment, BaseWeights, LowRank, Site, SiteId, SiteKind};
use ferrotune_core::io::ModelFiles;
use ferrotune_core::model::{DecoderConfig, ModelPlan};
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use ferrotune_core::{Error, Result};
use ferrotune_kernels::{Tensor, View, ViewMut};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// What becomes of a checkpoint.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// The changes of each tensor, in order.
    pub(super) changes: BTreeMap<String, Vec<Change>>,
    /// The tensor that each new one starts from, by the name of the new one.
    pub(super) copies: BTreeMap<String, String>,
    /// Whether head and embedding are one tensor of the base, and the merged ones are not.
    pub(super) unties: bool,
    /// The head of the base, where it is stored beside the embedding it is tied to and stays tied.
    redundant: Option<String>,
    /// The model, where its layers are others than the base's: copies take the place of all of these.
    pub(super) stack: Option<DecoderConfig>,
}

/// One change of one tensor, in its own shape.
#[derive(Debug)]
pub(super) enum Change {
    /// `W += scale * B A`.
    LowRank {
        /// `[rank, in_features]`.
        a: Vec<f32>,
        /// `[out_features, rank]`.
        b: Vec<f32>,
        rank: usize,
        scale: f32,
        /// Whether the tensor is `[in_features, out_features]`.
        transposed: bool,
    },
    /// `b += scale * values`.
    Vector { values: Vec<f32>, scale: f32 },
    /// The tensor is another one.
    Replace(Vec<f32>),
    /// Some of its rows are.
    Rows { indices: Vec<u32>, values: Vec<f32> },
    /// What a method makes of the weight, or the bias, of its linear.
    Method(Attached),
}

/// A tensor of a linear that a method changes.
#[derive(Debug)]
pub(super) struct Attached {
    attachment: Arc<Attachment>,
    params: Arc<FlatBuffer>,
    /// `[out, in]` of the linear.
    shape: [usize; 2],
    /// Whether the file has the weight as `[in, out]`.
    transposed: bool,
    bias: bool,
}

impl Attached {
    /// Changes the tensor's values.
    pub(super) fn apply(&self, values: &mut [f32]) -> Result<()> {
        let [out, inputs] = self.shape;
        if !self.bias {
            let mut turned = self.transposed.then(|| transposed(values, inputs, out));
            let weight = turned.as_mut().map_or(&mut *values, |turned| turned);
            let weight = ViewMut::from_f32(weight, out, inputs);
            self.attachment.merge(&self.params, weight, None)?;
            if let Some(turned) = turned {
                values.copy_from_slice(&transposed(&turned, out, inputs));
            }
            return Ok(());
        }
        let mut weight = vec![0.0; out * inputs];
        let weight = ViewMut::from_f32(&mut weight, out, inputs);
        let bias = Some(ViewMut::from_f32(values, 1, out));
        self.attachment.merge(&self.params, weight, bias)
    }
}

/// `[rows, cols]` as `[cols, rows]`.
fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols)
        .map(|i| values[i % rows * cols + i / rows])
        .collect()
}

/// The changes that the adapter makes, checked against the checkpoint.
pub(super) fn plan(
    base: &ModelFiles,
    base_config: &BaseConfig,
    adapter_directory: &Path,
) -> Result<Plan> {
    let in_adapter = |error: Error| error.of_adapter(adapter_directory);
    let model_type = base_config.model_type();
    let config = PeftConfig::load(adapter_directory)?;
    let method = config
        .clone()
        .into_adapter(model_type)
        .map_err(in_adapter)?;
    let decoder = base_config.decoder()?;
    if let Some(decoder) = &decoder {
        require_task(adapter_directory, decoder.classifier.is_some())?;
    }
    let decoder = decoder.map(|base| method.decoder(base)).transpose();
    let decoder = decoder.map_err(in_adapter)?;
    let sites = match &decoder {
        Some(decoder) => ModelPlan::new(decoder).sites,
        None => modules_of(base, base_config.ties_head()),
    };
    if let PeftConfig::Lora(config) = &config
        && config.init_lora_weights.changes_base()
        && !config.init_lora_weights.subtracts()
    {
        let message = format!(
            "`init_lora_weights` is {}: what it updates is the quantised base, into which nothing can be merged; \
             use it as it is",
            config.init_lora_weights.name()
        );
        return Err(Error::adapter(adapter_directory, message));
    }
    let (attachments, params) = match config {
        PeftConfig::Lora(config) if config.init_lora_weights.subtracts() => {
            let weights = Weights {
                files: base,
                sites: &sites,
            };
            plain(config, weights, adapter_directory, model_type)
        }
        _ => {
            let (attachments, mut params) = attach(method.as_ref(), &sites).map_err(in_adapter)?;
            method.load(&mut params, adapter_directory)?;
            Ok((attachments, params))
        }
    }?;
    if attachments
        .iter()
        .any(|(_, attachment)| matches!(attachment, Attachment::Invocation(_)))
    {
        let message = "`alora_invocation_tokens`: updates that act in a part of a document are in no weight, so this \
                       adapter cannot be merged; use it with its base";
        return Err(Error::adapter(adapter_directory, message));
    }
    let params = Arc::new(params);
    let own = AdapterBase::new(base, adapter_directory, &sites, params.layout())?;
    let mut plan = Plan::default();
    if let Some(decoder) = decoder.filter(DecoderConfig::is_restacked) {
        plan.stack(decoder, &sites);
    }
    let pair = tied_pair(&sites);
    let shared = |id: SiteId| {
        let both = pair.map(|[embedding, head]| [embedding.id, head.id]);
        both.is_some_and(|both| both.contains(&id))
    };
    let mut of_pair = Vec::new();
    for (id, attachment) in attachments {
        let site = sites.iter().find(|site| site.id == id);
        let site =
            site.ok_or_else(|| in_adapter(Error::config("adapter", "attaches to no site")))?;
        if shared(id) {
            of_pair.push((site, attachment));
        } else {
            plan.add(&site.name, site, attachment, &params, adapter_directory)?;
        }
    }
    if let Some([embedding, head]) = pair {
        let [embedded, own] = [embedding, head].map(|site| weight_name(&site.name));
        base.require_tied(&own, &embedded)?;
        plan.add_pair([embedding, head], of_pair, &params, adapter_directory)?;
        plan.redundant = (!plan.unties).then(|| base.own_name(&own).to_owned());
    }
    plan.stand_on(own.tables());
    plan.name_as(base);
    plan.require_finite_shapes(base, adapter_directory)?;
    Ok(plan)
}

type Attachments = Vec<(SiteId, Attachment)>;

fn attach(method: &dyn Adapter, sites: &[Site]) -> Result<(Attachments, FlatBuffer)> {
    let mut builder = ParamLayoutBuilder::new();
    let attachments = method.attach(sites, &mut builder)?;
    Ok((attachments, FlatBuffer::zeros(&builder.build()?)))
}

/// An update of a base that its start changed, as one of the base in its files.
fn plain(
    config: LoraConfig,
    mut base: Weights<'_>,
    directory: &Path,
    model_type: &str,
) -> Result<(Attachments, FlatBuffer)> {
    let in_adapter = |error: Error| error.of_adapter(directory);
    let adapter = lora_of(config, directory, model_type).map_err(in_adapter)?;
    let (_, mut params) = attach(&adapter, base.sites).map_err(in_adapter)?;
    let (adapter, joined) = adapter.plain(directory, &mut params, &mut base)?;
    let (attachments, mut params) = attach(&adapter, base.sites).map_err(in_adapter)?;
    let layout = Arc::clone(params.layout());
    for (id, segment) in layout.by_name() {
        if let Some(from) = joined.layout().find(&segment.spec.name) {
            params.get_mut(id).copy_from_slice(joined.get(from));
        }
    }
    Ok((attachments, params))
}

/// The base in its files, of which starts are computed anew; it stays as it is.
struct Weights<'a> {
    files: &'a ModelFiles,
    sites: &'a [Site],
}

impl BaseWeights for Weights<'_> {
    fn vocabulary(&self) -> usize {
        0
    }

    fn embed(&self, _: &[u32]) -> Result<Tensor> {
        Err(Error::config("peft_type", "the embedding is not at hand"))
    }

    fn find(&self, name: &str) -> Option<SiteId> {
        let found = self.sites.iter().find(|site| site.name == name);
        found.map(|site| site.id)
    }

    fn read(&self, id: SiteId) -> Result<Tensor> {
        let site = self.sites.iter().find(|site| site.id == id);
        let site = site.ok_or_else(|| Error::config("target_modules", "no such site"))?;
        let [out, inputs] = [site.out_features, site.in_features];
        let values = self.files.read_f32(&site.tensor("weight"))?;
        Ok(match site.stored_transposed {
            true => Tensor::from_f32(transposed(&values, inputs, out), out, inputs),
            false => Tensor::from_f32(values, out, inputs),
        })
    }

    fn replace(&mut self, _: SiteId, _: View<'_>) -> Result<()> {
        Ok(())
    }
}

fn tied_pair(sites: &[Site]) -> Option<[&Site; 2]> {
    let head = sites.iter().find(|site| site.tied_to.is_some())?;
    let embedding = sites.iter().find(|site| Some(site.id) == head.tied_to)?;
    Some([embedding, head])
}

impl Plan {
    /// Whether a tensor of the base has no place of its own in the output.
    pub(super) fn drops(&self, tensor: &str) -> bool {
        // Readers take a head that is stored at its word, or refuse to tie it.
        if self.redundant.as_deref() == Some(tensor) {
            return true;
        }
        let Some(layers) = self.stack.as_ref().map(|stack| stack.modules.layers) else {
            return false;
        };
        // A base saved without its head has only the last part of that path.
        let last = layers.rsplit('.').next().unwrap_or(layers);
        let rest = [layers, last].map(|layers| tensor.strip_prefix(layers));
        rest.into_iter().flatten().any(|rest| rest.starts_with('.'))
    }

    /// Calls every tensor as the files of `base` do, new ones like those they start from.
    fn name_as(&mut self, base: &ModelFiles) {
        let own = |name: &str, from: &str| {
            let lacks = from.len() - base.own_name(from).len();
            match name.split_once('.') {
                Some((_, rest)) if lacks > 0 && name[..lacks] == from[..lacks] => rest.to_owned(),
                _ => name.to_owned(),
            }
        };
        let changes = std::mem::take(&mut self.changes);
        self.changes = changes
            .into_iter()
            .map(|(name, changes)| {
                let from = self.copies.get(&name).unwrap_or(&name);
                (own(&name, from), changes)
            })
            .collect();
        let copies = std::mem::take(&mut self.copies);
        self.copies = copies
            .into_iter()
            .map(|(name, from)| (own(&name, &from), base.own_name(&from).to_owned()))
            .collect();
    }

    /// Each layer of `decoder` is a copy of one of the base's.
    fn stack(&mut self, decoder: DecoderConfig, sites: &[Site]) {
        for site in sites.iter().filter(|site| site.layer.is_some()) {
            let bias = site.bias.then_some("bias");
            for suffix in std::iter::once("weight").chain(bias) {
                let name = format!("{}.{suffix}", site.name);
                self.copies.insert(name, site.tensor(suffix));
            }
        }
        self.stack = Some(decoder);
    }

    /// Head and embedding that are one tensor: they stay one where both change alike, else the head
    /// becomes a tensor of its own.
    fn add_pair(
        &mut self,
        [embedding, head]: [&Site; 2],
        attachments: Vec<(&Site, Attachment)>,
        params: &Arc<FlatBuffer>,
        directory: &Path,
    ) -> Result<()> {
        let low_rank = |site: &Site| {
            attachments
                .iter()
                .find_map(|(at, attachment)| match attachment {
                    Attachment::LowRank(update) if at.id == site.id => Some(*update),
                    _ => None,
                })
        };
        let (of_embedding, of_head) = (low_rank(embedding), low_rank(head));
        let alike = of_embedding.is_some() && of_embedding == of_head;
        // Only an update leaves the other one where it was, without anything standing there.
        let apart = !alike
            && (of_embedding.is_some() || attachments.iter().any(|(at, _)| at.id == head.id));
        if apart {
            let [head, embedding] = [head, embedding].map(|site| weight_name(&site.name));
            self.changes.insert(head.clone(), Vec::new());
            self.copies.insert(head, embedding);
            self.unties = true;
        }
        for (site, attachment) in attachments {
            // An update of the head is one of the rows that are trained.
            if let (Attachment::TrainRows { rows, indices }, true) =
                (&attachment, of_head.is_some())
                && site.id == embedding.id
            {
                let (indices, values) = (indices.clone(), params.get(*rows).to_vec());
                self.push(weight_name(&head.name), Change::Rows { indices, values });
            }
            if !(alike && site.id == head.id) {
                self.add(&site.name, site, attachment, params, directory)?;
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        module: &str,
        site: &Site,
        attachment: Attachment,
        params: &Arc<FlatBuffer>,
        directory: &Path,
    ) -> Result<()> {
        let values = |id| params.get(id).to_vec();
        let (weight, bias) = (weight_name(module), format!("{module}.bias"));
        match attachment {
            method @ Attachment::LowRank(LowRank {
                magnitude: Some(_), ..
            }) => {
                let attached = Attached {
                    attachment: Arc::new(method),
                    params: Arc::clone(params),
                    shape: [site.out_features, site.in_features],
                    transposed: site.stored_transposed,
                    bias: false,
                };
                self.push(weight, Change::Method(attached));
            }
            Attachment::LowRank(LowRank {
                a,
                b,
                rank,
                scale,
                bias: of_b,
                ..
            }) => {
                let (a, b) = (values(a), values(b));
                let change = Change::LowRank {
                    a,
                    b,
                    rank,
                    scale,
                    transposed: site.stored_transposed,
                };
                self.push(weight, change);
                match of_b {
                    Some(id) if site.bias => {
                        let values = values(id);
                        self.push(bias, Change::Vector { values, scale });
                    }
                    Some(_) => {
                        return Err(Error::adapter(
                            directory,
                            format!(
                                "`lora_bias`: the bias of `{module}` has nowhere to go, because the base has \
                                 none there; this adapter cannot be merged"
                            ),
                        ));
                    }
                    None => {}
                }
            }
            Attachment::TrainBase {
                weight: id,
                bias: of_base,
            } => {
                let stored = params.file_values(id).into_owned();
                self.push(weight, Change::Replace(stored));
                if let Some(id) = of_base {
                    self.push(bias, Change::Replace(values(id)));
                }
            }
            // What replaces comes before what is added.
            Attachment::TrainBias(id) => {
                let changes = self.changes.entry(bias).or_default();
                changes.insert(0, Change::Replace(values(id)));
            }
            Attachment::TrainRows { rows, indices } => {
                let values = values(rows);
                self.push(weight, Change::Rows { indices, values });
            }
            Attachment::KeepBase | Attachment::Invocation(_) => {}
            Attachment::Prompt(_) => {
                let message = "is a prompt, which stands before the text and is part of no weight; use the \
                               adapter with its base, without merging";
                return Err(Error::adapter(directory, message));
            }
            method @ (Attachment::Factors(_) | Attachment::Weight(_) | Attachment::Custom(_)) => {
                let changes_bias = site.bias && matches!(method, Attachment::Custom(_));
                let attachment = Arc::new(method);
                let mut attached = |name, bias| {
                    let (attachment, params) = (Arc::clone(&attachment), Arc::clone(params));
                    let shape = [site.out_features, site.in_features];
                    let attached = Attached {
                        attachment,
                        params,
                        shape,
                        transposed: site.stored_transposed,
                        bias,
                    };
                    self.push(name, Change::Method(attached));
                };
                attached(weight, false);
                if changes_bias {
                    attached(bias, true);
                }
            }
        }
        Ok(())
    }

    /// Whatever starts from one of `tables` starts from its values.
    fn stand_on(&mut self, tables: &BTreeMap<String, Vec<f32>>) {
        for (table, values) in tables {
            let copies = self.copies.iter().filter(|(_, from)| *from == table);
            let names: Vec<String> = copies.map(|(name, _)| name.clone()).collect();
            for name in names.into_iter().chain([table.clone()]) {
                let changes = self.changes.entry(name).or_default();
                changes.insert(0, Change::Replace(values.clone()));
            }
        }
    }

    fn push(&mut self, tensor: String, change: Change) {
        self.changes.entry(tensor).or_default().push(change);
    }

    /// Refuses changes of tensors that the checkpoint lacks: its shapes were compared with the model's.
    fn require_finite_shapes(&self, base: &ModelFiles, directory: &Path) -> Result<()> {
        let known = |name: &String| {
            let from = self.copies.get(name).unwrap_or(name);
            base.meta(from).is_some()
        };
        match self.changes.keys().find(|name| !known(name)) {
            None => Ok(()),
            Some(name) => Err(Error::adapter(
                directory,
                format!("changes `{name}`, which the base lacks; is it the right base?"),
            )),
        }
    }
}

fn weight_name(module: &str) -> String {
    format!("{module}.weight")
}

/// The checkpoint instead of a model: each weight is a module. What is an embedding or the head is known
/// by its name alone.
fn modules_of(base: &ModelFiles, ties_head: bool) -> Vec<Site> {
    let last = |module: &str| module.rsplit('.').next().unwrap_or_default().to_owned();
    let mut sites: Vec<Site> = base
        .names()
        .filter_map(|name| Some((name.strip_suffix(".weight")?, base.meta(name)?)))
        .enumerate()
        .map(|(id, (module, meta))| {
            let (kind, in_features) = match meta.shape.as_slice() {
                [_, columns] if EMBEDDINGS.contains(&last(module).as_str()) => {
                    (SiteKind::Embedding, *columns)
                }
                [_, columns] => (SiteKind::Linear, *columns),
                _ => (SiteKind::Norm, 1),
            };
            Site {
                id: SiteId(id),
                name: module.into(),
                stored_name: module.into(),
                kind,
                in_features,
                out_features: meta.shape.first().copied().unwrap_or(1),
                bias: base.meta(&format!("{module}.bias")).is_some(),
                stored_transposed: false,
                keys: None,
                layer: None,
                output_head: HEADS.contains(&last(module).as_str()),
                tied_to: None,
                execution_order: id,
            }
        })
        .collect();
    let embedding = sites.iter().find(|site| site.kind == SiteKind::Embedding);
    let Some(embedding) = embedding.filter(|_| ties_head).cloned() else {
        return sites;
    };
    match sites.iter_mut().find(|site| site.output_head) {
        Some(stored) => stored.tied_to = Some(embedding.id),
        None => sites.push(Site {
            id: SiteId(sites.len()),
            name: "lm_head".into(),
            stored_name: "lm_head".into(),
            kind: SiteKind::Linear,
            output_head: true,
            tied_to: Some(embedding.id),
            ..embedding
        }),
    }
    sites
}
