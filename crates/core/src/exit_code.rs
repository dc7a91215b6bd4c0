//! Exit codes: the contract with whatever scheduler started the process.
//!
//! Below 128 is permanent (do not retry), from 128 on is retryable, as the Kubeflow Training
//! Operator reads it.

/// What a process of ferrotune can end with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Done.
    Done = 0,
    /// The command line could not be understood.
    Usage = 2,
    /// Bad data, weights, adapter or chat template.
    BadInput = 65,
    /// Internal error, panic or numeric failure.
    Internal = 70,
    /// Does not fit in memory.
    OutOfMemory = 71,
    /// Output cannot be written.
    CannotWrite = 73,
    /// Bad configuration or launcher environment.
    BadConfig = 78,
    /// No progress after repeated restarts: do not requeue.
    NoProgress = 93,
    /// Stopped by a signal, with a verified checkpoint.
    StoppedSaved = 143,
    /// Stopped by a signal, nothing saved.
    StoppedUnsaved = 174,
    /// Transient: peer lost, timeout, hub or store unreachable, GPU fault.
    Transient = 175,
}

/// Every code with its meaning; the documentation's table is printed from this.
pub const EXIT_CODES: [(ExitCode, &str); 11] = [
    (ExitCode::Done, "done"),
    (ExitCode::Usage, "the command line could not be understood"),
    (
        ExitCode::BadInput,
        "bad data, weights, adapter or chat template",
    ),
    (
        ExitCode::Internal,
        "internal error, panic, or numeric failure (loss or gradient not finite)",
    ),
    (ExitCode::OutOfMemory, "does not fit in memory"),
    (ExitCode::CannotWrite, "output cannot be written"),
    (
        ExitCode::BadConfig,
        "bad configuration or launcher environment",
    ),
    (
        ExitCode::NoProgress,
        "no progress after repeated restarts: do not requeue",
    ),
    (
        ExitCode::StoppedSaved,
        "stopped by a signal, with a verified checkpoint",
    ),
    (
        ExitCode::StoppedUnsaved,
        "stopped by a signal, nothing saved",
    ),
    (
        ExitCode::Transient,
        "transient: peer lost, timeout, hub or store unreachable, GPU fault",
    ),
];
