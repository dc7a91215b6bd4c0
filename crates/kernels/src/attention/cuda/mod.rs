//! Launches the kernels, which are compiled for the narrowest of four widths that holds a head.

#![expect(
    clippy::needless_pass_by_value,
    reason = "a mutable view is exclusive: whoever launches on it owns it"
)]

mod hopper;
#[cfg(test)]
mod tests;

pub(crate) use hopper::MODULES as HOPPER_MODULES;
#[cfg(test)]
pub(crate) use hopper::for_tests::with_each;

use super::Config;
use crate::cuda::rows::{Access, Matrix, count};
use crate::cuda::{CudaDevice, Grid, Module};
use crate::{DType, Error, Indices, Result, View, ViewMut, Workspace};
use std::sync::Arc;

/// The kernels with tiles of `$width` columns.
macro_rules! module {
    ($name:literal, $width:literal) => {
        Module {
            name: $name,
            source: concat!(
                "#define WIDTH ",
                $width,
                "\n#line 1 \"attention/work.cuh\"\n",
                include_str!("work.cuh"),
                "#line 1 \"attention/mma.cuh\"\n",
                include_str!("mma.cuh"),
                "#line 1 \"attention/fma.cuh\"\n",
                include_str!("fma.cuh"),
                "#line 1 \"attention/forward.cuh\"\n",
                include_str!("forward.cuh"),
                "#line 1 \"attention/backward.cuh\"\n",
                include_str!("backward.cuh"),
                "#line 1 \"attention/kernel.cu\"\n",
                include_str!("kernel.cu"),
            ),
        }
    };
}

pub(crate) static MODULES: [(u32, Module); 4] = [
    (64, module!("attention_64", "64")),
    (96, module!("attention_96", "96")),
    (128, module!("attention_128", "128")),
    (256, module!("attention_256", "256")),
];

/// Threads of a team.
const THREADS: u32 = 128;
/// Most blocks in y.
const MAX_BLOCKS_Y: usize = 65_535;

/// `struct Attention` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    q: Matrix,
    k: Matrix,
    v: Matrix,
    out: Matrix,
    d_out: Matrix,
    d_qkv: Matrix,
    lse: u64,
    delta: u64,
    cu_q: u64,
    cu_k: u64,
    sequences: u32,
    queries: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    window: u32,
    scale: f32,
    softcap: f32,
    packed: u32,
    never: u32,
}

/// How a block is made: its own rows, the tiles it keeps of these, and tiles of `columns` rows that stream
/// past them, in shared memory.
#[derive(Clone, Copy)]
struct Tiles {
    rows: u32,
    kept: u32,
    columns: u32,
    streamed: u32,
    threads: u32,
}

/// What multiplies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Engine {
    /// No tensor cores, exact to f32.
    Fma,
    /// `mma.sync`, for bf16.
    Mma,
    /// `wgmma`, for bf16 on Hopper.
    Wgmma,
    /// The same, with tiles that the copy engine brings.
    Tma,
}

/// Which kernels run: those of one width and engine.
struct Kernels {
    /// That of kernels without products, and of all engines but Hopper's.
    module: &'static Module,
    width: u32,
    engine: Engine,
}

impl Kernels {
    fn new(
        op: &'static str,
        device: &CudaDevice,
        head_dim: usize,
        matrices: &[View<'_>],
    ) -> Result<Self> {
        let fits = MODULES
            .iter()
            .find(|(width, _)| head_dim <= *width as usize);
        let Some((width, module)) = fits else {
            let message = format!("heads of width {head_dim}; on a GPU at most 256");
            return Err(Error::Invalid { op, message });
        };
        let bf16 = matrices.iter().all(|m| m.dtype() == DType::Bf16);
        let engine = match bf16 {
            false => Engine::Fma,
            true if hopper::module(*width).is_some() => hopper::wanted(op, device)?,
            true => Engine::Mma,
        };
        Ok(Self {
            module,
            width: *width,
            engine,
        })
    }

    /// As in kernel.cu. A newer GPU may stream smaller tiles.
    fn forward(&self) -> Tiles {
        let (rows, columns) = match (self.engine, self.width) {
            (Engine::Wgmma | Engine::Tma, width) => return hopper::forward(width),
            (Engine::Fma, _) => (16, 16),
            (Engine::Mma, 128) => (128, 48),
            (Engine::Mma, ..=128) => (128, 64),
            (Engine::Mma, _) => (64, 32),
        };
        Tiles {
            rows,
            kept: 1,
            columns,
            streamed: 4,
            threads: THREADS,
        }
    }

    fn backward(&self, rows: u32) -> Tiles {
        let (rows, columns, stages) = match (self.engine, self.width) {
            (Engine::Fma, _) => (16, 16, 2),
            (_, ..=128) => (rows, 32, 2),
            (_, _) => (rows, 32, 1),
        };
        Tiles {
            rows,
            kept: 2,
            columns,
            streamed: 2 * stages,
            threads: THREADS,
        }
    }

    fn backward_q(&self) -> Tiles {
        match self.engine {
            Engine::Wgmma | Engine::Tma => hopper::backward_q(self.width),
            _ => self.backward(if self.width <= 128 { 128 } else { 64 }),
        }
    }

    fn backward_kv(&self) -> Tiles {
        if matches!(self.engine, Engine::Wgmma | Engine::Tma) {
            return hopper::backward_kv(self.width);
        }
        let tiles = self.backward(if self.width <= 64 { 128 } else { 64 });
        if self.engine == Engine::Fma || self.width > 128 {
            return tiles;
        }
        // Two teams, each with tiles of its own that stream past it.
        Tiles {
            streamed: 2 * tiles.streamed,
            threads: 2 * THREADS,
            ..tiles
        }
    }

    /// Launches `kernel` for every head and every block of rows; the kernel finds the sequence of a
    /// block in the bounds. The forward pass counts the padding after the last as one more sequence, so
    /// that grids depend on numbers of rows and sequences alone.
    fn launch(
        &self,
        op: &'static str,
        device: &CudaDevice,
        kernel: &str,
        tiles: Tiles,
        [heads, passes]: [u32; 2],
        arguments: &Arguments<'_>,
    ) -> Result<()> {
        let params = &arguments.params;
        let rows = params.queries;
        let sequences = params.sequences + u32::from(kernel == "forward");
        let blocks = match rows.min(sequences) {
            0 => 0,
            _ => rows / tiles.rows + sequences,
        };
        if blocks as usize > MAX_BLOCKS_Y {
            let message = format!(
                "{rows} queries in {} sequences are more than one launch holds; split the batch",
                params.sequences
            );
            return Err(Error::Invalid { op, message });
        }
        let (module, engine, pitch, more) = match self.engine {
            Engine::Fma => (self.module, "f32", 4 * (self.width + 1), 0),
            Engine::Mma => (self.module, "bf16", 2 * self.width, 0),
            Engine::Wgmma | Engine::Tma => {
                let module = hopper::module(self.width).unwrap_or(self.module);
                (module, "wgmma", 2 * self.width, hopper::ALIGNMENT)
            }
        };
        let shared = (tiles.kept * tiles.rows + tiles.streamed * tiles.columns) * pitch + more;
        let grid = Grid::new([heads, blocks, passes], tiles.threads).with_shared(shared);
        if self.engine == Engine::Tma && hopper::can_be_mapped(arguments) && blocks > 0 {
            let mapped = hopper::mapped(device, arguments, kernel, tiles)?;
            return device.launch(module, &format!("attention_{kernel}_tma"), grid, &mapped);
        }
        let kernel = format!("attention_{kernel}_{engine}");
        device.launch(module, &kernel, grid, params)
    }
}

/// Matrices of a pass, those of the backward pass alone in the second half.
struct Matrices<'a> {
    inputs: [View<'a>; 3],
    out: View<'a>,
    gradients: Option<[View<'a>; 2]>,
}

/// What the kernels of a pass are given.
struct Arguments<'a> {
    params: Params,
    matrices: Matrices<'a>,
}

impl<'a> Matrices<'a> {
    fn arguments(
        self,
        config: &Config,
        lse: u64,
        cu_q: &Indices<'_>,
        cu_k: &Indices<'_>,
    ) -> Arguments<'a> {
        let [q, k, v] = self.inputs.map(Matrix::of);
        let out = Matrix::of(self.out);
        let [d_out, d_qkv] = self.gradients.map_or([out; 2], |both| both.map(Matrix::of));
        let matrices = [q, k, v, out, d_out, d_qkv];
        let access = Access::of(&matrices, &[], &[config.head_dim]);
        let params = Params {
            q,
            k,
            v,
            out,
            d_out,
            d_qkv,
            lse,
            delta: 0,
            cu_q: cu_q.ptr(),
            cu_k: cu_k.ptr(),
            sequences: count(cu_q.len() - 1),
            queries: count(self.inputs[0].rows()),
            heads: count(config.heads),
            kv_heads: count(config.kv_heads),
            head_dim: count(config.head_dim),
            window: config
                .window
                .map_or(u32::MAX, |window| u32::try_from(window).unwrap_or(u32::MAX)),
            scale: config.scale,
            softcap: config.softcap.unwrap_or(0.0),
            packed: u32::from(access == Access::Bf16),
            never: 0,
        };
        Arguments {
            params,
            matrices: self,
        }
    }
}

pub(super) fn forward(
    op: &'static str,
    device: &CudaDevice,
    config: &Config,
    inputs: [View<'_>; 3],
    [cu_q, cu_k]: [&Indices<'_>; 2],
    out: ViewMut<'_>,
    lse: ViewMut<'_>,
) -> Result<()> {
    let matrices = Matrices {
        inputs,
        out: out.as_view(),
        gradients: None,
    };
    let [q, k, v] = inputs;
    let kernels = Kernels::new(op, device, config.head_dim, &[q, k, v, matrices.out])?;
    let arguments = matrices.arguments(config, lse.ptr(), cu_q, cu_k);
    let grid = [arguments.params.heads, 1];
    let tiles = kernels.forward();
    kernels.launch(op, device, "forward", tiles, grid, &arguments)
}

/// What the forward pass left, and the gradient of its output.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a> {
    pub(super) out: View<'a>,
    pub(super) lse: View<'a>,
    pub(super) d_out: View<'a>,
}

pub(super) fn backward(
    op: &'static str,
    device: &Arc<CudaDevice>,
    config: &Config,
    inputs: [View<'_>; 3],
    saved: &Saved<'_>,
    cu_seqlens: &Indices<'_>,
    (d_qkv, workspace): (ViewMut<'_>, &Workspace),
) -> Result<()> {
    let ([q, k, v], Saved { out, d_out, .. }) = (inputs, *saved);
    let matrices = Matrices {
        inputs,
        out,
        gradients: Some([d_out, d_qkv.as_view()]),
    };
    let all = [q, k, v, out, d_out, d_qkv.as_view()];
    let kernels = Kernels::new(op, device, config.head_dim, &all)?;
    let delta = workspace.take(DType::F32, saved.lse.rows(), config.heads);
    let mut arguments = matrices.arguments(config, saved.lse.ptr(), cu_seqlens, cu_seqlens);
    arguments.params.delta = delta.view().ptr();
    let params = &arguments.params;

    // Eight threads for each head of each query.
    let threads = 8 * params.queries as usize * config.heads;
    let grid = Grid::new(count(threads.div_ceil(THREADS as usize)), THREADS);
    device.launch(kernels.module, "attention_backward_delta", grid, params)?;
    let grid = [params.heads, 1];
    kernels.launch(
        op,
        device,
        "backward_q",
        kernels.backward_q(),
        grid,
        &arguments,
    )?;
    // dk and dv together fill the registers beyond a width of 128: one pass each.
    let wide = kernels.engine != Engine::Fma && kernels.width > 128;
    let passes = if wide { 2 } else { 1 };
    let grid = [params.kv_heads, passes];
    kernels.launch(
        op,
        device,
        "backward_kv",
        kernels.backward_kv(),
        grid,
        &arguments,
    )?;
    workspace.give(delta);
    Ok(())
}
