//! The vocabulary and the single-process engine of ferrotune.

pub mod adapter;
pub mod config;
pub mod data;
mod error;
mod exit_code;
pub mod lr_schedule;
pub mod params;
pub mod process_group;
pub mod run_log;
pub mod suggest;

pub use error::{Error, Result};
pub use exit_code::{EXIT_CODES, ExitCode};
