//! The linears of a loaded model, to read and to replace.

use super::frozen::FrozenWeight;
use super::layer::Layer;
use super::linear::{LinearGroup, PartWeight};
use super::vocabulary::TableWeight;
use super::weight_source::WeightSource;
use super::weights::read_weight;
use super::{Model, ModelPlan};
use crate::adapter::{BaseWeights, SiteId};
use crate::{Error, Result};
use ferrotune_kernels::{DType, Device, Tensor, View, Workspace};
use std::ops::Range;
use std::sync::Arc;

impl BaseWeights for Model {
    fn find(&self, name: &str) -> Option<SiteId> {
        let sites = ModelPlan::new(&self.config).sites;
        let found = sites.iter().find(|site| site.name == name);
        found.map(|site| site.id)
    }

    fn read(&self, site: SiteId) -> Result<Tensor> {
        let groups = self.layers.iter().flat_map(Layer::groups);
        for group in groups {
            if let Some((weight, rows)) = frozen_rows(group, site) {
                let workspace = Workspace::on(self.device.clone(), 0);
                return weight.with_values(group.scratch, &workspace, |values| {
                    let values = values.row_range(rows).to_f32_vec();
                    let cols = group.in_features;
                    Ok(Tensor::from_f32(values, group.rows_of(site), cols))
                });
            }
        }
        match self.frozen_table(site) {
            Some(table) => Ok(table.to_device(&Device::Cpu).to_dtype(DType::F32)),
            None => Err(no_linear(site)),
        }
    }

    fn vocabulary(&self) -> usize {
        self.config.vocab_size
    }

    fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        let TableWeight::Frozen(table) = &self.embedding.table.weight else {
            return Err(Error::config("target_modules", "the embedding is trained"));
        };
        let vocabulary = table.rows();
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
            let message = format!("token {token} is outside the vocabulary of {vocabulary}");
            return Err(Error::config("model_name_or_path", message));
        }
        let rows = tokens.iter().map(|&token| token as usize);
        let mut values: Vec<f32> = rows
            .flat_map(|row| table.view().row_range(row..row + 1).to_f32_vec())
            .collect();
        // Where the embedding itself scales, and not the model whatever comes in.
        if let Some(scale) = self.config.embedding_scale.filter(|scale| scale.in_module) {
            values.iter_mut().for_each(|value| *value *= scale.factor);
        }
        Ok(Tensor::from_f32(values, tokens.len(), table.cols()))
    }

    fn code_bits(&self, site: SiteId) -> Option<usize> {
        let mut groups = self.layers.iter().flat_map(Layer::groups);
        let (weight, rows) = groups.find_map(|group| frozen_rows(group, site))?;
        weight.code_bits(rows)
    }

    fn replace(&mut self, site: SiteId, weight: View<'_>) -> Result<()> {
        let groups = self.layers.iter_mut().flat_map(Layer::groups_mut);
        for group in groups {
            if let Some((_, rows)) = frozen_rows(group, site) {
                return match group.frozen_mut(site) {
                    Some(frozen) => frozen.replace_rows(rows, weight),
                    None => Err(shared()),
                };
            }
        }
        Err(no_linear(site))
    }
}

impl Model {
    /// The table of tokens, of positions or of the head at `site`, if it is frozen.
    fn frozen_table(&self, site: SiteId) -> Option<&Tensor> {
        let plan = ModelPlan::new(&self.config);
        let table = if site == plan.embedding {
            &self.embedding.table
        } else if site == plan.head {
            self.head_table()
        } else {
            let positions = self
                .positions
                .as_ref()
                .filter(|_| Some(site) == plan.positions);
            &positions?.embedding.table
        };
        match (&table.weight, &table.rows) {
            (TableWeight::Frozen(table), None) => Some(table),
            _ => None,
        }
    }
}

/// A model with what its weights were read from.
pub struct LoadedBase<'a> {
    /// The model.
    pub model: &'a mut Model,
    /// Where its weights come from.
    pub source: &'a dyn WeightSource,
}

impl BaseWeights for LoadedBase<'_> {
    fn find(&self, name: &str) -> Option<SiteId> {
        self.model.find(name)
    }

    fn read(&self, site: SiteId) -> Result<Tensor> {
        self.model.read(site)
    }

    fn code_bits(&self, site: SiteId) -> Option<usize> {
        self.model.code_bits(site)
    }

    fn vocabulary(&self) -> usize {
        self.model.vocabulary()
    }

    fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        BaseWeights::embed(self.model, tokens)
    }

    fn original(&self, id: SiteId) -> Result<Tensor> {
        let plan = ModelPlan::new(&self.model.config);
        let site = plan.sites.get(id.0).ok_or_else(|| no_linear(id))?;
        if self
            .source
            .read_quantised(&site.tensor("weight"))?
            .is_some()
        {
            let message = format!(
                "needs the weights that the quantised base was made of, and the files have `{}` quantised too; \
                 give the checkpoint that they were made from",
                site.name
            );
            return Err(Error::config("init_lora_weights", message));
        }
        let [rows, cols] = [site.out_features, site.in_features];
        let mut weight = Tensor::zeros(DType::F32, rows, cols);
        read_weight(self.source, site, weight.view_mut())?;
        Ok(weight)
    }

    fn replace(&mut self, site: SiteId, weight: View<'_>) -> Result<()> {
        self.model.replace(site, weight)
    }
}

/// A base that no adapter may change, since others stand on it.
pub struct SharedBase<'a>(pub LoadedBase<'a>);

impl BaseWeights for SharedBase<'_> {
    fn find(&self, name: &str) -> Option<SiteId> {
        self.0.find(name)
    }

    fn read(&self, site: SiteId) -> Result<Tensor> {
        self.0.read(site)
    }

    fn vocabulary(&self) -> usize {
        self.0.vocabulary()
    }

    fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        self.0.embed(tokens)
    }

    fn code_bits(&self, site: SiteId) -> Option<usize> {
        self.0.code_bits(site)
    }

    fn original(&self, site: SiteId) -> Result<Tensor> {
        self.0.original(site)
    }

    fn replace(&mut self, _: SiteId, _: View<'_>) -> Result<()> {
        let message = "starts by changing the base, which other adapters of this run stand on; take another start, or \
                       give it a run of its own";
        Err(Error::config("init_lora_weights", message))
    }
}

/// The frozen matrix that holds the weight of `site`, and its rows there.
fn frozen_rows(group: &LinearGroup, site: SiteId) -> Option<(&FrozenWeight, Range<usize>)> {
    let part = group.parts.iter().find(|part| part.site == site.0)?;
    match &part.weight {
        PartWeight::InGroup => Some((group.frozen.as_ref()?, part.columns.clone())),
        PartWeight::Alone(weight) => Some((weight, 0..part.columns.len())),
        PartWeight::Trained(_) => None,
    }
}

fn shared() -> Error {
    let message = "a start that changes the base's weights would change them in every copy of a layer; leave \
                   `layer_replication` out, or take another start";
    Error::config("init_lora_weights", message)
}

impl LinearGroup {
    fn rows_of(&self, site: SiteId) -> usize {
        let part = self.parts.iter().find(|part| part.site == site.0);
        part.map_or(0, |part| part.columns.len())
    }

    fn frozen_mut(&mut self, site: SiteId) -> Option<&mut FrozenWeight> {
        let part = self.parts.iter_mut().find(|part| part.site == site.0)?;
        part.row_lengths.take();
        match &mut part.weight {
            PartWeight::InGroup => self.frozen.as_mut().and_then(Arc::get_mut),
            PartWeight::Alone(weight) => Arc::get_mut(weight),
            PartWeight::Trained(_) => None,
        }
    }
}

fn no_linear(site: SiteId) -> Error {
    let message = format!(
        "site {} is no frozen linear of a layer and no frozen table",
        site.0
    );
    Error::config("target_modules", message)
}
