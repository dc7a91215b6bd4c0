//! Matrix products by cublasLt: `dst = beta * dst + alpha * op(a) op(b)` over row-major matrices.
//!
//! cublasLt thinks in columns: a row-major matrix is its transpose there, so `dst^T = op(b)^T
//! op(a)^T` is asked for, with the operands swapped. Sums are f32 always (never TF32), split sums
//! are added in f32 in a fixed order, and the algorithm of a shape is chosen once, so the bits of a
//! product do not change from call to call.

mod plan;
mod timer;

use super::bindings::CublasLt;
use super::{CudaDevice, Handle, error, library, lock};
use crate::matmul::Layout;
use crate::{DType, Result};
use cudarc::cublaslt::sys as lt;
use plan::{CANDIDATES, Plan, Shape};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fmt;
use std::sync::Mutex;
use timer::Timer;

/// Scratch memory of all products of a device.
pub const WORKSPACE: usize = 32 << 20;
/// Timed runs of one algorithm; the fastest counts.
const RUNS: usize = 3;

/// One matrix of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    /// Device address of element (0, 0).
    pub(crate) ptr: u64,
    /// Element type.
    pub(crate) dtype: DType,
    /// Elements between rows.
    pub(crate) pitch: usize,
}

impl Operand {
    /// The matrix from one of its columns on.
    pub(crate) fn at_column(self, column: usize) -> Self {
        Self {
            ptr: self.ptr + (column * self.dtype.bytes()) as u64,
            ..self
        }
    }
}

/// One product: `dst [M,N] = beta * dst + alpha * op(a) op(b)`, stored as `layout` says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gemm {
    pub(crate) layout: Layout,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
    pub(crate) a: Operand,
    pub(crate) b: Operand,
    pub(crate) dst: Operand,
}

impl fmt::Display for Gemm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { m, n, k, .. } = self;
        let layout = format!("{:?}", self.layout).to_lowercase();
        let added = if self.beta == 0.0 { "" } else { ", added" };
        let dtype = self.a.dtype;
        write!(f, "product {layout} {m} x {n} x {k} {dtype}{added}")
    }
}

/// How the algorithm of a shape is chosen when it is first used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GemmTuning {
    /// The one cublasLt expects to be fastest.
    #[default]
    Heuristic,
    /// The fastest of the first few, timed on the device. Timings vary, so two runs may choose
    /// differently: record [`CudaDevice::algorithms`] and replay them.
    Measure,
}

/// The algorithm chosen for one shape, to be stored and replayed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GemmRecord {
    shape: Shape,
    /// Version of cublasLt; another one may mean another algorithm by the same words.
    library: usize,
    device: String,
    algorithm: [u64; 8],
}

/// The products of a device.
#[derive(Default)]
pub(super) struct Gemms(Mutex<State>);

#[derive(Default)]
struct State {
    open: Option<Open>,
    plans: BTreeMap<Shape, Plan>,
    tuning: GemmTuning,
}

#[derive(Clone, Copy)]
struct Open {
    library: &'static CublasLt,
    handle: Handle,
    workspace: u64,
}

impl Gemms {
    /// Closes everything and returns the workspace, which the caller frees.
    ///
    /// # Safety
    /// No product runs or will be issued, and the context is current.
    pub(super) unsafe fn release(&self) -> Option<u64> {
        let mut state = lock(&self.0);
        state.plans.clear();
        let open = state.open.take()?;
        // SAFETY: open, closed once; the caller vouches for the rest.
        unsafe { (open.library.destroy)(open.handle.0) };
        Some(open.workspace)
    }
}

impl CudaDevice {
    /// Computes a product. Any of m, n and k may be 0; with `beta = 0` what `dst` holds is not read.
    ///
    /// # Errors
    /// If the inputs differ in dtype, or a bf16 result of f32 inputs is wanted; without libcublasLt;
    /// the first failure of the device.
    pub(crate) fn gemm(&self, gemm: &Gemm) -> Result<()> {
        self.on_own_stream("product")?;
        self.enter()?;
        if gemm.m == 0 || gemm.n == 0 {
            return Ok(());
        }
        let shape = Shape::of(gemm)?;
        if gemm.k == 0 {
            return self.scale(gemm);
        }
        self.count_launch();
        let mut state = lock(&self.gemms.0);
        let result = self.planned(&mut state, shape, gemm);
        let (open, plan) = self.record(result)?;
        let result = self.run(open, plan, gemm, gemm.dst.ptr, &plan.algorithm);
        self.record(result)?;
        self.mark(|| gemm.to_string())
    }

    /// Sets how algorithms of shapes not seen yet are chosen.
    pub fn set_gemm_tuning(&self, tuning: GemmTuning) {
        lock(&self.gemms.0).tuning = tuning;
    }

    /// The algorithms chosen so far, in order of shape.
    #[must_use]
    pub fn algorithms(&self) -> Vec<GemmRecord> {
        let state = lock(&self.gemms.0);
        let Some(open) = state.open else {
            return Vec::new();
        };
        // SAFETY: the function takes nothing.
        let library = unsafe { (open.library.version)() };
        let record = |(shape, plan): (&Shape, &Plan)| GemmRecord {
            shape: *shape,
            library,
            device: self.name().to_owned(),
            algorithm: plan.algorithm.data,
        };
        state.plans.iter().map(record).collect()
    }

    /// Uses recorded algorithms from now on; returns for how many shapes. Those of another version
    /// of cublasLt or another device model are left out, as are those that this one refuses.
    ///
    /// # Errors
    /// Without libcublasLt; the first failure of the device.
    pub fn replay(&self, records: &[GemmRecord]) -> Result<usize> {
        self.enter()?;
        let mut state = lock(&self.gemms.0);
        let open = self.record(self.opened(&mut state))?;
        // SAFETY: the function takes nothing.
        let library = unsafe { (open.library.version)() };
        let mut used = 0;
        for record in records {
            if record.library == library && record.device == self.name() {
                let mut plan = Plan::new(open.library, &record.shape)?;
                if plan.accept(open, record.algorithm) {
                    state.plans.insert(record.shape, plan);
                    used += 1;
                }
            }
        }
        Ok(used)
    }

    /// `dst = beta * dst`, as the product of two zero vectors.
    fn scale(&self, gemm: &Gemm) -> Result<()> {
        if gemm.beta.to_bits() == 1.0_f32.to_bits() {
            return Ok(());
        }
        let bytes = gemm.m.max(gemm.n) * gemm.a.dtype.bytes();
        let zeros = self.try_alloc(bytes)?;
        let vector = Operand {
            ptr: zeros,
            dtype: gemm.a.dtype,
            pitch: 1,
        };
        let scaled = self.fill_zero(zeros, bytes).and_then(|()| {
            self.gemm(&Gemm {
                layout: Layout::Nt,
                k: 1,
                alpha: 1.0,
                a: vector,
                b: vector,
                ..*gemm
            })
        });
        self.free(zeros);
        scaled
    }

    fn opened(&self, state: &mut State) -> Result<Open> {
        if let Some(open) = state.open {
            return Ok(open);
        }
        let library = library::cublaslt()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer is valid for one handle, the context is current.
        let status = unsafe { (library.create)(&mut handle) };
        error::cublaslt(library, "opening libcublasLt", status)?;
        let workspace = match self.try_alloc(WORKSPACE) {
            Ok(workspace) => workspace,
            Err(error) => {
                // SAFETY: opened above and used by nobody.
                unsafe { (library.destroy)(handle) };
                return Err(error);
            }
        };
        let open = Open {
            library,
            handle: Handle(handle),
            workspace,
        };
        state.open = Some(open);
        Ok(open)
    }

    /// The plan of `shape`, made on first use.
    fn planned<'s>(
        &self,
        state: &'s mut State,
        shape: Shape,
        gemm: &Gemm,
    ) -> Result<(Open, &'s Plan)> {
        let open = self.opened(state)?;
        if !state.plans.contains_key(&shape) {
            let mut plan = Plan::new(open.library, &shape)?;
            let measure = state.tuning == GemmTuning::Measure && !self.capture.is_active();
            let mut found = plan.candidates(open, &shape, if measure { CANDIDATES } else { 1 })?;
            if found.len() > 1 {
                let fastest = self.fastest(open, &plan, gemm, &found)?;
                found.swap(0, fastest);
            }
            plan.algorithm = found[0];
            state.plans.insert(shape, plan);
        }
        Ok((open, &state.plans[&shape]))
    }

    /// Index of the fastest algorithm, timed on a result of its own: `dst` may not change.
    fn fastest(
        &self,
        open: Open,
        plan: &Plan,
        gemm: &Gemm,
        found: &[lt::cublasLtMatmulAlgo_t],
    ) -> Result<usize> {
        let scratch =
            self.try_alloc(((gemm.m - 1) * gemm.dst.pitch + gemm.n) * gemm.dst.dtype.bytes())?;
        let timed = (0..found.len())
            .map(|i| Ok((self.time(open, plan, gemm, scratch, &found[i])?, i)))
            .collect::<Result<Vec<_>>>();
        self.free(scratch);
        let fastest = timed?.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
        Ok(fastest.map_or(0, |(_, i)| i))
    }

    /// Milliseconds of the fastest of a few runs; infinite if the algorithm does not run.
    fn time(
        &self,
        open: Open,
        plan: &Plan,
        gemm: &Gemm,
        scratch: u64,
        algorithm: &lt::cublasLtMatmulAlgo_t,
    ) -> Result<f32> {
        if self.run(open, plan, gemm, scratch, algorithm).is_err() {
            return Ok(f32::INFINITY);
        }
        let mut best = f32::INFINITY;
        for _ in 0..RUNS {
            let timer = Timer::start(self)?;
            self.run(open, plan, gemm, scratch, algorithm)?;
            best = best.min(timer.stop()?);
        }
        Ok(best)
    }

    fn run(
        &self,
        open: Open,
        plan: &Plan,
        gemm: &Gemm,
        dst: u64,
        algorithm: &lt::cublasLtMatmulAlgo_t,
    ) -> Result<()> {
        let scalar = |value: &f32| std::ptr::from_ref(value).cast::<c_void>();
        let at = |ptr: u64| ptr as *mut c_void;
        // SAFETY: handles and descriptors are open, factors are f32 on the host as described, and
        // the caller vouches for the addresses. Operands are swapped, as the module says.
        let status = unsafe {
            (open.library.matmul)(
                open.handle.0,
                plan.operation.raw,
                scalar(&gemm.alpha),
                at(gemm.b.ptr),
                plan.first.raw,
                at(gemm.a.ptr),
                plan.second.raw,
                scalar(&gemm.beta),
                at(dst),
                plan.result.raw,
                at(dst),
                plan.result.raw,
                algorithm,
                at(open.workspace),
                WORKSPACE,
                self.stream.0,
            )
        };
        if status == 0 {
            return Ok(());
        }
        error::cublaslt(open.library, &format!("{gemm:?}"), status)
    }
}
