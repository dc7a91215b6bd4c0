//! `adapter_config.json` and `adapter_model.safetensors` of a method.

use super::{Common, Frozen, Method};
use crate::files::{CONFIG_FILE, Weights, write};
use crate::target::TargetModules;
use ferrotune_core::io::{FileDType, TensorData};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What PEFT puts before the path of a module of the base model.
const MODULE_PREFIX: &str = "base_model.model.";
/// And before the name of a tensor that belongs to no module.
const SHARED_PREFIX: &str = "base_model.";

pub(super) fn tensor_name(module: &str, ending: &str) -> String {
    format!("{MODULE_PREFIX}{module}.{ending}")
}

pub(super) fn shared_name(ending: &str) -> String {
    format!("{SHARED_PREFIX}{ending}")
}

/// The last part of a name that a method gave: what stands behind the module's path.
pub(super) fn ending_of<'a>(name: &str, endings: &[&'a str]) -> Option<&'a str> {
    let rest = name.strip_prefix(SHARED_PREFIX)?;
    let matches = |ending: &&&str| rest == **ending || rest.strip_suffix(**ending).is_some_and(|head| head.ends_with('.'));
    endings.iter().find(matches).copied()
}

pub(super) fn save<M: Method>(
    method: &M,
    common: &Common,
    frozen: &Frozen,
    params: &FlatBuffer,
    directory: &Path,
) -> Result<()> {
    let mut tensors = BTreeMap::new();
    for (id, segment) in params.layout().by_name() {
        let data = TensorData {
            dtype: FileDType::F32,
            shape: segment.spec.shape.clone(),
            bytes: Cow::Borrowed(bytemuck::cast_slice(params.get(id))),
        };
        tensors.insert(segment.spec.name.clone(), data);
    }
    for (ending, tensor) in frozen.to_save() {
        let values = tensor.to_f32_vec();
        let data = TensorData {
            dtype: FileDType::F32,
            shape: vec![tensor.rows(), tensor.cols()],
            bytes: Cow::Owned(bytemuck::cast_slice(&values).to_vec()),
        };
        tensors.insert(shared_name(ending), data);
    }
    let mut common = common.clone();
    if common.target_modules == Some(TargetModules::AllLinear) {
        common.target_modules = Some(TargetModules::List(modules(params)));
    }
    let mut keys = Map::new();
    common.write(M::PEFT_TYPE, &mut keys);
    method.write(&mut keys);
    let sorted: BTreeMap<String, Value> = keys.into_iter().collect();
    let object: Map<String, Value> = sorted.into_iter().collect();
    write(directory, &tensors, &format!("{:#}", Value::Object(object)))
}

/// The last segments of the paths of the adapted modules.
fn modules(params: &FlatBuffer) -> Vec<String> {
    let names = params.layout().by_name().filter_map(|(_, segment)| {
        let path = segment.spec.name.strip_prefix(MODULE_PREFIX)?;
        let is_layer = |part: &&str| part.contains("_proj") || part.contains("_attn") || part.contains("_fc");
        let parts: Vec<&str> = path.split('.').collect();
        parts.iter().rev().find(|part| is_layer(part)).map(|part| (*part).to_owned())
    });
    names.collect::<BTreeSet<String>>().into_iter().collect()
}

/// Reads every trained tensor, strictly; the frozen ones must be those of this run.
pub(super) fn load(frozen: Option<&Frozen>, saves_frozen: &[&'static str], params: &mut FlatBuffer, directory: &Path) -> Result<()> {
    let file = Weights::open(directory)?;
    let layout = params.layout().clone();
    let mut expected: BTreeSet<String> = layout.by_name().map(|(_, s)| s.spec.name.clone()).collect();
    expected.extend(saves_frozen.iter().map(|ending| shared_name(ending)));
    file.require_same_names(&expected)?;
    for (id, segment) in layout.by_name() {
        let values = file.read(&segment.spec.name, &segment.spec.shape)?;
        params.get_mut(id).copy_from_slice(&values);
    }
    for (ending, tensor) in frozen.into_iter().flat_map(Frozen::to_save) {
        let name = shared_name(ending);
        let values = file.read(&name, &[tensor.rows(), tensor.cols()])?;
        if values != tensor.to_f32_vec() {
            return Err(Error::adapter(
                directory.join(CONFIG_FILE),
                format!("`{name}` has other values than this run: the same trained tensors would give a different model"),
            ));
        }
    }
    Ok(())
}
