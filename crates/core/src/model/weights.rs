//! From names and shapes to a model: each weight streams from its source straight into its place.

use super::activation::Activation;
use super::angles::AngleTable;
use super::column_norms::ColumnNorms;
use super::config::{DecoderConfig, NormKind};
use super::frozen::{FrozenWeight, Scratch};
use super::head::{Head, HeadUpdate, Moved};
use super::invocation::Invocation;
use super::layer::Layer;
use super::linear::{LinearGroup, Part, PartBias, PartWeight};
use super::norm::{LayerNorm, Norm, RmsNorm, Vector};
use super::plan::{LayerPlan, ModelPlan};
use super::positions::Positions;
use super::prompt::{EmbeddedPrompt, Prefix};
use super::qk_norm::QkNorms;
use super::residual::Residual;
use super::room::{self, Augmented, Rooms};
use super::vocabulary::{Embedding, Table, TableWeight, TrainedRows};
use super::weight_source::{WeightSource, to_rows};
use super::{Keep, Model, WeightFormat};
use crate::adapter::{Attachment, Prompt, Site, SiteId};
use crate::params::{FlatBuffer, ParamId, transpose};
use crate::{Error, Result};
use ferrotune_kernels::dequantise::Quantised;
use ferrotune_kernels::{DType, Device, Tensor, ViewMut, attention};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

/// Reads the weight of a site into `to [out, in]`, however its file holds it.
pub(super) fn read_weight(source: &dyn WeightSource, site: &Site, to: ViewMut<'_>) -> Result<()> {
    let name = site.tensor("weight");
    // Codes are of the linear, however its values lie.
    if !site.stored_transposed || source.read_quantised(&name)?.is_some() {
        return source.read(&name, to);
    }
    let [rows, cols] = to.shape();
    let mut stored = Tensor::empty(&Device::Cpu, DType::F32, cols, rows);
    source.read(&name, stored.view_mut())?;
    let values = transpose(&stored.to_f32_vec(), cols, rows);
    to_rows(to, &values);
    Ok(())
}

/// Builds a [`Model`] part by part.
pub(super) struct Builder<'a> {
    pub(super) config: &'a DecoderConfig,
    pub(super) plan: &'a ModelPlan,
    pub(super) attachments: BTreeMap<SiteId, Attachment>,
    /// Trained biases, beside those.
    pub(super) trained_biases: BTreeMap<SiteId, ParamId>,
    pub(super) prompt: Option<Prompt>,
    pub(super) invocation: Option<Invocation>,
    pub(super) source: &'a dyn WeightSource,
    pub(super) params: &'a mut FlatBuffer,
    pub(super) format: WeightFormat,
    pub(super) held: Held,
}

/// What is frozen and was read already, by the names it has in files: copies of a layer share it.
#[derive(Default)]
pub(super) struct Held {
    /// By the modules of a group.
    matrices: BTreeMap<Vec<String>, Arc<FrozenWeight>>,
    vectors: BTreeMap<String, Arc<Tensor>>,
}

impl Builder<'_> {
    pub(super) fn model(mut self) -> Result<Model> {
        let plan = self.plan;
        self.source.check(plan)?;
        let embedding = self.embedding()?;
        let positions = self.positions()?;
        let mut layers = Vec::with_capacity(plan.layers.len());
        let rooms = self.rooms();
        let scratch = Scratch {
            dtype: self.format.dtype,
            elements: room::largest_group(plan, &rooms),
            columns: plan.largest_input(),
        };
        for (index, rooms) in rooms.into_iter().enumerate() {
            layers.push(self.layer(index, rooms, scratch)?);
        }
        let norm = self.norm(Some(plan.norm))?;
        let head = self.head(&embedding)?;
        let left = (self.attachments.keys()).chain(self.trained_biases.keys());
        if let Some(site) = left.min() {
            return Err(unsupported(plan.site(*site)));
        }
        Ok(Model {
            config: self.config.clone(),
            device: self.params.device().clone(),
            embedding,
            positions,
            embedded_prompt: (self.prompt.as_ref())
                .and_then(|prompt| EmbeddedPrompt::new(prompt, self.config)),
            prompt: self.prompt,
            invocation: self.invocation,
            keep: vec![Keep::All; layers.len()],
            label_smoothing: 0.0,
            neftune_noise_alpha: 0.0,
            angles: AngleTable::default(),
            write_ahead: None,
            offload: None,
            layers,
            norm,
            head,
            weight_dtype: self.format.dtype,
        })
    }

    fn layer(&mut self, index: usize, rooms: Rooms, scratch: Scratch) -> Result<Layer> {
        let (config, layer) = (self.config, &self.plan.layers[index]);
        let [beside_qkv, beside_o, beside_gate_up, beside_down] = rooms;
        Ok(Layer {
            input_norm: self.norm(layer.input_norm)?.with_room(beside_qkv),
            qkv: self.linears(4 * index, &layer.qkv, beside_qkv, scratch)?,
            qk_norms: self.qk_norms(index, layer)?,
            o: self.linears(4 * index + 1, &[layer.o], beside_o, scratch)?,
            attention_residual: self.residual(layer.attention_norm)?,
            mlp_norm: self.norm(layer.mlp_norm)?.with_room(beside_gate_up),
            gate_up: self.linears(4 * index + 2, &layer.gate_up, beside_gate_up, scratch)?,
            activation: Activation {
                function: config.activation,
                gated: config.gated_mlp,
            },
            down: self.linears(4 * index + 3, &[layer.down], beside_down, scratch)?,
            mlp_residual: self.residual(layer.mlp_output_norm)?,
            attention: attention::Config {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                scale: config.attention_scales[index],
                window: config.sliding_windows[index],
                softcap: config.attention_softcap,
            },
            rope: config.layer_ropes[index],
            prefix: (self.prompt.as_ref())
                .and_then(|prompt| Prefix::new(prompt, index, config.kv_width())),
        })
    }

    /// Room in the layers, where linears multiply values.
    fn rooms(&self) -> Vec<Rooms> {
        if self.format.multiplies_bytes() || self.source.multiplies_bytes() {
            return vec![Rooms::default(); self.plan.layers.len()];
        }
        let attached = |id| self.attachments.get(&id);
        room::of_layers(self.config, self.plan, attached, self.params.device())
    }

    fn residual(&mut self, norm: Option<SiteId>) -> Result<Residual> {
        Ok(Residual {
            norm: self.norm(norm)?,
            scale: self.config.residual_scale,
        })
    }

    fn qk_norms(&mut self, index: usize, layer: &LayerPlan) -> Result<Option<QkNorms>> {
        let Some(([q, k], over)) = layer.qk_norm.zip(self.config.qk_norm) else {
            return Ok(None);
        };
        let Some(rope) = self.config.layer_ropes[index] else {
            let message = format!("layer {index} norms q and k but does not rotate them");
            return Err(Error::config("model_name_or_path", message));
        };
        Ok(Some(QkNorms {
            q: self.rms_norm(q)?,
            k: self.rms_norm(k)?,
            over,
            rope,
        }))
    }

    /// The group number `index`.
    fn linears(
        &mut self,
        index: usize,
        ids: &[SiteId],
        room: usize,
        scratch: Scratch,
    ) -> Result<LinearGroup> {
        let plan = self.plan;
        let apart = |b: &Self, id: SiteId| {
            use Attachment::{TrainBase, Weight};
            matches!(b.attachments.get(&id), Some(TrainBase { .. } | Weight(_)))
        };
        let frozen = if ids.iter().any(|&id| apart(self, id)) {
            None
        } else {
            Some(self.frozen_group(ids, room)?)
        };
        let mut parts = Vec::with_capacity(ids.len());
        let mut first = 0;
        for &id in ids {
            let site = plan.site(id);
            let columns = first..first + site.out_features;
            first = columns.end;
            let attachment = self.attachments.remove(&id);
            let (weight, trained_bias) = match (&frozen, &attachment) {
                (Some(_), _) => (PartWeight::InGroup, None),
                (None, Some(Attachment::TrainBase { weight, bias })) => {
                    self.read_param(site, *weight, "weight")?;
                    (PartWeight::Trained(*weight), *bias)
                }
                (None, _) => (PartWeight::Alone(self.frozen_group(&[id], 0)?), None),
            };
            let bias = self.bias(site, trained_bias)?;
            parts.push(Part {
                site: id.0,
                columns,
                weight,
                bias,
                attachment,
                members: Vec::new(),
                row_lengths: OnceLock::new(),
            });
        }
        Ok(LinearGroup {
            index,
            in_features: plan.site(ids[0]).in_features,
            parts,
            frozen,
            scratch,
        })
    }

    /// The weights of linears over one input, from an earlier copy of their layer where there is one.
    fn frozen_group(&mut self, ids: &[SiteId], room: usize) -> Result<Arc<FrozenWeight>> {
        let sites: Vec<&Site> = ids.iter().map(|&id| self.plan.site(id)).collect();
        if room > 0 {
            return Ok(Arc::new(self.read_augmented(&sites, room)?));
        }
        let names: Vec<String> = sites.iter().map(|s| s.stored_name.clone()).collect();
        if let Some(held) = self.held.matrices.get(&names) {
            return Ok(Arc::clone(held));
        }
        let weight = Arc::new(self.read_group(&sites)?);
        self.held.matrices.insert(names, Arc::clone(&weight));
        Ok(weight)
    }

    /// One matrix with room for low-rank updates.
    fn read_augmented(&self, sites: &[&Site], room: usize) -> Result<FrozenWeight> {
        if let Some(codes) = self.read_codes(sites)? {
            return Ok(FrozenWeight::Augmented(Augmented::of_codes(codes, room)));
        }
        let (shape, dtype) = (shape_of_group(sites), self.format.dtype);
        let write = |to: ViewMut<'_>| self.read_values(sites, to);
        let weight = Augmented::of_values(self.params.device(), dtype, shape, room, write)?;
        Ok(FrozenWeight::Augmented(weight))
    }

    /// One matrix where all are values.
    fn read_group(&self, sites: &[&Site]) -> Result<FrozenWeight> {
        if let Some(codes) = self.read_codes(sites)? {
            return Ok(codes);
        }
        let [rows, cols] = shape_of_group(sites);
        let mut values = Tensor::empty(self.params.device(), self.format.dtype, rows, cols);
        self.read_values(sites, values.view_mut())?;
        Ok(FrozenWeight::Dense(values))
    }

    /// Values of linears, one below the other.
    fn read_values(&self, sites: &[&Site], mut to: ViewMut<'_>) -> Result<()> {
        let mut first = 0;
        for site in sites {
            let rows = first..first + site.out_features;
            first = rows.end;
            self.read_weight(site, to.reborrow().row_range(rows))?;
        }
        Ok(())
    }

    /// Linears of which any is to be held as codes.
    fn read_codes(&self, sites: &[&Site]) -> Result<Option<FrozenWeight>> {
        let codes = sites.iter().map(|site| self.quantised(site));
        let codes: Vec<Option<Quantised>> = codes.collect::<Result<_>>()?;
        if codes.iter().all(Option::is_none) {
            return Ok(None);
        }
        let parts = sites.iter().zip(codes).map(|(site, codes)| match codes {
            Some(codes) => Ok(FrozenWeight::Codes(codes)),
            None => Ok(FrozenWeight::Dense(self.frozen(site)?)),
        });
        let mut parts: Vec<FrozenWeight> = parts.collect::<Result<_>>()?;
        Ok(Some(match parts.len() {
            1 => parts.remove(0),
            _ => FrozenWeight::Stacked(parts),
        }))
    }

    /// The codes of a linear where it is to be held as such, from the source or made here.
    fn quantised(&self, site: &Site) -> Result<Option<Quantised>> {
        let name = site.tensor("weight");
        let codes = match (self.source.read_quantised(&name)?, self.format.of(site)) {
            (Some(codes), _) => codes,
            (None, None) => return Ok(None),
            (None, Some(format)) => {
                let [rows, cols] = [site.out_features, site.in_features];
                let mut values = Tensor::empty(&Device::Cpu, self.format.dtype, rows, cols);
                self.read_weight(site, values.view_mut())?;
                let flat = values.to_f32_vec();
                if let Some(at) = flat.iter().position(|value| !value.is_finite()) {
                    let message = format!(
                        "tensor `{name}` holds {} at element {at}, which has no code; get the file \
                         again, or name the module in llm_int8_skip_modules",
                        flat[at]
                    );
                    return Err(Error::model(self.source.place(&name), message));
                }
                format.quantise(values.view())?
            }
        };
        Ok(Some(codes.to_device(self.params.device())))
    }

    fn bias(&mut self, site: &Site, trained: Option<ParamId>) -> Result<Option<PartBias>> {
        if !site.bias {
            return Ok(None);
        }
        if let Some(id) = trained.or_else(|| self.trained_biases.remove(&site.id)) {
            self.read_param(site, id, "bias")?;
            return Ok(Some(PartBias::Trained(id)));
        }
        Ok(Some(PartBias::Frozen(self.vector(site, "bias")?)))
    }

    /// The norm at a site, or none.
    fn norm(&mut self, id: Option<SiteId>) -> Result<Norm> {
        let Some(id) = id else {
            return Ok(Norm::Identity);
        };
        if self.config.norm != NormKind::Layer {
            return Ok(Norm::Rms(self.rms_norm(id)?));
        }
        let (site, [weight, bias]) = (self.plan.site(id), self.trained_norm(id)?);
        Ok(Norm::Layer(LayerNorm {
            weight: self.parameter(site, "weight", weight)?,
            bias: self.parameter(site, "bias", bias)?,
            eps: self.config.norm_eps,
            room: 0,
        }))
    }

    fn rms_norm(&mut self, id: SiteId) -> Result<RmsNorm> {
        let (site, [weight, _]) = (self.plan.site(id), self.trained_norm(id)?);
        Ok(RmsNorm {
            weight: self.parameter(site, "weight", weight)?,
            offset: match self.config.norm {
                NormKind::Rms | NormKind::Layer => 0.0,
                NormKind::RmsOnePlus => 1.0,
            },
            eps: self.config.norm_eps,
            room: 0,
        })
    }

    /// Weight and bias of a norm, as far as they are trained.
    fn trained_norm(&mut self, id: SiteId) -> Result<[Option<ParamId>; 2]> {
        match self.attachments.remove(&id) {
            None => Ok([None, self.trained_biases.remove(&id)]),
            Some(Attachment::TrainBase { weight, bias }) => Ok([Some(weight), bias]),
            Some(_) => Err(unsupported(self.plan.site(id))),
        }
    }

    /// The vector `suffix` of a site, into its parameter if it is trained.
    fn parameter(&mut self, site: &Site, suffix: &str, trained: Option<ParamId>) -> Result<Vector> {
        if let Some(id) = trained {
            self.read_param(site, id, suffix)?;
            return Ok(Vector::Trained(id));
        }
        Ok(Vector::Frozen(self.vector(site, suffix)?))
    }

    fn embedding(&mut self) -> Result<Embedding> {
        self.embedding_at(self.plan.embedding)
    }

    fn positions(&mut self) -> Result<Option<Positions>> {
        let (Some(id), Some(name)) = (self.plan.positions, self.config.modules.positions) else {
            return Ok(None);
        };
        Ok(Some(Positions {
            embedding: self.embedding_at(id)?,
            name,
        }))
    }

    fn embedding_at(&mut self, id: SiteId) -> Result<Embedding> {
        let site = self.plan.site(id);
        let (attachment, update) = match self.attachments.remove(&id) {
            Some(Attachment::LowRank(update)) => (None, Some(update)),
            other => (other, None),
        };
        let table = self.table(site, site, attachment)?;
        let norms = match (&table.weight, &update) {
            (TableWeight::Frozen(weight), Some(update)) if update.magnitude.is_some() => {
                let device = self.params.device();
                Some(ColumnNorms::new(weight.view(), update.rank, device))
            }
            _ => None,
        };
        Ok(Embedding {
            table,
            update,
            norms,
        })
    }

    fn head(&mut self, embedding: &Embedding) -> Result<Head> {
        let site = self.plan.site(self.plan.head);
        let (update, attachment) = HeadUpdate::of(self.attachments.remove(&site.id));
        let own = |b: &mut Self, from: &Site, attachment| b.table(site, from, attachment).map(Some);
        let table = match (site.tied_to, attachment) {
            (None, attachment) => own(self, site, attachment)?,
            // An update of the head is one of the base's weight where the embedding is trained as a whole.
            (Some(_), None)
                if update.is_none() || matches!(embedding.table.weight, TableWeight::Frozen(_)) =>
            {
                None
            }
            (Some(tied), None | Some(Attachment::KeepBase)) => {
                own(self, self.plan.site(tied), None)?
            }
            (
                Some(tied),
                Some(attachment @ (Attachment::TrainBase { .. } | Attachment::TrainRows { .. })),
            ) => own(self, self.plan.site(tied), Some(attachment))?,
            (Some(_), Some(_)) => return Err(unsupported(site)),
        };
        let of_table = table.as_ref().unwrap_or(&embedding.table).rows.as_ref();
        let moved = of_table.filter(|_| update.is_some());
        if moved.is_some() && !update.as_ref().is_some_and(HeadUpdate::adds_only) {
            let message = format!(
                "`{}` has rows that are trained, and beside these only a plain low-rank update can stand; leave one of \
                 both out",
                site.name
            );
            return Err(Error::config("target_modules", message));
        }
        let moved = moved.map(|rows| Moved::new(rows, self.params.device()));
        Ok(Head {
            table,
            update,
            moved,
            site: site.id.0,
            row_lengths: OnceLock::new(),
        })
    }

    /// The table of `site`, with the values that `from` has in the source.
    fn table(&mut self, site: &Site, from: &Site, attachment: Option<Attachment>) -> Result<Table> {
        let mut rows = None;
        let weight = match attachment {
            None => TableWeight::Frozen(self.frozen(from)?),
            Some(Attachment::TrainBase { weight, bias: None }) => {
                self.read_param(from, weight, "weight")?;
                TableWeight::Trained(weight)
            }
            Some(Attachment::TrainRows { rows: id, indices }) => {
                rows = Some(TrainedRows::new(id, &indices, site.out_features));
                TableWeight::Frozen(self.with_trained_rows(from, id, &indices)?)
            }
            Some(_) => return Err(unsupported(site)),
        };
        Ok(Table { weight, rows })
    }

    /// The table in the order of [`TrainedRows`], with the trained ones in `id`.
    fn with_trained_rows(&mut self, site: &Site, id: ParamId, indices: &[u32]) -> Result<Tensor> {
        let [rows, cols] = [site.out_features, site.in_features];
        let mut table = Tensor::empty(&Device::Cpu, self.format.dtype, rows, cols);
        self.source.read(&site.tensor("weight"), table.view_mut())?;
        let to = self.params.get_mut(id);
        for (to, &token) in to.chunks_mut(cols).zip(indices) {
            let row = table.view().row_range(token as usize..token as usize + 1);
            to.copy_from_slice(&row.to_f32_vec());
        }
        TrainedRows::reorder(&mut table, indices);
        let device = self.params.device();
        Ok(if device.is_cuda() {
            table.to_device(device)
        } else {
            table
        })
    }

    fn frozen(&self, site: &Site) -> Result<Tensor> {
        let [rows, cols] = [site.out_features, site.in_features];
        let mut tensor = Tensor::empty(self.params.device(), self.format.dtype, rows, cols);
        self.read_weight(site, tensor.view_mut())?;
        Ok(tensor)
    }

    /// [`read_weight`] from the source.
    fn read_weight(&self, site: &Site, to: ViewMut<'_>) -> Result<()> {
        read_weight(self.source, site, to)
    }

    /// The frozen vector `suffix` of a site.
    fn vector(&mut self, site: &Site, suffix: &str) -> Result<Arc<Tensor>> {
        let (name, device) = (site.tensor(suffix), self.params.device());
        if let Some(held) = self.held.vectors.get(&name) {
            return Ok(Arc::clone(held));
        }
        let mut values = Tensor::empty(device, DType::F32, 1, site.out_features);
        self.source.read(&name, values.view_mut())?;
        let values = Arc::new(values);
        self.held.vectors.insert(name, Arc::clone(&values));
        Ok(values)
    }

    fn read_param(&mut self, site: &Site, id: ParamId, suffix: &str) -> Result<()> {
        if suffix == "weight" && site.stored_transposed {
            let mut values = Tensor::empty(
                &Device::Cpu,
                DType::F32,
                site.out_features,
                site.in_features,
            );
            self.read_weight(site, values.view_mut())?;
            self.params.view_mut(id).copy_from(values.view());
            return Ok(());
        }
        let to = self.params.view_mut(id);
        self.source.read(&site.tensor(suffix), to)
    }
}

/// `[out, in]` of linears over one input.
fn shape_of_group(sites: &[&Site]) -> [usize; 2] {
    let out = sites.iter().map(|site| site.out_features).sum();
    [out, sites[0].in_features]
}

fn unsupported(site: &Site) -> Error {
    Error::config(
        "lora_target_modules",
        format!(
            "what was to be trained of `{}` is not supported there; target linears, the embedding or the head",
            site.name
        ),
    )
}
