//! Which exit code the whole has, from how its ranks ended.

use ferrotune_core::ExitCode;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    Code(u8),
    Signal(i32),
}

/// The end of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) rank: usize,
    pub(super) how: How,
    /// The launcher had already told it to end because of another rank.
    pub(super) told: bool,
}

/// What an end means for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Its work is done.
    Done,
    /// It stopped because it was asked to.
    Stopped,
    /// Anything else.
    Failed,
}

impl End {
    /// `forwarded`: the signal that the launcher got and passed on.
    pub(super) fn kind(&self, forwarded: Option<i32>) -> Kind {
        match self.how {
            How::Code(0) => Kind::Done,
            How::Code(code) if is_stop(code) => Kind::Stopped,
            How::Signal(signal) if forwarded == Some(signal) => Kind::Stopped,
            _ => Kind::Failed,
        }
    }

    /// The exit code that this end asks for.
    fn code(&self, forwarded: Option<i32>) -> u8 {
        match self.how {
            How::Code(code) => code,
            How::Signal(_) if self.kind(forwarded) == Kind::Stopped => {
                ExitCode::StoppedUnsaved as u8
            }
            How::Signal(_) => ExitCode::Transient as u8,
        }
    }

    /// The end in words.
    pub(super) fn describe(&self) -> String {
        match self.how {
            How::Code(code) => format!("rank {} ended with exit code {code}", self.rank),
            How::Signal(signal) => {
                let name = signal_hook::low_level::signal_name(signal).unwrap_or("unknown");
                let hint = if signal == signal_hook::consts::SIGKILL {
                    "; nobody here sent it, so the machine may be out of memory"
                } else {
                    ""
                };
                format!(
                    "rank {} was killed by signal {signal} ({name}){hint}",
                    self.rank
                )
            }
        }
    }
}

fn is_stop(code: u8) -> bool {
    [ExitCode::StoppedSaved as u8, ExitCode::StoppedUnsaved as u8].contains(&code)
}

/// The exit code of the whole: that of the rank that failed first by itself. A lost peer (175) is
/// what other ranks see of a failure, so a rank that says more goes before it.
///
/// A run that was asked to stop has a checkpoint only if no rank says otherwise.
pub(super) fn verdict(ends: &[End], forwarded: Option<i32>) -> u8 {
    let by_itself = |end: &&End| !end.told && end.kind(forwarded) == Kind::Failed;
    let cause = ends
        .iter()
        .filter(by_itself)
        .find(|end| end.code(forwarded) != ExitCode::Transient as u8)
        .or_else(|| ends.iter().find(by_itself));
    if let Some(cause) = cause {
        return cause.code(forwarded);
    }
    let not_done = |end: &&End| end.kind(forwarded) != Kind::Done;
    let codes: Vec<u8> = ends
        .iter()
        .filter(not_done)
        .map(|end| end.code(forwarded))
        .collect();
    let saved = ExitCode::StoppedSaved as u8;
    match codes.as_slice() {
        [] => ExitCode::Done as u8,
        codes if codes.iter().all(|code| *code == saved) => saved,
        _ => ExitCode::StoppedUnsaved as u8,
    }
}
