//! What a command says: its answer on standard output, everything else on standard error.
//!
//! One way for every command. A reader that goes away (`| head -1`) ends nothing; an answer that cannot
//! be written otherwise, as on a full disk, is an error like any other. What is said on standard error
//! is never a reason to fail.

use ferrotune::core::io::UntilClosed;
use ferrotune::core::{Error, Result};
use std::fmt::Display;
use std::io::{Write, stderr, stdout};

/// What errors call standard output.
pub(super) const STANDARD_OUTPUT: &str = "standard output";

/// Writes text to standard output.
///
/// # Errors
/// [`Error::Write`].
pub(super) fn print(text: impl Display) -> Result<()> {
    let mut writer = UntilClosed::new(stdout().lock());
    let written = write!(writer, "{text}").and_then(|()| writer.flush());
    written.map_err(Error::write(STANDARD_OUTPUT))
}

/// [`print`] with a line break.
///
/// # Errors
/// [`Error::Write`].
pub(super) fn print_line(text: impl Display) -> Result<()> {
    print(format_args!("{text}\n"))
}

/// A line on standard error.
pub(super) fn print_error_line(line: &str) {
    // In one piece: ranks write to the same terminal.
    let _ = stderr().write_all(format!("{line}\n").as_bytes());
}

/// Something to know that is no error, on standard error.
pub(super) fn print_note(note: &str) {
    print_error_line(&format!("note: {note}"));
}
