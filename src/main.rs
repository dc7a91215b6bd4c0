//! The `ferrotune` command.

#![warn(clippy::print_stdout, clippy::print_stderr)]

mod cli;

use ferrotune::core::ExitCode as Code;
use ferrotune::kernels::ExitWhenExhausted;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: ExitWhenExhausted = ExitWhenExhausted::with_code(Code::OutOfMemory as i32);

fn main() -> ExitCode {
    cli::main()
}
