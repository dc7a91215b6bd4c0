//! `adapter_config.json` and `adapter_model.safetensors` of a method.

use super::adapter::Attached;
use super::{Common, Method};
use crate::base_copies::OwnNames;
use crate::beside::{differ, repeated};
use crate::files::{CONFIG_FILE, Weights, of_parameter, write};
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

pub(crate) fn tensor_name(module: &str, ending: &str) -> String {
    format!("{MODULE_PREFIX}{module}.{ending}")
}

pub(super) fn shared_name(ending: &str) -> String {
    format!("{SHARED_PREFIX}{ending}")
}

pub(super) fn save<M: Method>(
    method: &M,
    common: &Common,
    attached: &Attached,
    params: &FlatBuffer,
    directory: &Path,
) -> Result<()> {
    let mut tensors = BTreeMap::new();
    let parts = method.parts(&attached.targets, params);
    for (id, segment) in params.layout().by_name() {
        let (name, shape) = (&segment.spec.name, &segment.spec.shape);
        let Some(part) = parts.get(name) else {
            tensors.extend(of_parameter(params, id));
            continue;
        };
        let data = TensorData {
            dtype: FileDType::F32,
            shape: part.shape(shape),
            bytes: Cow::Owned(bytemuck::cast_slice(&part.take(params.get(id), shape)).to_vec()),
        };
        tensors.insert(name.clone(), data);
    }
    for ending in method.saved_frozen() {
        let tensor = attached.frozen.get(ending);
        let values = tensor.to_f32_vec();
        let data = TensorData {
            dtype: FileDType::F32,
            shape: method.frozen_shape(ending, [tensor.rows(), tensor.cols()]),
            bytes: Cow::Owned(bytemuck::cast_slice(&values).to_vec()),
        };
        tensors.insert(shared_name(ending), data);
    }
    let mut common = common.clone();
    if common.target_modules == Some(TargetModules::AllLinear) {
        common.target_modules = Some(TargetModules::List(attached.names.clone()));
    }
    let mut keys = Map::new();
    common.write::<M>(&mut keys);
    method.write(&mut keys);
    method.write_parts(&parts, &mut keys);
    let sorted: BTreeMap<String, Value> = keys.into_iter().collect();
    let object: Map<String, Value> = sorted.into_iter().collect();
    // Behind everything that is read from a GPU.
    params.read_back()?;
    write(directory, &tensors, &format!("{:#}", Value::Object(object)))
}

/// Reads every tensor of the method, strictly. Frozen ones must be those of this run, which are known once the adapter
/// is attached.
pub(super) fn load<M: Method>(
    method: &M,
    common: &Common,
    attached: Option<&Attached>,
    params: &mut FlatBuffer,
    directory: &Path,
) -> Result<()> {
    let file = Weights::open(directory)?.with_parts(method.read_parts(directory)?);
    let layout = params.layout().clone();
    let none = BTreeSet::new();
    let of_base = attached.map_or(&none, |attached| &attached.of_base);
    let mut expected: BTreeSet<String> = layout
        .by_name()
        .map(|(_, segment)| segment.spec.name.as_str())
        .filter(|name| !of_base.contains(*name))
        .flat_map(|name| method.stored_as(name))
        .collect();
    let saved = method.saved_frozen();
    expected.extend(saved.iter().map(|ending| shared_name(ending)));
    expected.extend(of_base.iter().cloned());
    // PEFT repeats a shared tensor under each module that uses it.
    let copies = |name: &str| {
        saved
            .iter()
            .any(|ending| name.starts_with(MODULE_PREFIX) && name.ends_with(&format!(".{ending}")))
    };
    let own = OwnNames::of(&layout);
    let tied = common.ensure_weight_tying;
    let repeated: BTreeMap<_, _> = repeated(&file, of_base, &own, tied)
        .filter(|(name, _)| !expected.contains(*name))
        .collect();
    file.require_same_names(&expected, |name| {
        copies(name) || own.are_beside_copy(name) || repeated.contains_key(name)
    })?;
    for (id, segment) in layout.by_name() {
        let name = &segment.spec.name;
        let values = match of_base.contains(name) {
            true => file.read(name, &segment.spec.file_shape())?,
            false => method.read_tensor(&file, name, &segment.spec.shape)?,
        };
        params.set_file_values(id, &values);
    }
    for (name, twin) in &repeated {
        let shape = file.file.meta(twin).map(|meta| meta.shape.clone());
        let shape = shape.unwrap_or_default();
        if file.read(name, &shape)? != file.read(twin, &shape)? {
            return Err(differ(&file, name, twin));
        }
    }
    match attached {
        Some(attached) => require_same_frozen(method, attached, &file, directory),
        None => Ok(()),
    }
}

/// Refuses frozen tensors of `file` that are not those of this run.
fn require_same_frozen<M: Method>(
    method: &M,
    attached: &Attached,
    file: &Weights,
    directory: &Path,
) -> Result<()> {
    for ending in method.saved_frozen() {
        let (name, tensor) = (shared_name(ending), attached.frozen.get(ending));
        if file.read_flat(&name, tensor.rows() * tensor.cols())? != tensor.to_f32_vec() {
            return Err(Error::adapter(
                directory.join(CONFIG_FILE),
                format!(
                    "`{name}` has other values than this run: the same trained tensors would give a different model"
                ),
            ));
        }
    }
    Ok(())
}
