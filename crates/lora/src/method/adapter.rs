//! A [`Method`] as core's [`Adapter`].

use super::{Common, Frozen, Keys, Method, Place, Source, files};
use ferrotune_core::adapter::{Adapter, Attachment, BaseWeights, Site, SiteId, SiteKind};
use ferrotune_core::params::{FlatBuffer, ParamId, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::Path;
use std::sync::OnceLock;

/// A method with its configuration, before it knows its base.
pub(crate) trait Configured: Debug + Send + Sync {
    fn common(&self) -> &Common;
    fn clone_box(&self) -> Box<dyn Configured>;
    fn into_adapter(self: Box<Self>, model_type: &str) -> Result<Box<dyn Adapter>>;
    /// For a base of this name.
    fn for_base(self: Box<Self>, base: &Path) -> Box<dyn Configured>;
}

/// Reads the configuration of `M`.
pub(crate) fn configure<M: Method>(
    source: Source<'_>,
    object: &Map<String, Value>,
) -> Result<Box<dyn Configured>> {
    let mut keys = Keys::new(source, object);
    let common = Common::read(&mut keys)?;
    let method = M::read(&mut keys)?;
    keys.finish()?;
    Ok(Box::new(MethodAdapter {
        common,
        method,
        attached: OnceLock::new(),
    }))
}

/// A method over a whole model.
#[derive(Clone, Debug)]
pub(crate) struct MethodAdapter<M> {
    common: Common,
    method: M,
    attached: OnceLock<Attached>,
}

/// What is known once the adapter is attached.
#[derive(Clone, Debug, Default)]
pub(super) struct Attached {
    pub(super) frozen: Frozen,
    /// The ends of the paths of the targets, sorted.
    pub(super) names: Vec<String>,
    /// The targets.
    sites: Vec<Site>,
}

impl<M: Method> Configured for MethodAdapter<M> {
    fn common(&self) -> &Common {
        &self.common
    }

    fn clone_box(&self) -> Box<dyn Configured> {
        Box::new(self.clone())
    }

    fn into_adapter(mut self: Box<Self>, model_type: &str) -> Result<Box<dyn Adapter>> {
        self.common = self.common.with_default_targets::<M>(model_type)?;
        Ok(self)
    }

    fn for_base(mut self: Box<Self>, base: &Path) -> Box<dyn Configured> {
        self.common.base_model_name_or_path = Some(base.display().to_string());
        self.common
            .task_type
            .get_or_insert_with(|| "CAUSAL_LM".into());
        self
    }
}

impl<M: Method> Adapter for MethodAdapter<M> {
    fn attach(
        &self,
        sites: &[Site],
        params: &mut ParamLayoutBuilder,
    ) -> Result<Vec<(SiteId, Attachment)>> {
        let targets = self.common.select(sites)?;
        for site in &targets {
            require_linear::<M>(site)?;
        }
        self.method.check(&targets)?;
        let frozen = self.method.frozen(&targets)?;
        let attached = self
            .attached
            .get_or_init(|| Attached::new(frozen, &targets));
        // Shared tensors are ready when backward has passed the first target.
        let first = targets
            .iter()
            .map(|site| site.execution_order)
            .min()
            .unwrap_or(0);
        let shared = self.method.shared().into_iter().map(|spec| {
            params.add(ParamSpec::new(
                files::shared_name(spec.ending),
                spec.shape,
                first,
            ))
        });
        let shared: Vec<ParamId> = shared.collect();
        targets
            .into_iter()
            .map(|site| {
                let specs = self.method.tensors(site)?.into_iter();
                let ids: Vec<ParamId> = specs
                    .map(|spec| {
                        let name = files::tensor_name(&site.name, spec.ending);
                        let mut param = ParamSpec::new(name, spec.shape, site.execution_order);
                        if !spec.trained {
                            (param.lr_scale, param.weight_decay) = (0.0, false);
                        }
                        params.add(param)
                    })
                    .collect();
                let place = Place {
                    ids: &ids,
                    shared: &shared,
                    frozen: &attached.frozen,
                };
                Ok((site.id, self.method.attach(site, &place)?))
            })
            .collect()
    }

    fn init(&self, params: &mut FlatBuffer, seed: u64) -> Result<()> {
        let layout = params.layout().clone();
        for (_, segment) in layout.by_name() {
            let (name, shape) = (&segment.spec.name, &segment.spec.shape);
            self.method.init(name, shape).fill(params, name, seed);
        }
        Ok(())
    }

    fn prepare(&self, params: &mut FlatBuffer, base: &mut dyn BaseWeights) -> Result<()> {
        if !self.method.uses_base() {
            return Ok(());
        }
        for site in self
            .attached
            .get()
            .into_iter()
            .flat_map(|attached| &attached.sites)
        {
            let weight = base.read(site.id)?;
            let values = self.method.base_values(site, weight.view())?;
            for (spec, values) in self.method.tensors(site)?.iter().zip(values) {
                let id = params
                    .layout()
                    .find(&files::tensor_name(&site.name, spec.ending));
                if let (Some(id), Some(values)) = (id, values) {
                    params.get_mut(id).copy_from_slice(&values);
                }
            }
        }
        Ok(())
    }

    /// Also opens the files again and compares them.
    fn save(&self, params: &FlatBuffer, directory: &Path) -> Result<()> {
        let none = Attached::default();
        let attached = self.attached.get().unwrap_or(&none);
        files::save(&self.method, &self.common, attached, params, directory)?;
        let mut read = FlatBuffer::zeros(params.layout());
        self.load(&mut read, directory)?;
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
        if params.as_slice().iter().zip(read.as_slice()).all(same) {
            return Ok(());
        }
        Err(Error::adapter(
            directory,
            "reads back with other values than were written",
        ))
    }

    fn load(&self, params: &mut FlatBuffer, directory: &Path) -> Result<()> {
        files::load(&self.method, self.attached.get(), params, directory)
    }

    fn describe(&self) -> String {
        self.method.describe()
    }
}

impl Attached {
    fn new(frozen: Frozen, targets: &[&Site]) -> Self {
        let ends = targets
            .iter()
            .filter_map(|site| site.name.rsplit('.').next());
        let names: BTreeSet<String> = ends.map(str::to_owned).collect();
        let sites = targets.iter().map(|site| (*site).clone()).collect();
        Self {
            frozen,
            names: names.into_iter().collect(),
            sites,
        }
    }
}

fn require_linear<M: Method>(site: &Site) -> Result<()> {
    let kind = match site.kind {
        SiteKind::Linear if !site.output_head => return Ok(()),
        SiteKind::Linear => "the output head",
        SiteKind::Embedding => "an embedding",
        SiteKind::Norm => "a norm",
    };
    Err(Error::config(
        "target_modules",
        format!(
            "`{}` is {kind}, and {} attaches to the linears of layers only; leave it out",
            site.name,
            M::PEFT_TYPE
        ),
    ))
}
