//! The process group: NCCL for what lies on the GPU, a host group for everything else.

use super::buckets::Buckets;
use super::communicator::{AbortHandle, Communicator, Shared};
use super::ffi::{UNIQUE_ID_BYTES, UniqueId};
use super::library::{self, LIBRARY_VARIABLE, Library, Version};
use super::worker::Operation;
use crate::agreement::Header;
use crate::tcp;
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::process_group::ProcessGroup;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::Device;
use ferrotune_kernels::cuda::CudaDevice;
use std::env;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How NCCL is used.
#[derive(Clone, Debug)]
pub struct NcclOptions {
    /// `libnccl.so.2`, or the folder it lies in. `None`: `FERROTUNE_NCCL_LIBRARY`, else where it is usually
    /// found.
    pub library: Option<PathBuf>,
    /// Longest wait for peers: to join, and for each collective.
    pub timeout: Duration,
    /// Bytes of a bucket, the unit in which gradients are summed. The same on every rank; sums of more than
    /// two ranks have other bits for another size.
    pub bucket_bytes: usize,
    /// What learns first that a peer is lost; then collectives in progress are aborted. `None`: they end by the
    /// timeout, or by what NCCL notices itself.
    pub peers: Option<tcp::AbortHandle>,
}

impl Default for NcclOptions {
    /// Ten minutes, as long as ranks wait for each other at the start; 25 MB, as in PyTorch's DDP.
    fn default() -> Self {
        Self {
            library: None,
            timeout: Duration::from_secs(600),
            bucket_bytes: 25 << 20,
            peers: None,
        }
    }
}

/// One rank of a group that sums on GPUs.
///
/// Buffers at home on the CPU, counts, steps and barriers go through the host group it was made of. Before
/// a collective, ranks exchange what they are about to do, so a divergence is an error and no hang.
#[derive(Debug)]
pub struct Nccl {
    // Before the host group, which peers watch: what it says comes last.
    communicator: Communicator,
    host: Box<dyn ProcessGroup>,
    device: Arc<CudaDevice>,
    version: Version,
    /// Elements of a bucket.
    bucket: usize,
    /// Collectives begun.
    sequence: u64,
    /// Calls that ranks have agreed on.
    calls: u64,
    /// Optimizer step, from 0.
    step: u64,
    /// Address of the buffer whose sum has begun, and how far it is.
    reducing: Option<(u64, Buckets)>,
}

impl Nccl {
    /// Joins all ranks of `host`, each with its own GPU.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Kernel`] (exit code 78) if a rank has no GPU or no usable library, with
    /// every path tried, or if ranks have different releases of NCCL; [`Error::Transient`] if a rank does not
    /// arrive in time, or NCCL fails. If one rank fails, all do.
    pub fn new(
        mut host: Box<dyn ProcessGroup>,
        device: &Device,
        options: NcclOptions,
    ) -> Result<Self> {
        let rank = host.rank();
        let prepared = prepare(rank, device, options.library);
        let introduction = match &prepared {
            Ok((library, _, id)) => {
                let mut bytes = library.version.0.to_le_bytes().to_vec();
                bytes.extend(id.0);
                bytes
            }
            // A rank that cannot go on says why, so that nobody waits for it.
            Err(error) => {
                let mut bytes = 0_u32.to_le_bytes().to_vec();
                bytes.extend(error.to_string().into_bytes());
                bytes
            }
        };
        let all = host.all_gather(&introduction);
        let (library, device, _) = prepared?;
        let id = compare(rank, library.version, &all?)?;
        let version = library.version;
        let shared = Shared::new(rank, host.world_size(), options.timeout, options.peers);
        Ok(Self {
            communicator: Communicator::join(library, &device, id, shared)?,
            host,
            device,
            version,
            bucket: options.bucket_bytes / size_of::<f32>(),
            sequence: 0,
            calls: 0,
            step: 0,
            reducing: None,
        })
    }

    /// The release of NCCL.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Aborts the group from another thread.
    #[must_use]
    pub fn abort_handle(&self) -> AbortHandle {
        self.communicator.abort_handle()
    }

    #[cfg(test)]
    pub(super) fn communicator(&self) -> &Communicator {
        &self.communicator
    }

    /// Address of a buffer at home on this GPU; `None` if its home is the CPU.
    fn address(&self, buffer: &mut FlatBuffer) -> Result<Option<u64>> {
        match buffer.device() {
            Device::Cpu => Ok(None),
            Device::Cuda(device) if Arc::ptr_eq(device, &self.device) => {
                // An allocation that failed is reported here, and has no address.
                let address = buffer.home_mut().device_address();
                self.device.check()?;
                Ok(address)
            }
            Device::Cuda(device) => {
                let ours = Device::Cuda(Arc::clone(&self.device));
                let theirs = Device::Cuda(Arc::clone(device));
                Err(Error::config(
                    "device",
                    format!("a buffer on {theirs} cannot be reduced by a group on {ours}"),
                ))
            }
        }
    }

    fn begin(&mut self, operation: Operation, address: u64, range: &Range<usize>) -> Result<()> {
        let place = (self.sequence, self.step);
        self.sequence += 1;
        let start = address + (range.start * size_of::<f32>()) as u64;
        self.communicator
            .begin(&self.device, operation, start, range.len(), place)
    }

    /// Begins the sum of the buckets of `range` that are complete with it.
    fn reduce(&mut self, address: u64, len: usize, range: &Range<usize>) -> Result<()> {
        let fresh = (address, Buckets::new(len, self.bucket));
        let (begun_at, mut buckets) = self.reducing.take().unwrap_or(fresh);
        if begun_at != address || buckets.len() != len {
            let why = "reduce_ready spoke of another buffer than all_reduce";
            self.communicator.abort(why);
            let message = format!("rank {}: {why}", self.rank());
            return Err(Error::Numeric { message });
        }
        buckets.ready(range);
        while let Some(bucket) = buckets.next() {
            self.begin(Operation::AllReduce, address, &bucket)?;
        }
        self.reducing = Some((address, buckets));
        Ok(())
    }

    /// Exchanges what this rank is about to do, and `totals`, which become their sums in rank order.
    fn agree(&mut self, what: &str, len: usize, totals: &mut [f64]) -> Result<()> {
        let header = Header {
            what: what.into(),
            call: self.calls,
            step: self.step,
            len: len as u64,
            bucket: self.bucket as u64,
        };
        self.calls += 1;
        let exchanged = header.exchange(self.host.as_mut(), totals);
        if let Err(error) = &exchanged {
            self.communicator.abort(&error.to_string());
        }
        exchanged
    }
}

impl ProcessGroup for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn world_size(&self) -> usize {
        self.host.world_size()
    }

    fn begin_step(&mut self, step: u64, stop: bool) -> Result<bool> {
        self.step = step;
        self.host.begin_step(step, stop)
    }

    fn all_reduce(&mut self, buffer: &mut FlatBuffer, totals: &mut [f64]) -> Result<()> {
        let Some(address) = self.address(buffer)? else {
            return self.host.all_reduce(buffer, totals);
        };
        let len = buffer.layout().len();
        self.reduce(address, len, &(0..len))?;
        self.reducing = None;
        self.agree("all_reduce", len, totals)?;
        self.communicator.wait()
    }

    fn reduce_ready(&mut self, gradients: &mut FlatBuffer, range: Range<usize>) -> Result<()> {
        match self.address(gradients)? {
            Some(address) => self.reduce(address, gradients.layout().len(), &range),
            None => self.host.reduce_ready(gradients, range),
        }
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.host.all_gather(bytes)
    }

    fn broadcast(&mut self, buffer: &mut FlatBuffer) -> Result<()> {
        let Some(address) = self.address(buffer)? else {
            return self.host.broadcast(buffer);
        };
        let len = buffer.layout().len();
        self.agree("broadcast", len, &mut [])?;
        if len > 0 {
            self.begin(Operation::Broadcast, address, &(0..len))?;
        }
        self.communicator.wait()
    }

    fn sum_totals(&mut self, totals: &mut [f64]) -> Result<()> {
        self.host.sum_totals(totals)
    }

    fn barrier(&mut self) -> Result<()> {
        self.host.barrier()
    }
}

/// What a rank needs of its own before it can join.
fn prepare(
    rank: usize,
    device: &Device,
    library: Option<PathBuf>,
) -> Result<(Library, Arc<CudaDevice>, UniqueId)> {
    let Device::Cuda(device) = device else {
        return Err(Error::config(
            "device",
            "NCCL sums on GPUs, and this rank computes on the CPU; ranks on CPUs use the TCP group",
        ));
    };
    let given = library.or_else(|| env::var_os(LIBRARY_VARIABLE).map(PathBuf::from));
    let library = library::open(given)?;
    device.make_current()?;
    // Rank 0's is taken; others need not listen for anybody.
    let id = match rank {
        0 => library.unique_id().map_err(|message| Error::Transient {
            message: format!("rank 0: {message}"),
        })?,
        _ => UniqueId([0; UNIQUE_ID_BYTES]),
    };
    Ok((library, Arc::clone(device), id))
}

/// The id of rank 0, if every rank can go on, with the same release.
fn compare(rank: usize, version: Version, all: &[Vec<u8>]) -> Result<UniqueId> {
    let mut id = UniqueId([0; UNIQUE_ID_BYTES]);
    for (peer, bytes) in all.iter().enumerate() {
        let (code, rest) = bytes.split_at_checked(4).unwrap_or((&[0; 4], &[]));
        let theirs = Version(bytemuck::pod_read_unaligned(code));
        if theirs == Version(0) {
            let why = String::from_utf8_lossy(rest);
            let message = format!("rank {peer} cannot use NCCL: {why}");
            return Err(Error::config("device", message));
        }
        if theirs != version {
            let message = format!(
                "rank {rank} has NCCL {version}, rank {peer} has {theirs}; install the same release for all"
            );
            return Err(Error::config("device", message));
        }
        if peer == 0 && rest.len() == UNIQUE_ID_BYTES {
            id.0.copy_from_slice(rest);
        }
    }
    Ok(id)
}
