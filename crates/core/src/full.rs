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
            let weight = params.add(ParamSpec::new(
                format!("{}.weight", site.name),
                shape,
                site.execution_order,
            ));
            let bias = site.bias.then(|| {
                let spec = ParamSpec::new(
                    format!("{}.bias", site.name),
                    [site.out_features],
                    site.execution_order,
                );
                params.add(spec)
            });
            attachments.push((site.id, Attachment::TrainBase { weight, bias }));
        }
        Ok(attachments)
    }

    fn init(&self, _: &mut FlatBuffer, _: u64) -> Result<()> {
        Ok(())
    }

    fn save(&self, params: &FlatBuffer, directory: &Path) -> Result<()> {
        let tensors: BTreeMap<String, TensorData<'_>> = params
            .layout()
            .by_name()
            .map(|(id, segment)| {
                let bytes = Cow::Borrowed(bytemuck::cast_slice(params.get(id)));
                let data = TensorData {
                    dtype: FileDType::F32,
                    shape: segment.spec.shape.clone(),
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
            if shape != Some(&segment.spec.shape) {
                let expected = &segment.spec.shape;
                return Err(Error::model(
                    &path,
                    format!("tensor `{name}`: found shape {shape:?}, expected {expected:?}"),
                ));
            }
            params.get_mut(id).copy_from_slice(&file.read_f32(name)?);
        }
        Ok(())
    }

    fn describe(&self) -> String {
        "full fine-tuning".into()
    }
}
