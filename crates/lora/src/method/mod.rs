//! What methods other than LoRA have in common: configuration, targets, files, start.
//!
//! A method says what it trains at one linear and what it computes there ([`Method`]);
//! [`MethodAdapter`] does the rest. Adding one is a file in `methods/` and a line in its list.

mod adapter;
mod common;
mod files;
mod init;
mod keys;
mod shared;
#[cfg(test)]
mod tests;

pub(crate) use adapter::{Configured, configure};
pub(crate) use common::Common;
pub(crate) use files::tensor_name;
pub(crate) use init::Init;
pub(crate) use keys::{Keys, Patterned, Source};
pub(crate) use shared::{Frozen, OnGpus, Placed};

use crate::files::{Part, Weights};
use crate::target::{TargetModules, default_target_modules};
use ferrotune_core::Result;
use ferrotune_core::adapter::{Attachment, Penalty, Site, StepDone};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_kernels::View;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;

/// A tensor that a method trains.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorSpec {
    /// Its name behind the module's, such as `vera_lambda_b`.
    pub(crate) ending: &'static str,
    pub(crate) shape: Vec<usize>,
    /// False for what belongs to the adapter and stays as it started.
    pub(crate) trained: bool,
}

impl TensorSpec {
    pub(crate) fn new(ending: &'static str, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            ending,
            shape: shape.into(),
            trained: true,
        }
    }

    pub(crate) fn fixed(ending: &'static str, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            trained: false,
            ..Self::new(ending, shape)
        }
    }
}

/// A PEFT method on linears.
pub(crate) trait Method: Clone + Debug + Send + Sync + 'static {
    /// `peft_type` in `adapter_config.json`.
    const PEFT_TYPE: &'static str;

    /// What `bias` calls the biases of the targets, such as `vera_only`; `None` where PEFT has no such key.
    const BIAS: Option<&'static str> = None;

    /// Whether PEFT has `ensure_weight_tying`.
    const TIES: bool = false;

    /// Reads the method's own keys; absent ones take PEFT's defaults.
    fn read(keys: &mut Keys<'_>) -> Result<Self>;

    /// Writes them.
    fn write(&self, keys: &mut Map<String, Value>);

    /// One line for logs, such as `VeRA r=256`.
    fn describe(&self) -> String;

    /// PEFT's targets where none are given.
    fn default_targets(model_type: &str) -> Option<TargetModules> {
        default_target_modules(model_type)
    }

    /// Refuses what does not fit the model: patterns that match no target, ranks out of range.
    fn check(&self, targets: &[&Site]) -> Result<()> {
        let _ = targets;
        Ok(())
    }

    /// What all targets share: trained tensors, whose names have no module.
    fn shared(&self) -> Vec<TensorSpec> {
        Vec::new()
    }

    /// What all targets share and nobody trains, a function of the configuration and the shapes.
    fn frozen(&self, targets: &[&Site]) -> Result<Frozen> {
        let _ = targets;
        Ok(Frozen::default())
    }

    /// The names of the frozen tensors that are written with the adapter.
    fn saved_frozen(&self) -> Vec<&'static str> {
        Vec::new()
    }

    /// The shape in files of a frozen tensor that is held as a matrix of `shape`.
    fn frozen_shape(&self, ending: &str, shape: [usize; 2]) -> Vec<usize> {
        let _ = ending;
        shape.to_vec()
    }

    /// What is trained at `site`.
    fn tensors(&self, site: &Site) -> Result<Vec<TensorSpec>>;

    /// How the tensor called `name` starts; `name` ends as its [`TensorSpec`] says.
    fn init(&self, name: &str, shape: &[usize]) -> Init;

    /// Whether [`Method::base_values`] has something to say.
    fn uses_base(&self) -> bool {
        false
    }

    /// Values that follow from W `[out, in]` of the base at `site`: one list per tensor of
    /// [`Method::tensors`], `None` for those that keep their start.
    fn base_values(&self, site: &Site, weight: View<'_>) -> Result<Vec<Option<Vec<f32>>>> {
        let _ = (site, weight);
        Ok(Vec::new())
    }

    /// [`Adapter::plan_steps`](ferrotune_core::adapter::Adapter::plan_steps).
    fn plan_steps(&mut self, total_steps: u64) -> Result<()> {
        let _ = total_steps;
        Ok(())
    }

    /// [`Adapter::state`](ferrotune_core::adapter::Adapter::state).
    fn state(&self) -> &'static [&'static str] {
        &[]
    }

    /// [`Adapter::completes_gradients`](ferrotune_core::adapter::Adapter::completes_gradients).
    fn completes_gradients(&self) -> bool {
        false
    }

    /// [`Adapter::complete_gradients`](ferrotune_core::adapter::Adapter::complete_gradients).
    fn complete_gradients(
        &self,
        targets: &[Target],
        params: &FlatBuffer,
        weight: f32,
        grads: &mut FlatBuffer,
    ) -> Result<Penalty> {
        let _ = (targets, params, weight, grads);
        Ok(Penalty::default())
    }

    /// [`Adapter::after_step`](ferrotune_core::adapter::Adapter::after_step).
    fn after_step(
        &self,
        targets: &[Target],
        params: &mut FlatBuffer,
        done: StepDone<'_>,
    ) -> Result<()> {
        let _ = (targets, params, done);
        Ok(())
    }

    /// [`Adapter::finish`](ferrotune_core::adapter::Adapter::finish).
    fn finish(&self, targets: &[Target], params: &mut FlatBuffer) {
        let _ = (targets, params);
    }

    /// Tensors of which files hold a part, by name, for methods that leave out what is zero.
    fn parts(&self, targets: &[Target], params: &FlatBuffer) -> BTreeMap<String, Part> {
        let _ = (targets, params);
        BTreeMap::new()
    }

    /// The keys that say so.
    fn write_parts(&self, parts: &BTreeMap<String, Part>, keys: &mut Map<String, Value>) {
        let _ = (parts, keys);
    }

    /// The same tensors, of the files in `directory`.
    fn read_parts(&self, directory: &Path) -> Result<BTreeMap<String, Part>> {
        let _ = directory;
        Ok(BTreeMap::new())
    }

    /// The names under which files hold the tensor called `name`.
    fn stored_as(&self, name: &str) -> Vec<String> {
        vec![name.to_owned()]
    }

    /// Its values, from those.
    fn read_tensor(&self, file: &Weights, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        file.read(name, shape)
    }

    /// What is computed at `site` with the tensors of [`Method::tensors`], in their order.
    fn attach(&self, site: &Site, at: &Place<'_>) -> Result<Attachment>;
}

/// A site that is adapted, with the tensors of [`Method::tensors`] in their order.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) site: Site,
    pub(crate) ids: Vec<ParamId>,
}

/// The tensors of one site.
pub(crate) struct Place<'a> {
    pub(crate) ids: &'a [ParamId],
    pub(crate) shared: &'a [ParamId],
    pub(crate) frozen: &'a Frozen,
}
