//! Tensors that nobody trains and all targets share.

use ferrotune_kernels::{Device, Tensor, View};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

/// A frozen tensor, in host memory and, once it was asked for there, in a GPU's.
#[derive(Debug)]
pub(crate) struct Placed {
    host: Arc<Tensor>,
    on_gpu: OnceLock<Tensor>,
}

impl Placed {
    /// The tensor on the side of `beside`.
    pub(crate) fn beside(&self, beside: View<'_>) -> View<'_> {
        match beside.device() {
            None => self.host.view(),
            Some(gpu) => {
                let upload = || self.host.to_device(&Device::Cuda(Arc::clone(gpu)));
                self.on_gpu.get_or_init(upload).view()
            }
        }
    }
}

/// Frozen tensors by their name on disk behind `base_model.`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Frozen {
    tensors: BTreeMap<&'static str, Arc<Placed>>,
}

impl Frozen {
    pub(crate) fn new(tensors: impl IntoIterator<Item = (&'static str, Arc<Tensor>)>) -> Self {
        let placed = |host| {
            Arc::new(Placed {
                host,
                on_gpu: OnceLock::new(),
            })
        };
        let tensors = tensors.into_iter().map(|(name, host)| (name, placed(host)));
        Self {
            tensors: tensors.collect(),
        }
    }

    /// Bytes of all of them.
    pub(crate) fn bytes(&self) -> u64 {
        self.tensors.keys().map(|name| self.bytes_of(name)).sum()
    }

    /// Bytes of the tensor called `name`.
    ///
    /// # Panics
    /// If the method did not make it.
    pub(crate) fn bytes_of(&self, name: &str) -> u64 {
        let host = self.get(name);
        (host.rows() * host.cols() * host.dtype().bytes()) as u64
    }

    /// The tensor called `name`, in host memory.
    ///
    /// # Panics
    /// If the method did not make it.
    pub(crate) fn get(&self, name: &str) -> Arc<Tensor> {
        Arc::clone(&self.placed(name).host)
    }

    /// The tensor called `name`, wherever it is needed.
    ///
    /// # Panics
    /// If the method did not make it.
    pub(crate) fn placed(&self, name: &str) -> Arc<Placed> {
        let placed = self.tensors.get(name);
        Arc::clone(placed.expect("a method asks for what it made"))
    }
}
