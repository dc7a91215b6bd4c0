//! A method on top of another one: what it changes, and everything else as that one has it.

use ferrotune_core::Result;
use ferrotune_core::adapter::{Adapter, Attachment, BaseWeights, Penalty, Site, SiteId, StepDone};
use ferrotune_core::model::DecoderConfig;
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder};
use std::fmt::Debug;
use std::path::Path;

/// What is done beside the method below. Each default changes nothing.
pub trait Above: Debug + Send + Sync + 'static {
    /// Changes what the method below declared in `params` and attaches.
    ///
    /// # Errors
    /// [`ferrotune_core::Error::Config`] if that is none to stand on.
    fn attached(
        &self,
        attachments: &[(SiteId, Attachment)],
        params: &mut ParamLayoutBuilder,
    ) -> Result<()>;

    /// As [`Adapter::completes_gradients`].
    fn completes_gradients(&self) -> bool {
        false
    }

    /// Has the last word on the gradient of a step, after the method below.
    fn complete_gradients(&self, grads: &mut FlatBuffer) {
        let _ = grads;
    }

    /// As [`Adapter::preconditions`].
    fn preconditions(&self) -> bool {
        false
    }

    /// As [`Adapter::precondition`], after the method below.
    ///
    /// # Errors
    /// If a value cannot be computed.
    fn precondition(&self, params: &FlatBuffer, grads: &mut FlatBuffer) -> Result<()> {
        let _ = (params, grads);
        Ok(())
    }

    /// What logs say of it, after the method below.
    fn describe(&self) -> String;
}

/// Another method with something above it.
#[derive(Debug)]
pub struct Over<A> {
    method: Box<dyn Adapter>,
    above: A,
}

impl<A: Above> Over<A> {
    pub(crate) fn of(method: Box<dyn Adapter>, above: A) -> Self {
        Self { method, above }
    }
}

impl<A: Above> Adapter for Over<A> {
    fn decoder(&self, base: DecoderConfig) -> Result<DecoderConfig> {
        self.method.decoder(base)
    }

    fn attach(
        &self,
        sites: &[Site],
        params: &mut ParamLayoutBuilder,
    ) -> Result<Vec<(SiteId, Attachment)>> {
        let attachments = self.method.attach(sites, params)?;
        self.above.attached(&attachments, params)?;
        Ok(attachments)
    }

    fn frozen_bytes(&self) -> u64 {
        self.method.frozen_bytes()
    }

    fn saved_frozen_bytes(&self) -> u64 {
        self.method.saved_frozen_bytes()
    }

    fn prepare(&self, params: &mut FlatBuffer, base: &mut dyn BaseWeights) -> Result<()> {
        self.method.prepare(params, base)
    }

    fn init(&self, params: &mut FlatBuffer, seed: u64) -> Result<()> {
        self.method.init(params, seed)
    }

    fn plan_steps(&mut self, total_steps: u64) -> Result<()> {
        self.method.plan_steps(total_steps)
    }

    fn state(&self) -> &'static [&'static str] {
        self.method.state()
    }

    fn completes_gradients(&self) -> bool {
        self.method.completes_gradients() || self.above.completes_gradients()
    }

    fn complete_gradients(
        &self,
        params: &FlatBuffer,
        weight: f32,
        grads: &mut FlatBuffer,
    ) -> Result<Penalty> {
        let penalty = self.method.complete_gradients(params, weight, grads)?;
        self.above.complete_gradients(grads);
        Ok(penalty)
    }

    fn preconditions(&self) -> bool {
        self.method.preconditions() || self.above.preconditions()
    }

    fn precondition(&self, params: &FlatBuffer, grads: &mut FlatBuffer) -> Result<()> {
        self.method.precondition(params, grads)?;
        self.above.precondition(params, grads)
    }

    fn after_step(&self, params: &mut FlatBuffer, done: StepDone<'_>) -> Result<()> {
        self.method.after_step(params, done)
    }

    fn finish(&self, params: &mut FlatBuffer) {
        self.method.finish(params);
    }

    fn save(&self, params: &FlatBuffer, directory: &Path) -> Result<()> {
        self.method.save(params, directory)
    }

    fn load(&self, params: &mut FlatBuffer, directory: &Path) -> Result<()> {
        self.method.load(params, directory)
    }

    fn describe(&self) -> String {
        format!("{} {}", self.method.describe(), self.above.describe())
    }
}
