//! Tensors that nobody trains and all targets share.

use ferrotune_kernels::Tensor;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Frozen tensors by their name on disk behind `base_model.`, in host memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Frozen {
    tensors: BTreeMap<&'static str, Arc<Tensor>>,
    /// Whether they are written with the adapter.
    pub(crate) saved: bool,
}

impl Frozen {
    pub(crate) fn new(saved: bool, tensors: impl IntoIterator<Item = (&'static str, Arc<Tensor>)>) -> Self {
        let tensors = tensors.into_iter().collect();
        Self { tensors, saved }
    }

    /// The tensor called `name`.
    ///
    /// # Panics
    /// If the method did not make it.
    pub(crate) fn get(&self, name: &str) -> Arc<Tensor> {
        Arc::clone(self.tensors.get(name).expect("a method asks for what it made"))
    }

    /// Those written with the adapter.
    pub(crate) fn to_save(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let tensors = self.tensors.iter().filter(|_| self.saved);
        tensors.map(|(name, tensor)| (*name, tensor.as_ref()))
    }
}
