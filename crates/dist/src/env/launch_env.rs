use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt;

/// For whom a launcher made an environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// One per pod or machine, which starts its ranks by itself.
    Pod,
    /// One per rank.
    Process,
}

impl Scope {
    /// `pod` or `process`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Process => "process",
        }
    }
}

/// Something to know that does not keep a run from starting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// A name that does not change: `W_IDLE_GPUS`.
    pub code: &'static str,
    /// A sentence for people.
    pub text: String,
}

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub(super) String);

impl Secret {
    /// The text itself.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Which rank, or ranks, this process has to be, and where the others are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchEnv {
    /// The launcher that the variables are from.
    pub launcher: &'static str,
    /// Whether this environment is a pod's or a single rank's.
    pub scope: Scope,
    /// Ranks of the whole run.
    pub world_size: usize,
    /// Machines, where known.
    pub nnodes: Option<usize>,
    /// This machine, from 0, where known.
    pub node_rank: Option<usize>,
    /// Ranks on this machine, where known.
    pub local_world_size: Option<usize>,
    /// The ranks that this process stands for: those of a whole pod, or a single one.
    pub ranks: Vec<usize>,
    /// The same ones, counted on this machine.
    pub local_ranks: Vec<usize>,
    /// The GPU of each of them, by its number among the visible ones; none computes on the CPU.
    pub devices: Vec<Option<usize>>,
    /// The machine of rank 0.
    pub master_addr: String,
    /// Where rank 0 listens; none where it may take any free port of this machine.
    pub master_port: Option<u16>,
    /// The launcher listens on that port itself, so nobody else can.
    pub master_port_reserved: bool,
    /// The name of the run, where the launcher has one.
    pub job_id: Option<String>,
    /// How often the launcher has started the run before, where it says so.
    pub restart_count: Option<usize>,
    /// What the ranks of a run share, to keep strangers out.
    pub token: Option<Secret>,
    /// What a person should know.
    pub warnings: Vec<Warning>,
    /// What said what, by the names of these fields.
    pub sources: BTreeMap<&'static str, String>,
}

impl LaunchEnv {
    /// Everything but the token, by the names of the fields; `warnings` are their codes.
    #[must_use]
    pub fn json(&self) -> Value {
        let texts: Map<String, Value> = self
            .warnings
            .iter()
            .map(|warning| (warning.code.to_owned(), warning.text.clone().into()))
            .collect();
        let codes: Vec<&str> = self.warnings.iter().map(|warning| warning.code).collect();
        json!({
            "launcher": self.launcher,
            "scope": self.scope.name(),
            "world_size": self.world_size,
            "nnodes": self.nnodes,
            "node_rank": self.node_rank,
            "local_world_size": self.local_world_size,
            "ranks": self.ranks,
            "local_ranks": self.local_ranks,
            "devices": self.devices,
            "master_addr": self.master_addr,
            "master_port": self.master_port,
            "master_port_reserved": self.master_port_reserved,
            "job_id": self.job_id,
            "restart_count": self.restart_count,
            "warnings": codes,
            "warning_texts": texts,
            "sources": self.sources,
        })
    }
}

impl fmt::Display for LaunchEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = |field: &str| {
            let source = self.sources.get(field);
            source.map(|s| format!("   ({s})")).unwrap_or_default()
        };
        let known = |n: Option<usize>| n.map_or("unknown".to_owned(), |n| n.to_string());
        let list = |numbers: &[usize]| match numbers {
            [first, .., last] => format!("{first} to {last}"),
            [one] => one.to_string(),
            [] => "none".to_owned(),
        };
        let per = match self.scope {
            Scope::Pod => "one environment for the whole pod",
            Scope::Process => "one environment per rank",
        };
        writeln!(f, "{:<21} {}, {per}", "launcher", self.launcher)?;
        let rows = [
            ("ranks in all", self.world_size.to_string(), "world_size"),
            ("machines", known(self.nnodes), "nnodes"),
            ("this machine", known(self.node_rank), "node_rank"),
            (
                "ranks here",
                known(self.local_world_size),
                "local_world_size",
            ),
            ("ranks of this process", list(&self.ranks), "ranks"),
            ("local ranks", list(&self.local_ranks), "local_ranks"),
            ("rank 0 is at", self.address(), "master_addr"),
        ];
        for (name, value, field) in rows {
            writeln!(f, "{name:<21} {value}{}", source(field))?;
        }
        if let Some(job) = &self.job_id {
            writeln!(f, "{:<21} {job}{}", "job", source("job_id"))?;
        }
        if let Some(count) = self.restart_count {
            writeln!(
                f,
                "{:<21} {count}{}",
                "restarts so far",
                source("restart_count")
            )?;
        }
        for Warning { code, text } in &self.warnings {
            writeln!(f, "warning: {code}: {text}")?;
        }
        Ok(())
    }
}

impl LaunchEnv {
    /// Where rank 0 listens, for people.
    fn address(&self) -> String {
        let host = if self.master_addr.contains(':') {
            format!("[{}]", self.master_addr)
        } else {
            self.master_addr.clone()
        };
        match self.master_port {
            Some(port) if self.master_port_reserved => {
                format!("{host}, port {port} is taken by the launcher")
            }
            Some(port) => format!("{host}:{port}"),
            None => format!("{host}, any free port"),
        }
    }
}
