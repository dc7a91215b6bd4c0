//! Attention by products of warpgroups, `wgmma`, which compute capability 9.0 alone has.
//!
//! Compiled, and right where `host/` runs it; no run on a GPU has timed it, so it is used only where
//! `FERROTUNE_ATTENTION` is `wgmma`.

use super::{THREADS, Tiles};
use crate::cuda::{CudaDevice, Module};
use crate::{Error, Result};
use std::env;
use std::sync::LazyLock;

/// Environment variable that chooses the attention kernels of bf16: `wgmma`, or `mma`, the default.
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

/// Whether these kernels are to be used on `device`, for the widths they have.
pub(super) fn wanted(op: &'static str, device: &CudaDevice) -> Result<bool> {
    #[cfg(test)]
    if let Some(forced) = for_tests::FORCED.get() {
        return Ok(forced);
    }
    static VALUE: LazyLock<String> = LazyLock::new(|| env::var(VARIABLE).unwrap_or_default());
    let message = match (VALUE.as_str(), device.compute_capability()) {
        ("" | "mma", _) => return Ok(false),
        ("wgmma", CAPABILITY) => return Ok(true),
        ("wgmma", (major, minor)) => format!(
            "{VARIABLE} is `wgmma`, which only compute capability 9.0 has; {} has {major}.{minor}: \
             take `mma`",
            device.name()
        ),
        (other, _) => format!("{VARIABLE} is {other:?}; it can be `mma` or `wgmma`"),
    };
    Err(Error::Invalid { op, message })
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
    use crate::test_support::cuda_device;
    use std::cell::Cell;

    thread_local! {
        pub(super) static FORCED: Cell<Option<bool>> = const { Cell::new(None) };
    }

    /// Runs `test` with the other kernels, and with these where they run: on Hopper and on what stands in
    /// for a GPU.
    pub(crate) fn with_each(test: impl Fn()) {
        let on_gpu = std::env::var("FERROTUNE_TEST_DEVICE").as_deref() == Ok("cuda");
        let runs = !on_gpu || cuda_device().compute_capability() == super::CAPABILITY;
        for wanted in [false, true] {
            if wanted && !runs {
                eprintln!("not run: kernels for compute capability 9.0, on a GPU of another");
                continue;
            }
            FORCED.set(Some(wanted));
            test();
            FORCED.set(None);
        }
    }
}
