//! Tensors that nobody trains and all targets share.

use ferrotune_kernels::cuda::CudaDevice;
use ferrotune_kernels::{Device, Tensor, View};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

/// What is made once for each GPU that asks for it.
#[derive(Debug)]
pub(crate) struct OnGpus<T> {
    first: OnceLock<Box<OnGpu<T>>>,
}

#[derive(Debug)]
struct OnGpu<T> {
    gpu: Arc<CudaDevice>,
    made: T,
    others: OnGpus<T>,
}

impl<T> Default for OnGpus<T> {
    fn default() -> Self {
        Self {
            first: OnceLock::new(),
        }
    }
}

impl<T> OnGpus<T> {
    /// What is there for `gpu`; `make` makes it.
    pub(crate) fn get(&self, gpu: &Arc<CudaDevice>, make: impl FnOnce() -> T) -> &T {
        let mut make = Some(make);
        let mut at = self;
        loop {
            let here = at.first.get_or_init(|| {
                let Some(make) = make.take() else {
                    unreachable!("what was made here is found here")
                };
                Box::new(OnGpu {
                    gpu: Arc::clone(gpu),
                    made: make(),
                    others: Self::default(),
                })
            });
            if Arc::ptr_eq(&here.gpu, gpu) {
                return &here.made;
            }
            at = &here.others;
        }
    }
}

/// A frozen tensor, in host memory and, once it was asked for there, in that of GPUs.
#[derive(Debug)]
pub(crate) struct Placed {
    host: Arc<Tensor>,
    on_gpus: OnGpus<Tensor>,
}

impl Placed {
    /// The tensor on the side of `beside`.
    pub(crate) fn beside(&self, beside: View<'_>) -> View<'_> {
        match beside.device() {
            None => self.host.view(),
            Some(gpu) => {
                let upload = || self.host.to_device(&Device::Cuda(Arc::clone(gpu)));
                self.on_gpus.get(gpu, upload).view()
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
                on_gpus: OnGpus::default(),
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
