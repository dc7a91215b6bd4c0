use crate::DType;

/// What an operation can refuse. Every variant names the operation and the argument.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong number of rows or columns.
    #[error("{op}: {what} is {got:?} [rows, columns], expected {expected:?}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// Shape the operation needs.
        expected: [usize; 2],
        /// Shape it was given.
        got: [usize; 2],
    },
    /// A slice argument has the wrong length.
    #[error("{op}: {what} has {got} elements, expected {expected}")]
    Length {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// Length the operation needs.
        expected: usize,
        /// Length it was given.
        got: usize,
    },
    /// An argument has the wrong dtype.
    #[error("{op}: {what} is {got}, expected {expected}")]
    DType {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// Dtype the operation needs.
        expected: DType,
        /// Dtype it was given.
        got: DType,
    },
    /// A token id, row number or label points outside its table.
    #[error("{op}: {what}[{at}] is {index}, but there are only {limit}")]
    Index {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// Position of the bad entry.
        at: usize,
        /// The bad entry.
        index: usize,
        /// Number of valid values.
        limit: usize,
    },
    /// Anything else, in words.
    #[error("{op}: {message}")]
    Invalid {
        /// The operation.
        op: &'static str,
        /// What is wrong and what would be right.
        message: String,
    },
    /// A call of the CUDA driver, of its compiler or of its matrix products failed.
    #[error("{op}: {name} ({code}): {meaning}{}", hint(fix))]
    Cuda {
        /// What was being done.
        op: String,
        /// Status code of the library.
        code: u32,
        /// Its name.
        name: String,
        /// What the library says about it.
        meaning: String,
        /// What can be done about it; may be empty.
        fix: &'static str,
        /// What it means for the process.
        kind: ErrorKind,
    },
    /// The GPU has no room for an allocation.
    #[error(
        "the GPU is out of memory: {wanted} bytes wanted, {free} of {total} free; a smaller \
         micro-batch or a shorter max_length needs less"
    )]
    OutOfMemory {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes free at that time.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// There is no GPU that can be used.
    #[error("no usable GPU: {problem}{}", hint(fix))]
    NoGpu {
        /// Why not.
        problem: String,
        /// What to do about it.
        fix: String,
    },
    /// A library cannot be opened.
    #[error("{library}: {problem}{}", hint(fix))]
    Library {
        /// Its name.
        library: String,
        /// What is wrong, every path tried.
        problem: String,
        /// What to do about it.
        fix: String,
    },
    /// A kernel does not compile.
    #[error("kernels of {module} do not compile for {arch}:\n{log}")]
    Compile {
        /// The module.
        module: &'static str,
        /// The architecture, like `sm_90a`.
        arch: String,
        /// What the compiler says.
        log: String,
    },
    /// A conversion to or from a candle tensor failed.
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
}

/// What an error means for the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Wrong arguments or a defect of this program.
    Internal,
    /// Does not fit in the memory of the device.
    OutOfMemory,
    /// The device failed; another try, perhaps on another machine, can help.
    DeviceFault,
    /// The machine lacks something: driver, library, a GPU that is new enough.
    Environment,
}

impl Error {
    /// What the error means for the process.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::OutOfMemory { .. } => ErrorKind::OutOfMemory,
            Self::NoGpu { .. } | Self::Library { .. } => ErrorKind::Environment,
            Self::Cuda { kind, .. } => *kind,
            _ => ErrorKind::Internal,
        }
    }

    /// The same error again, for a device that keeps its first one.
    pub(crate) fn replica(&self) -> Self {
        match self {
            Self::Cuda {
                op,
                code,
                name,
                meaning,
                fix,
                kind,
            } => Self::Cuda {
                op: op.clone(),
                code: *code,
                name: name.clone(),
                meaning: meaning.clone(),
                fix,
                kind: *kind,
            },
            &Self::OutOfMemory {
                wanted,
                free,
                total,
            } => Self::OutOfMemory {
                wanted,
                free,
                total,
            },
            Self::NoGpu { problem, fix } => Self::NoGpu {
                problem: problem.clone(),
                fix: fix.clone(),
            },
            Self::Library {
                library,
                problem,
                fix,
            } => Self::Library {
                library: library.clone(),
                problem: problem.clone(),
                fix: fix.clone(),
            },
            Self::Invalid { op, message } => Self::Invalid {
                op,
                message: message.clone(),
            },
            Self::Compile { module, arch, log } => Self::Compile {
                module,
                arch: arch.clone(),
                log: log.clone(),
            },
            other => Self::Invalid {
                op: "cuda",
                message: other.to_string(),
            },
        }
    }
}

/// `; FIX`, or nothing.
fn hint(fix: &str) -> String {
    if fix.is_empty() {
        String::new()
    } else {
        format!("; {fix}")
    }
}

/// Result of an operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Refuses `got` unless it equals `expected`.
pub(crate) fn check_shape(
    op: &'static str,
    what: &'static str,
    expected: [usize; 2],
    got: [usize; 2],
) -> Result<()> {
    if expected == got {
        Ok(())
    } else {
        Err(Error::Shape {
            op,
            what,
            expected,
            got,
        })
    }
}

/// Refuses `got` unless it equals `expected`.
pub(crate) fn check_len(
    op: &'static str,
    what: &'static str,
    expected: usize,
    got: usize,
) -> Result<()> {
    if expected == got {
        Ok(())
    } else {
        Err(Error::Length {
            op,
            what,
            expected,
            got,
        })
    }
}

/// Refuses `got` unless it equals `expected`.
pub(crate) fn check_dtype(
    op: &'static str,
    what: &'static str,
    expected: DType,
    got: DType,
) -> Result<()> {
    if expected == got {
        Ok(())
    } else {
        Err(Error::DType {
            op,
            what,
            expected,
            got,
        })
    }
}
