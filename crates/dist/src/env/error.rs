use ferrotune_core::ExitCode;
use std::fmt;

/// What is wrong with a launcher environment, by a name that does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// A variable still holds a reference like `$(NAME)`, which nobody replaced.
    Unexpanded,
    /// Not a decimal number.
    NotInt,
    /// A number outside of its range, such as a rank that is not below the number of ranks.
    Range,
    /// The number of ranks per machine makes no sense here.
    Nproc,
    /// Not a TCP port.
    Port,
    /// The address of rank 0 is missing, malformed, or leads elsewhere.
    MasterAddr,
    /// Two variables contradict each other.
    Conflict,
    /// This process is not the one that should train.
    WrongRole,
    /// The number of machines may change during the run.
    ElasticRange,
    /// The launcher starts another kind of program.
    UnsupportedRuntime,
    /// Nothing says which machine or process this is.
    RankUnknown,
    /// Nothing says how many machines or processes there are.
    WorldUnknown,
    /// Ranks may be counted in pods or in processes.
    AmbiguousScope,
}

impl Code {
    /// The name: `E_NOT_INT`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unexpanded => "E_UNEXPANDED",
            Self::NotInt => "E_NOT_INT",
            Self::Range => "E_RANGE",
            Self::Nproc => "E_NPROC",
            Self::Port => "E_PORT",
            Self::MasterAddr => "E_MASTER_ADDR",
            Self::Conflict => "E_CONFLICT",
            Self::WrongRole => "E_WRONG_ROLE",
            Self::ElasticRange => "E_ELASTIC_RANGE",
            Self::UnsupportedRuntime => "E_UNSUPPORTED_RUNTIME",
            Self::RankUnknown => "E_RANK_UNKNOWN",
            Self::WorldUnknown => "E_WORLD_UNKNOWN",
            Self::AmbiguousScope => "E_AMBIGUOUS_SCOPE",
        }
    }
}

/// A launcher environment that cannot be believed. Exit code 78: starting again cannot help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct EnvError {
    /// What kind of problem.
    pub code: Code,
    /// The launcher that the environment looks like.
    pub launcher: &'static str,
    /// The variable or flag at fault.
    pub variable: String,
    /// Its value; none if it is not set.
    pub value: Option<String>,
    /// What was expected instead.
    pub expected: String,
    /// How to mend it.
    pub fix: String,
}

impl EnvError {
    /// The exit code for the scheduler.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::BadConfig
    }

    /// All parts, for a machine; `error` is the code's name.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "error": self.code.name(),
            "launcher": self.launcher,
            "variable": self.variable,
            "value": self.value,
            "expected": self.expected,
            "fix": self.fix,
            "message": self.to_string(),
        })
    }
}

impl fmt::Display for EnvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.name(), self.variable)?;
        match &self.value {
            Some(value) => write!(f, "={value:?}")?,
            None => write!(f, " is not set")?,
        }
        write!(
            f,
            " (launcher: {}); expected {}; fix: {}",
            self.launcher, self.expected, self.fix
        )
    }
}
