//! `adapter_config.json` and `adapter_model.safetensors`, which hold the rows, and a file of our own with
//! what makes them.

use super::config::PromptConfig;
use super::{ROWS, Shape};
use crate::base_copies::OwnNames;
use crate::files::{CONFIG_FILE, Weights, write};
use ferrotune_core::io::{SafetensorsFile, TensorData, write_safetensors};
use ferrotune_core::params::{FlatBuffer, ParamId};
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The encoder, which PEFT does not save: an adapter can only be trained on with it.
const ENCODER_FILE: &str = "prompt_encoder.safetensors";

/// Whether an adapter has what makes its rows.
pub(super) fn has_encoder(directory: &Path) -> bool {
    directory.join(ENCODER_FILE).exists()
}

pub(super) fn save(
    config: &PromptConfig,
    shape: &Shape,
    rows: ParamId,
    params: &FlatBuffer,
    directory: &Path,
) -> Result<()> {
    let layout = params.layout();
    std::fs::create_dir_all(directory).map_err(Error::write(directory))?;
    let tensor = |id| TensorData::from_f32(params.get(id), layout.segment(id).spec.shape.clone());
    let others = layout.by_name().filter(|(id, _)| *id != rows);
    let encoder: BTreeMap<String, TensorData<'_>> = others
        .map(|(id, segment)| (segment.spec.name.clone(), tensor(id)))
        .collect();
    if !encoder.is_empty() {
        let path = directory.join(ENCODER_FILE);
        write_safetensors(&path, &encoder, &BTreeMap::new())?;
    }
    let tensors = BTreeMap::from([(ROWS.to_owned(), tensor(rows))]);
    let sorted: BTreeMap<String, Value> = config.to_json(shape).into_iter().collect();
    let object: Map<String, Value> = sorted.into_iter().collect();
    write(directory, &tensors, &format!("{:#}", Value::Object(object)))
}

/// Reads the rows, and what makes them where `params` has that, strictly.
pub(super) fn load(rows: ParamId, params: &mut FlatBuffer, directory: &Path) -> Result<()> {
    let layout = params.layout().clone();
    let file = Weights::open(directory)?;
    let own = OwnNames::of(&layout);
    let expected = BTreeSet::from([ROWS.to_owned()]);
    file.require_same_names(&expected, |name| own.are_beside_copy(name))?;
    let values = file.read(ROWS, &layout.segment(rows).spec.shape)?;
    params.get_mut(rows).copy_from_slice(&values);
    let others: BTreeSet<String> = layout
        .by_name()
        .filter(|(id, _)| *id != rows)
        .map(|(_, segment)| segment.spec.name.clone())
        .collect();
    if others.is_empty() {
        return Ok(());
    }
    let path = directory.join(ENCODER_FILE);
    if !path.exists() {
        return Err(Error::adapter(
            directory.join(CONFIG_FILE),
            format!(
                "is without `{ENCODER_FILE}`: PEFT saves the rows alone, and training cannot go on without \
                 what makes them"
            ),
        ));
    }
    let file = Weights::of(path.clone(), SafetensorsFile::open(&path)?);
    file.require_same_names(&others, |_| false)?;
    for name in others {
        if let Some(id) = layout.find(&name) {
            let values = file.read(&name, &layout.segment(id).spec.shape)?;
            params.get_mut(id).copy_from_slice(&values);
        }
    }
    Ok(())
}
