//! A [`Method`] as core's [`Adapter`].

use super::{Common, Frozen, Keys, Method, Place, Source, Target, files};
use crate::beside::Whole;
use ferrotune_core::adapter::{
    Adapter, Attachment, BaseWeights, Penalty, Site, SiteId, SiteKind, StepDone,
};
use ferrotune_core::params::{FlatBuffer, ParamId, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::Path;
use std::sync::OnceLock;

/// A method with its configuration, before it knows its base.
pub(crate) trait Configured: Debug + Send + Sync {
    /// The base it was trained on, as its file says.
    fn base_model_name_or_path(&self) -> Option<&str>;
    fn clone_box(&self) -> Box<dyn Configured>;
    fn into_adapter(self: Box<Self>, model_type: &str) -> Result<Box<dyn Adapter>>;
    /// For a base of this name.
    fn for_base(self: Box<Self>, base: &Path) -> Box<dyn Configured>;
    /// For a task of PEFT's.
    fn for_task(self: Box<Self>, task: &str) -> Box<dyn Configured>;
}

/// Reads the configuration of `M`.
pub(crate) fn configure<M: Method>(
    source: Source<'_>,
    object: &Map<String, Value>,
) -> Result<Box<dyn Configured>> {
    let mut keys = Keys::new(source, object);
    let common = Common::read::<M>(&mut keys)?;
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
    pub(super) targets: Vec<Target>,
    /// Names of the parameters that are parts of the base.
    pub(super) of_base: BTreeSet<String>,
}

impl<M: Method> Configured for MethodAdapter<M> {
    fn base_model_name_or_path(&self) -> Option<&str> {
        self.common.base_model_name_or_path.as_deref()
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

    fn for_task(mut self: Box<Self>, task: &str) -> Box<dyn Configured> {
        self.common.for_task(task);
        self
    }
}

impl<M: Method> Adapter for MethodAdapter<M> {
    fn attach(
        &self,
        sites: &[Site],
        params: &mut ParamLayoutBuilder,
    ) -> Result<Vec<(SiteId, Attachment)>> {
        let whole = self.common.whole(sites)?;
        let targets = self.common.select(sites, &whole)?;
        for site in &targets {
            require_linear::<M>(site)?;
        }
        require_untied::<M>(&whole, &targets)?;
        self.method.check(&targets)?;
        let frozen = self.method.frozen(&targets)?;
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
        let targets = targets.into_iter().map(|site| {
            Ok(Target {
                site: site.clone(),
                ids: self.add_tensors(site, params)?,
            })
        });
        let targets: Vec<Target> = targets.collect::<Result<_>>()?;
        let own = params.specs_mut().len();
        let adapted = targets.iter().map(|target| target.site.id).collect();
        let beside = whole.attach(self.common.bias, &adapted, params);
        let of_base = params.specs_mut()[own..].iter().map(|s| s.name.clone());
        let of_base = of_base.collect();
        let attached = self
            .attached
            .get_or_init(|| Attached::new(frozen, targets.clone(), of_base));
        let attachments = targets.iter().map(|target| {
            let place = Place {
                ids: &target.ids,
                shared: &shared,
                frozen: &attached.frozen,
            };
            let attachment = self.method.attach(&target.site, &place)?;
            Ok((target.site.id, attachment))
        });
        attachments.chain(beside.into_iter().map(Ok)).collect()
    }

    fn frozen_bytes(&self) -> u64 {
        let attached = self.attached.get();
        attached.map_or(0, |attached| attached.frozen.bytes())
    }

    fn saved_frozen_bytes(&self) -> u64 {
        let attached = self.attached.get();
        let saved = self.method.saved_frozen();
        let of = |attached: &Attached| {
            saved
                .iter()
                .map(|name| attached.frozen.bytes_of(name))
                .sum()
        };
        attached.map_or(0, of)
    }

    fn init(&self, params: &mut FlatBuffer, seed: u64) -> Result<()> {
        let layout = params.layout().clone();
        for (_, segment) in layout.by_name() {
            let (name, shape) = (&segment.spec.name, &segment.spec.shape);
            if !self.is_of_base(name) {
                self.method.init(name, shape).fill(params, name, seed);
            }
        }
        Ok(())
    }

    fn prepare(&self, params: &mut FlatBuffer, base: &mut dyn BaseWeights) -> Result<()> {
        if !self.method.uses_base() {
            return Ok(());
        }
        for Target { site, ids } in self.targets() {
            let weight = base.read(site.id)?;
            let values = self.method.base_values(site, weight.view())?;
            for (id, values) in ids.iter().zip(values) {
                if let Some(values) = values {
                    params.get_mut(*id).copy_from_slice(&values);
                }
            }
        }
        Ok(())
    }

    fn plan_steps(&mut self, total_steps: u64) -> Result<()> {
        self.method.plan_steps(total_steps)
    }

    fn state(&self) -> &'static [&'static str] {
        self.method.state()
    }

    fn completes_gradients(&self) -> bool {
        self.method.completes_gradients()
    }

    fn complete_gradients(
        &self,
        params: &FlatBuffer,
        weight: f32,
        grads: &mut FlatBuffer,
    ) -> Result<Penalty> {
        self.method
            .complete_gradients(self.targets(), params, weight, grads)
    }

    fn after_step(&self, params: &mut FlatBuffer, done: StepDone<'_>) -> Result<()> {
        self.method.after_step(self.targets(), params, done)
    }

    fn finish(&self, params: &mut FlatBuffer) {
        self.method.finish(self.targets(), params);
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
        files::load(
            &self.method,
            &self.common,
            self.attached.get(),
            params,
            directory,
        )
    }

    fn describe(&self) -> String {
        self.method.describe()
    }
}

impl<M: Method> MethodAdapter<M> {
    /// Declares what is trained at `site`.
    fn add_tensors(&self, site: &Site, params: &mut ParamLayoutBuilder) -> Result<Vec<ParamId>> {
        let specs = self.method.tensors(site)?.into_iter();
        let ids = specs.map(|spec| {
            let name = files::tensor_name(&site.name, spec.ending);
            let mut param = ParamSpec::new(name, spec.shape, site.execution_order);
            if !spec.trained {
                (param.lr_scale, param.weight_decay) = (0.0, false);
            }
            params.add(param)
        });
        Ok(ids.collect())
    }

    /// Whether a parameter is a part of the base, whose values it starts from.
    fn is_of_base(&self, name: &str) -> bool {
        let attached = self.attached.get();
        attached.is_some_and(|attached| attached.of_base.contains(name))
    }

    /// What is adapted; nothing before the adapter is attached.
    fn targets(&self) -> &[Target] {
        self.attached
            .get()
            .map_or(&[], |attached| &attached.targets)
    }
}

impl Attached {
    fn new(frozen: Frozen, targets: Vec<Target>, of_base: BTreeSet<String>) -> Self {
        let ends = targets
            .iter()
            .filter_map(|target| target.site.name.rsplit('.').next());
        let names: BTreeSet<String> = ends.map(str::to_owned).collect();
        Self {
            frozen,
            names: names.into_iter().collect(),
            targets,
            of_base,
        }
    }
}

/// Refuses an update of a head that is to stay one weight with its embedding, which cannot have it.
fn require_untied<M: Method>(whole: &Whole<'_>, targets: &[&Site]) -> Result<()> {
    let pair = whole.pair.as_ref();
    match pair.filter(|pair| targets.iter().any(|site| site.id == pair.head.id)) {
        None => Ok(()),
        Some(pair) => Err(Error::config(
            "ensure_weight_tying",
            format!(
                "true keeps `{}` and `{}` one weight, and {} has no update of an embedding; leave the head out of \
                 `target_modules`, or this off",
                pair.embedding.name,
                pair.head.name,
                M::PEFT_TYPE
            ),
        )),
    }
}

fn require_linear<M: Method>(site: &Site) -> Result<()> {
    let kind = match site.kind {
        SiteKind::Linear => return Ok(()),
        SiteKind::Embedding => "an embedding",
        SiteKind::Norm => "a norm",
    };
    Err(Error::config(
        "target_modules",
        format!(
            "`{}` is {kind}, and {} attaches to linears only; leave it out",
            site.name,
            M::PEFT_TYPE
        ),
    ))
}
