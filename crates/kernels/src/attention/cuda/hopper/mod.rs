//! Attention by products of warpgroups, `wgmma`, which compute capability 9.0 alone has.
//!
//! Tiles come by copies of 16 bytes that threads make, or as boxes that the copy engine brings (TMA).
//!
//! Compiled, and right where `host/` runs it; no run on a GPU has timed it, so it is used only where
//! `FERROTUNE_ATTENTION` is `wgmma` or `tma`.

#[cfg(test)]
mod tests;

use super::{Arguments, Engine, Params, THREADS, Tiles};
use crate::cuda::{BoxedTensor, CudaDevice, Module, TensorMap};
use crate::{Error, Result, View};
use std::env;
use std::sync::LazyLock;

/// Environment variable that chooses the attention kernels of bf16: `wgmma`, `tma`, or `mma`, the default.
const VARIABLE: &str = "FERROTUNE_ATTENTION";
const CAPABILITY: (u32, u32) = (9, 0);
/// Bytes of shared memory beside the tiles, which start on a multiple of it.
pub(super) const ALIGNMENT: u32 = 1024;

/// The kernels with tiles of `$width` columns.
macro_rules! module {
    ($name:literal, $width:literal) => {
        Module {
            name: $name,
            source: concat!(
                "#define WIDTH ",
                $width,
                "\n#line 1 \"attention/work.cuh\"\n",
                include_str!("../work.cuh"),
                "#line 1 \"attention/mma.cuh\"\n",
                include_str!("../mma.cuh"),
                "#line 1 \"attention/forward.cuh\"\n",
                include_str!("../forward.cuh"),
                "#line 1 \"attention/backward.cuh\"\n",
                include_str!("../backward.cuh"),
                "#line 1 \"attention/hopper/engine.cuh\"\n",
                include_str!("engine.cuh"),
                "#line 1 \"attention/hopper/loads.cuh\"\n",
                include_str!("loads.cuh"),
                "#line 1 \"attention/hopper/forward.cuh\"\n",
                include_str!("forward.cuh"),
                "#line 1 \"attention/hopper/backward.cuh\"\n",
                include_str!("backward.cuh"),
                "#line 1 \"attention/hopper/kernel.cu\"\n",
                include_str!("kernel.cu"),
            ),
        }
    };
}

pub(crate) static MODULES: [(u32, Module); 2] = [
    (64, module!("attention_hopper_64", "64")),
    (128, module!("attention_hopper_128", "128")),
];

/// The kernels of a width, if there are any.
pub(super) fn module(width: u32) -> Option<&'static Module> {
    let mut modules = MODULES.iter();
    modules
        .find(|(of, _)| *of == width)
        .map(|(_, module)| module)
}

/// Which kernels are to be used for bf16 on `device`, for the widths there are here.
pub(super) fn wanted(op: &'static str, device: &CudaDevice) -> Result<Engine> {
    #[cfg(test)]
    if let Some(forced) = for_tests::FORCED.get() {
        return Ok(forced);
    }
    static VALUE: LazyLock<String> = LazyLock::new(|| env::var(VARIABLE).unwrap_or_default());
    let message = match (VALUE.as_str(), device.compute_capability()) {
        ("" | "mma", _) => return Ok(Engine::Mma),
        ("wgmma", CAPABILITY) => return Ok(Engine::Wgmma),
        ("tma", CAPABILITY) => return Ok(Engine::Tma),
        (value @ ("wgmma" | "tma"), (major, minor)) => format!(
            "{VARIABLE} is `{value}`, which only compute capability 9.0 has; {} has {major}.{minor}: \
             take `mma`",
            device.name()
        ),
        (other, _) => format!("{VARIABLE} is {other:?}; it can be `mma`, `wgmma` or `tma`"),
    };
    Err(Error::Invalid { op, message })
}

/// `struct MappedAttention` of the kernels; what is mapped: q, k, v, d_out.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct MappedParams {
    params: Params,
    unused: [u32; 10],
    maps: [TensorMap; 4],
}

/// Whether the copy engine can read the matrices: every head of every row starts on 16 bytes, and there are rows.
pub(super) fn can_be_mapped(arguments: &Arguments<'_>) -> bool {
    let keys = &arguments.matrices.inputs[1];
    arguments.params.packed == 1 && keys.rows() > 0
}

/// The arguments and what the copy engine knows of the matrices, as boxes of `tiles`.
///
/// # Errors
/// If the driver refuses one.
pub(super) fn mapped(
    device: &CudaDevice,
    arguments: &Arguments<'_>,
    kernel: &str,
    tiles: Tiles,
) -> Result<MappedParams> {
    let (params, matrices) = (arguments.params, &arguments.matrices);
    // Of queries and of keys: a block has rows of its own on one side, and smaller tiles stream past on the other.
    let [query_rows, key_rows] = match kernel {
        "backward_kv" => [tiles.columns, tiles.rows],
        _ => [tiles.rows, tiles.columns],
    };
    let head_dim = u64::from(params.head_dim);
    let map = |matrix: &View<'_>, heads: u32, rows: u32| {
        device.tensor_map(&BoxedTensor {
            address: matrix.ptr(),
            shape: [head_dim, heads.into(), matrix.rows() as u64],
            strides: [2 * head_dim, 2 * matrix.pitch() as u64],
            box_shape: [64, 1, rows],
        })
    };
    let [q, k, v] = &matrices.inputs;
    let d_out = matrices.gradients.as_ref().map_or(q, |[d_out, _]| d_out);
    let maps = [
        map(q, params.heads, query_rows)?,
        map(k, params.kv_heads, key_rows)?,
        map(v, params.kv_heads, key_rows)?,
        map(d_out, params.heads, query_rows)?,
    ];
    Ok(MappedParams {
        params,
        unused: [0; 10],
        maps,
    })
}

/// As in kernel.cu: `groups` times 64 rows.
fn tiles(groups: u32, kept: u32, columns: u32, streamed: u32) -> Tiles {
    Tiles {
        rows: groups * 64,
        kept,
        columns,
        streamed,
        threads: groups * THREADS,
    }
}

pub(super) fn forward(width: u32) -> Tiles {
    tiles(if width == 64 { 3 } else { 2 }, 1, 128, 4)
}

pub(super) fn backward_q(width: u32) -> Tiles {
    match width {
        64 => tiles(3, 2, 64, 5),
        _ => tiles(2, 2, 96, 5),
    }
}

pub(super) fn backward_kv(width: u32) -> Tiles {
    tiles(2, 2, if width == 64 { 96 } else { 64 }, 6)
}

/// Which kernels a test gets.
#[cfg(test)]
pub(crate) mod for_tests {
    use super::Engine;
    use crate::test_support::cuda_device;
    use std::cell::Cell;

    thread_local! {
        pub(super) static FORCED: Cell<Option<Engine>> = const { Cell::new(None) };
    }

    /// What `test` gives with the kernels of `engine`, or `None` where they do not run: Hopper's run there and
    /// on what stands in for a GPU.
    pub(in crate::attention::cuda) fn with<T>(engine: Engine, test: impl Fn() -> T) -> Option<T> {
        let on_gpu = std::env::var("FERROTUNE_TEST_DEVICE").as_deref() == Ok("cuda");
        let runs = !on_gpu || cuda_device().compute_capability() == super::CAPABILITY;
        if engine != Engine::Mma && !runs {
            eprintln!("not run: kernels for compute capability 9.0, on a GPU of another");
            return None;
        }
        FORCED.set(Some(engine));
        let result = test();
        FORCED.set(None);
        Some(result)
    }

    /// Runs `test` with each kind of kernels that runs.
    pub(crate) fn with_each(test: impl Fn()) {
        for engine in [Engine::Mma, Engine::Wgmma, Engine::Tma] {
            with(engine, &test);
        }
    }
}
