//! Full fine-tuning as an [`Adapter`]: every base weight is trained.

use crate::adapter::{Adapter, Attachment, Site, SiteId, SiteKind};
use crate::io::{FileDType, SafetensorsFile, TensorData, write_safetensors};
use crate::params::{FlatBuffer, ParamLayoutBuilder, ParamSpec};
use crate::{Error, Result, suggest};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// The file that [`FullFineTuning`] writes and reads.
const FILE: &str = "model.safetensors";

/// Trains every weight and bias of the base (`use_peft: false`).
#[derive(Clone, Copy, Debug, Default)]
pub struct FullFineTuning;

impl Adapter for FullFineTuning {
    fn attach(
        &self,
        sites: &[Site],
        params: &mut ParamLayoutBuilder,
    ) -> Result<Vec<(SiteId, Attachment)>> {
        let mut attachments = Vec::new();
        for site in sites.iter().filter(|s| s.tied_to.is_none()) {
            let shape = match site.kind {
                SiteKind::Norm => vec![site.out_features],
                SiteKind::Linear | SiteKind::Embedding => vec![site.out_features, site.in_features],
            };
            let order = site.execution_order;
            let mut weight = ParamSpec::new(format!("{}.weight", site.name), shape, order);
            weight.transposed = site.stored_transposed;
            // Whatever it is called.
            weight.weight_decay &= site.kind != SiteKind::Norm;
            let weight = params.add(weight);
            let bias = site.bias.then(|| {
                let (name, shape) = (format!("{}.bias", site.name), [site.out_features]);
                params.add(ParamSpec::new(name, shape, order))
            });
            attachments.push((site.id, Attachment::TrainBase { weight, bias }));
        }
        Ok(attachments)
    }

    fn init(&self, _: &mut FlatBuffer, _: u64) -> Result<()> {
        Ok(())
    }

    fn save(&self, params: &FlatBuffer, directory: &Path) -> Result<()> {
        params.read_back()?;
        let tensors: BTreeMap<String, TensorData<'_>> = params
            .layout()
            .by_name()
            .map(|(id, segment)| {
                let bytes = match params.file_values(id) {
                    Cow::Borrowed(values) => Cow::Borrowed(bytemuck::cast_slice(values)),
                    Cow::Owned(values) => Cow::Owned(bytemuck::cast_slice(&values).to_vec()),
                };
                let data = TensorData {
                    dtype: FileDType::F32,
                    shape: segment.spec.file_shape(),
                    bytes,
                };
                (segment.spec.name.clone(), data)
            })
            .collect();
        let metadata = BTreeMap::from([("format".into(), "pt".into())]);
        write_safetensors(&directory.join(FILE), &tensors, &metadata)
    }

    fn load(&self, params: &mut FlatBuffer, directory: &Path) -> Result<()> {
        let path = directory.join(FILE);
        let file = SafetensorsFile::open(&path)?;
        let layout = std::sync::Arc::clone(params.layout());
        if let Some(extra) = file.names().find(|n| layout.find(n).is_none()) {
            let hint =
                suggest::did_you_mean(extra, layout.by_name().map(|(_, s)| s.spec.name.as_str()));
            return Err(Error::model(
                &path,
                format!("tensor `{extra}` belongs to nothing in this model{hint}"),
            ));
        }
        for (id, segment) in layout.by_name() {
            let name = &segment.spec.name;
            let shape = file.meta(name).map(|m| m.shape.as_slice());
            let expected = segment.spec.file_shape();
            if shape != Some(&expected) {
                return Err(Error::model(
                    &path,
                    format!("tensor `{name}`: found shape {shape:?}, expected {expected:?}"),
                ));
            }
            params.set_file_values(id, &file.read_f32(name)?);
        }
        Ok(())
    }

    fn describe(&self) -> String {
        "full fine-tuning".into()
    }
}
