//! A [`Method`] as core's [`Adapter`].

use super::{Common, Frozen, Keys, Method, Place, Source, files};
use ferrotune_core::adapter::{Adapter, Attachment, Site, SiteId, SiteKind};
use ferrotune_core::params::{FlatBuffer, ParamId, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value};
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
pub(crate) fn configure<M: Method>(source: Source<'_>, object: &Map<String, Value>) -> Result<Box<dyn Configured>> {
    let mut keys = Keys::new(source, object);
    let common = Common::read(&mut keys)?;
    let method = M::read(&mut keys)?;
    keys.finish()?;
    Ok(Box::new(MethodAdapter { common, method, frozen: OnceLock::new() }))
}

/// A method over a whole model.
#[derive(Clone, Debug)]
pub(crate) struct MethodAdapter<M> {
    common: Common,
    method: M,
    /// Known once it is attached.
    frozen: OnceLock<Frozen>,
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
        self.common.task_type.get_or_insert_with(|| "CAUSAL_LM".into());
        self
    }
}

impl<M: Method> MethodAdapter<M> {
    /// Every ending the method may give a tensor.
    fn endings(&self, params: &FlatBuffer) -> Vec<(String, Vec<usize>)> {
        let specs = params.layout().by_name();
        specs.map(|(_, segment)| (segment.spec.name.clone(), segment.spec.shape.clone())).collect()
    }
}

impl<M: Method> Adapter for MethodAdapter<M> {
    fn attach(&self, sites: &[Site], params: &mut ParamLayoutBuilder) -> Result<Vec<(SiteId, Attachment)>> {
        let targets = self.common.select(sites)?;
        for site in &targets {
            require_linear::<M>(site)?;
        }
        self.method.check(&targets)?;
        let frozen = self.method.frozen(&targets)?;
        let frozen = self.frozen.get_or_init(|| frozen);
        // Shared tensors are ready when backward has passed the first target.
        let first = targets.iter().map(|site| site.execution_order).min().unwrap_or(0);
        let shared = self.method.shared().into_iter().map(|spec| {
            params.add(ParamSpec::new(files::shared_name(spec.ending), spec.shape, first))
        });
        let shared: Vec<ParamId> = shared.collect();
        targets
            .into_iter()
            .map(|site| {
                let specs = self.method.tensors(site)?.into_iter();
                let ids: Vec<ParamId> = specs
                    .map(|spec| {
                        let name = files::tensor_name(&site.name, spec.ending);
                        params.add(ParamSpec::new(name, spec.shape, site.execution_order))
                    })
                    .collect();
                let place = Place { ids: &ids, shared: &shared, frozen };
                Ok((site.id, self.method.attach(site, &place)?))
            })
            .collect()
    }

    fn init(&self, params: &mut FlatBuffer, seed: u64) -> Result<()> {
        for (name, shape) in self.endings(params) {
            let ending = M::ending(&name);
            self.method.init(ending, &shape).fill(params, &name, seed);
        }
        Ok(())
    }

    fn save(&self, params: &FlatBuffer, directory: &Path) -> Result<()> {
        let none = Frozen::default();
        let frozen = self.frozen.get().unwrap_or(&none);
        files::save(&self.method, &self.common, frozen, params, directory)
    }

    fn load(&self, params: &mut FlatBuffer, directory: &Path) -> Result<()> {
        files::load(self.frozen.get(), &self.method.saved_frozen(), params, directory)
    }

    fn describe(&self) -> String {
        self.method.describe()
    }
}

fn require_linear<M: Method>(site: &Site) -> Result<()> {
    let kind = match site.kind {
        SiteKind::Linear if site.layer.is_some() => return Ok(()),
        SiteKind::Linear => "the output head",
        SiteKind::Embedding => "an embedding",
        SiteKind::Norm => "a norm",
    };
    Err(Error::config(
        "target_modules",
        format!("`{}` is {kind}, and {} attaches to the linears of layers only; leave it out", site.name, M::PEFT_TYPE),
    ))
}
