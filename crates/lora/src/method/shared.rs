//! Tensors that nobody trains and all targets share.

use ferrotune_kernels::Tensor;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Frozen tensors by their name on disk behind `base_model.`, in host memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Frozen {
    tensors: BTreeMap<&'static str, Arc<Tensor>>,
}

impl Frozen {
    pub(crate) fn new(tensors: impl IntoIterator<Item = (&'static str, Arc<Tensor>)>) -> Self {
        Self {
            tensors: tensors.into_iter().collect(),
        }
    }

    /// The tensor called `name`.
    ///
    /// # Panics
    /// If the method did not make it.
    pub(crate) fn get(&self, name: &str) -> Arc<Tensor> {
        Arc::clone(
            self.tensors
                .get(name)
                .expect("a method asks for what it made"),
        )
    }
}
