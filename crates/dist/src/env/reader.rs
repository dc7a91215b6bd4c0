//! What the files of the launchers share: variables read strictly, every value with its source, and
//! the checks that hold for all of them.

use super::address;
use super::surroundings::Surroundings;
use super::{Code, EnvError, Warning};
use std::collections::BTreeMap;

/// A value of the command line that goes before variables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flag {
    Nproc,
    Nnodes,
    NodeRank,
    MasterAddr,
    MasterPort,
}

impl Flag {
    fn field(self) -> &'static str {
        match self {
            Self::Nproc => "local_world_size",
            Self::Nnodes => "nnodes",
            Self::NodeRank => "node_rank",
            Self::MasterAddr => "master_addr",
            Self::MasterPort => "master_port",
        }
    }

    /// The flag and the variable that says the same.
    pub(super) fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Nproc => ("--nproc", "FERROTUNE_NPROC"),
            Self::Nnodes => ("--nnodes", "FERROTUNE_NNODES"),
            Self::NodeRank => ("--node-rank", "FERROTUNE_NODE_RANK"),
            Self::MasterAddr => ("--master-addr", "FERROTUNE_MASTER_ADDR"),
            Self::MasterPort => ("--master-port", "FERROTUNE_MASTER_PORT"),
        }
    }
}

/// Reads the surroundings for one launcher, and remembers what said what.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    pub(super) around: &'a Surroundings,
    pub(super) launcher: &'static str,
    pub(super) sources: BTreeMap<&'static str, String>,
    pub(super) warnings: Vec<Warning>,
    pub(super) one_machine: bool,
}

impl<'a> Reader<'a> {
    pub(super) fn new(around: &'a Surroundings, launcher: &'static str) -> Self {
        Self {
            around,
            launcher,
            sources: BTreeMap::new(),
            warnings: Vec::new(),
            one_machine: false,
        }
    }

    /// What counts as machines here shares one, so loopback leads to all of them.
    pub(super) fn replicas_share_this_machine(&mut self) {
        self.one_machine = true;
    }

    pub(super) fn variable(&self, name: &str) -> Option<&'a str> {
        self.around.variables.get(name).map(String::as_str)
    }

    /// An error about `name`, a variable or a flag.
    pub(super) fn error(
        &self,
        code: Code,
        name: &str,
        expected: impl Into<String>,
        fix: impl Into<String>,
    ) -> EnvError {
        let value = self.variable(name).map(str::to_owned);
        self.error_of(code, name, value, expected, fix)
    }

    pub(super) fn error_of(
        &self,
        code: Code,
        name: &str,
        value: Option<String>,
        expected: impl Into<String>,
        fix: impl Into<String>,
    ) -> EnvError {
        EnvError {
            code,
            launcher: self.launcher,
            variable: name.to_owned(),
            value,
            expected: expected.into(),
            fix: fix.into(),
        }
    }

    pub(super) fn warn(&mut self, code: &'static str, text: impl Into<String>) {
        let text = text.into();
        self.warnings.push(Warning { code, text });
    }

    /// Remembers that `source` said `field`.
    pub(super) fn said(&mut self, field: &'static str, source: impl Into<String>) {
        self.sources.insert(field, source.into());
    }

    pub(super) fn said_by_variable(&mut self, field: &'static str, name: &str) {
        let value = self.variable(name).unwrap_or_default();
        self.said(field, format!("{name}={value}"));
    }

    /// A number, if the variable is set at all: nothing malformed is taken for absent.
    pub(super) fn number(&self, name: &str) -> Result<Option<usize>, EnvError> {
        let Some(text) = self.variable(name) else {
            return Ok(None);
        };
        self.parse(name, text).map(Some)
    }

    pub(super) fn parse(&self, name: &str, text: &str) -> Result<usize, EnvError> {
        let fail = |code, fix: &str| {
            let expected = "a decimal number from 0 on, without sign, blanks or leading zeros";
            self.error_of(code, name, Some(text.to_owned()), expected, fix)
        };
        if !address::is_decimal(text) {
            return Err(fail(
                Code::NotInt,
                if text.is_empty() {
                    "an empty value often comes from a field or annotation that does not exist; \
                     check the pod's template"
                } else {
                    "correct the value where the pod or job defines it"
                },
            ));
        }
        // No world has 2^31 ranks; a product of two such numbers fits 64 bits.
        let number: u32 = text.parse().ok().filter(|n| *n <= 1 << 31).ok_or_else(|| {
            fail(
                Code::Range,
                "correct the value; it is larger than any cluster",
            )
        })?;
        Ok(number as usize)
    }

    /// A number that becomes `field`, if the variable is set.
    pub(super) fn field(
        &mut self,
        field: &'static str,
        name: &str,
    ) -> Result<Option<usize>, EnvError> {
        let number = self.number(name)?;
        if number.is_some() {
            self.said_by_variable(field, name);
        }
        Ok(number)
    }

    /// A number that becomes `field`; `code` if it is not there.
    pub(super) fn need(
        &mut self,
        field: &'static str,
        name: &str,
        code: Code,
    ) -> Result<usize, EnvError> {
        let found = self.field(field, name)?;
        found.ok_or_else(|| {
            self.error(
                code,
                name,
                format!("a number, which {} sets", self.launcher),
                "start this program with that launcher itself, or pass the variable on to it",
            )
        })
    }

    /// What the command line, or the variable beside it, says: the source, and the text.
    pub(super) fn flag(&self, flag: Flag) -> Option<(&'static str, &'a str)> {
        let flags = &self.around.flags;
        let text = match flag {
            Flag::Nproc => &flags.nproc,
            Flag::Nnodes => &flags.nnodes,
            Flag::NodeRank => &flags.node_rank,
            Flag::MasterAddr => &flags.master_addr,
            Flag::MasterPort => &flags.master_port,
        };
        let (name, variable) = flag.names();
        match text {
            Some(text) => Some((name, text.as_str())),
            None => self.variable(variable).map(|text| (variable, text)),
        }
    }

    pub(super) fn said_by_flag(&mut self, flag: Flag, name: &str, text: &str) {
        let joint = if name.starts_with("--") { ' ' } else { '=' };
        self.said(flag.field(), format!("{name}{joint}{text}"));
    }

    /// The number of a flag, else of the first of `names` that is set.
    pub(super) fn flag_or(
        &mut self,
        flag: Flag,
        names: &[&str],
    ) -> Result<Option<usize>, EnvError> {
        let set = names.iter().find(|name| self.variable(name).is_some());
        let Some((name, text)) = self.flag(flag) else {
            return match set {
                Some(name) => self.field(flag.field(), name),
                None => Ok(None),
            };
        };
        let number = self.parse(name, text)?;
        self.said_by_flag(flag, name, text);
        if let Some(other) = set.and_then(|name| self.variable(name).map(|v| (name, v)))
            && other.1 != text
        {
            let (variable, value) = other;
            self.warn(
                "W_FLAG_OVERRIDES",
                format!("{name} {text} is believed, {variable}={value} is not"),
            );
        }
        Ok(Some(number))
    }

    /// Number of machines: at least one.
    pub(super) fn nnodes(&mut self, names: &[&str]) -> Result<Option<usize>, EnvError> {
        let nodes = self.flag_or(Flag::Nnodes, names)?;
        if nodes == Some(0) {
            let name = self.flag(Flag::Nnodes).map(|(name, _)| name);
            let name = name.or_else(|| names.iter().copied().find(|n| self.variable(n).is_some()));
            let name = name.unwrap_or("--nnodes");
            let value = Some("0".to_owned());
            let fix = "ask the launcher for at least one machine";
            return Err(self.error_of(Code::Range, name, value, "at least 1", fix));
        }
        Ok(nodes)
    }

    /// `a` and `b` must be the same.
    pub(super) fn same(&self, a: (&str, usize), b: (&str, usize)) -> Result<(), EnvError> {
        if a.1 == b.1 {
            return Ok(());
        }
        Err(self.error(
            Code::Conflict,
            a.0,
            format!("{} as in {}", b.1, b.0),
            "two parts of the job's definition contradict each other; remove the one that was set \
             by hand",
        ))
    }

    /// `name`, which is `index`, must be below `count` of `of`.
    pub(super) fn below(
        &self,
        (name, index): (&str, usize),
        (of, count): (&str, usize),
    ) -> Result<(), EnvError> {
        if index < count {
            return Ok(());
        }
        let value = self
            .variable(name)
            .map_or_else(|| index.to_string(), str::to_owned);
        Err(self.error_of(
            Code::Range,
            name,
            Some(value),
            format!("a number below {of}, which is {count}"),
            "ranks count from 0; check that both come from the same job",
        ))
    }
}
