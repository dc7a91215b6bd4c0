//! Copies between dtypes, pitches and devices, and constant fills.
//!
//! ```text
//! to[r,c] = dtype(from[r,c])        to[r,c] = dtype(value)
//! ```
//!
//! bf16 is rounded to nearest even. These cannot be refused: a GPU that fails remembers it, and its
//! next operation reports it.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
mod transfer;

pub(crate) use transfer::to_host;

use crate::tensor::with_dtype;
use crate::{View, ViewMut};
use std::sync::Arc;

/// Sets every element of `to` to `value`.
pub(crate) fn fill(to: ViewMut<'_>, value: f32) {
    if let Some(device) = to.device() {
        // The device remembers a failure.
        let _ = cuda::fill(device, to, value);
        return;
    }
    with_dtype!(to.dtype(), T => {
        if let Some(to) = to.typed::<T>() {
            cpu::fill(to, value);
        }
    });
}

/// Copies `from` to `to`, which has the same shape. Host memory becomes NaN if a device fails.
pub(crate) fn copy(mut to: ViewMut<'_>, from: View<'_>) {
    // The device remembers a failure.
    let _ = match (to.device(), from.device()) {
        (None, None) => {
            on_host(to, from);
            Ok(())
        }
        (Some(device), None) => transfer::upload(device, to, from),
        (None, Some(device)) => {
            transfer::download(device, to.reborrow(), from).inspect_err(|_| to.fill(f32::NAN))
        }
        (Some(a), Some(b)) if Arc::ptr_eq(a, b) => cuda::copy(a, to, from),
        (Some(device), Some(_)) => transfer::upload(device, to, to_host(from).view()),
    };
}

fn on_host(to: ViewMut<'_>, from: View<'_>) {
    with_dtype!(to.dtype(), D => with_dtype!(from.dtype(), S => {
        if let (Some(to), Some(from)) = (to.typed::<D>(), from.typed::<S>()) {
            cpu::copy(to, from);
        }
    }));
}
