//! The vocabulary and the single-process engine of ferrotune.

#![warn(clippy::print_stdout)]

pub mod adapter;
pub mod checkpoint;
pub mod config;
pub mod data;
mod error;
mod exit_code;
pub mod full;
mod guarded;
pub mod io;
mod kwargs;
pub mod lr_schedule;
pub mod model;
pub mod model_card;
mod models;
pub mod optimizer;
pub mod params;
pub mod process_group;
pub mod run_log;
pub mod suggest;
pub mod trainer;

pub use error::{Error, Result};
pub use exit_code::{EXIT_CODES, ExitCode};
pub use guarded::panic_is_expected;
