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
    /// A conversion to or from a candle tensor failed.
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
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
