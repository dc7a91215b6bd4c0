use crate::ExitCode;
use ferrotune_kernels::ErrorKind;
use std::path::{Path, PathBuf};

/// Everything that can go wrong, sorted by what its reader can do about it.
///
/// Each message says what is wrong, where, what was expected and how to mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration value, or a combination of them. Exit code 78.
    #[error("config: `{key}`: {message}")]
    Config {
        /// The key, as written in the YAML file or on the command line.
        key: String,
        /// What is wrong, what was expected, the nearest valid value.
        message: String,
    },
    /// A line of a data set, or the set as a whole. Exit code 65.
    #[error("data: {}{}: {message}", path.display(), line.map(|l| format!(":{l}")).unwrap_or_default())]
    Data {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: Option<u64>,
        /// What is wrong and what was expected.
        message: String,
    },
    /// A model directory: config, weights or tokenizer. Exit code 65.
    #[error("model: {}: {message}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong and what was expected.
        message: String,
    },
    /// An adapter directory, or an adapter that does not fit its base. Exit code 65.
    #[error("adapter: {}: {message}", path.display())]
    Adapter {
        /// The file.
        path: PathBuf,
        /// What is wrong and what was expected.
        message: String,
    },
    /// A chat template. Exit code 65.
    #[error("chat template: {message}")]
    Template {
        /// What is wrong and where.
        message: String,
    },
    /// A checkpoint that cannot be resumed from. Exit code 65.
    #[error("checkpoint: {}: {message}", path.display())]
    Checkpoint {
        /// The checkpoint directory or file.
        path: PathBuf,
        /// What is wrong and what was expected.
        message: String,
    },
    /// A file that cannot be read. Exit code 65.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file or directory that cannot be written. Exit code 73.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Loss or gradient is not finite, or an internal invariant broke. Exit code 70.
    #[error("{message}")]
    Numeric {
        /// What is not finite, at which step, and what usually helps.
        message: String,
    },
    /// Needs more memory than there is. Exit code 71.
    #[error("does not fit: {message}")]
    Memory {
        /// What was needed, what is there, what would fit.
        message: String,
    },
    /// A peer, store or hub is unreachable; trying again can help. Exit code 175.
    #[error("{message}")]
    Transient {
        /// Who, during what.
        message: String,
    },
    /// A signal came before there was anything to save. Exit code 174.
    #[error("stopped {during}; nothing to save")]
    Stopped {
        /// What was going on.
        during: String,
    },
    /// A tensor operation failed. Exit code 70 if it refused its arguments; on a GPU 71 if memory
    /// ran out, 175 if the device failed, 78 if driver, libraries or GPU are missing or too old.
    #[error(transparent)]
    Kernel(#[from] ferrotune_kernels::Error),
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A [`Error::Config`] for `key`.
    pub fn config(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Config {
            key: key.into(),
            message: message.into(),
        }
    }

    /// A [`Error::Data`] for a line of a file (from 1), or for the file as a whole.
    pub fn data(
        path: impl AsRef<Path>,
        line: impl Into<Option<u64>>,
        message: impl Into<String>,
    ) -> Self {
        Self::Data {
            path: path.as_ref().into(),
            line: line.into(),
            message: message.into(),
        }
    }

    /// A [`Error::Model`] for a file of a model directory.
    pub fn model(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::Model {
            path: path.as_ref().into(),
            message: message.into(),
        }
    }

    /// A [`Error::Adapter`] for a file of an adapter directory.
    pub fn adapter(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::Adapter {
            path: path.as_ref().into(),
            message: message.into(),
        }
    }

    /// A [`Error::Checkpoint`] for a checkpoint directory or file.
    pub fn checkpoint(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::Checkpoint {
            path: path.as_ref().into(),
            message: message.into(),
        }
    }

    /// The same fault where the value is that of a saved adapter in `directory`, not of a configuration.
    #[must_use]
    pub fn of_adapter(self, directory: &Path) -> Self {
        match self {
            Self::Config { key, message } => {
                let file = directory.join("adapter_config.json");
                Self::adapter(file, format!("`{key}`: {message}"))
            }
            other => other,
        }
    }

    /// The same fault where a row brought it to light, which is then what is named first.
    #[must_use]
    pub fn in_row(self, row_path: &Path, line: u64) -> Self {
        match self {
            Self::Template { message } => Self::Template {
                message: format!("{}:{line}: {message}", row_path.display()),
            },
            Self::Config { message, .. } => Self::data(row_path, line, message),
            Self::Model { path, message } => {
                Self::data(row_path, line, format!("{}: {message}", path.display()))
            }
            other => other,
        }
    }

    /// Turns an I/O error of reading `path` into an [`Error::Read`].
    pub fn read(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        |source| Self::Read { path, source }
    }

    /// Turns an I/O error of writing `path` into an [`Error::Write`].
    pub fn write(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        |source| Self::Write { path, source }
    }

    /// A template's fault with the file it comes from.
    #[must_use]
    pub fn in_template_file(self, path: &Path) -> Self {
        match self {
            Self::Template { message } => Self::Template {
                message: format!("{}: {message}", path.display()),
            },
            other => other,
        }
    }

    /// The exit code that tells a scheduler what to do about it.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config { .. } => ExitCode::BadConfig,
            Self::Data { .. }
            | Self::Model { .. }
            | Self::Adapter { .. }
            | Self::Template { .. }
            | Self::Checkpoint { .. }
            | Self::Read { .. } => ExitCode::BadInput,
            Self::Write { .. } => ExitCode::CannotWrite,
            Self::Numeric { .. } => ExitCode::Internal,
            Self::Kernel(error) => match error.kind() {
                ErrorKind::OutOfMemory => ExitCode::OutOfMemory,
                ErrorKind::DeviceFault => ExitCode::Transient,
                ErrorKind::Environment => ExitCode::BadConfig,
                _ => ExitCode::Internal,
            },
            Self::Memory { .. } => ExitCode::OutOfMemory,
            Self::Transient { .. } => ExitCode::Transient,
            Self::Stopped { .. } => ExitCode::StoppedUnsaved,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Error;
    use crate::ExitCode;
    use ferrotune_kernels::{Error as KernelError, ErrorKind};

    #[test]
    fn failures_of_a_gpu_tell_the_scheduler_whether_to_retry() {
        let fault = |kind| KernelError::Cuda {
            op: "launching".into(),
            code: 700,
            name: "CUDA_ERROR_ILLEGAL_ADDRESS".into(),
            meaning: "an illegal memory access".into(),
            fix: "",
            kind,
        };
        let out_of_memory = KernelError::OutOfMemory {
            wanted: 3,
            free: 1,
            total: 2,
        };
        let no_gpu = KernelError::NoGpu {
            problem: "none is visible".into(),
            fix: "plug one in".into(),
        };
        for (error, code) in [
            (fault(ErrorKind::DeviceFault), ExitCode::Transient),
            (fault(ErrorKind::Internal), ExitCode::Internal),
            (fault(ErrorKind::Environment), ExitCode::BadConfig),
            (out_of_memory, ExitCode::OutOfMemory),
            (no_gpu, ExitCode::BadConfig),
        ] {
            let error = Error::from(error);
            assert_eq!(error.exit_code(), code, "{error}");
        }
    }
}
