//! What the files of the launchers share: variables read strictly, every value with its source, and
//! the checks that hold for all of them.

use super::address;
use super::surroundings::Surroundings;
use super::{Code, EnvError, LaunchEnv, Scope, Warning};
use std::collections::BTreeMap;

/// Where the port of the store is, if nothing says so; torchrun's default too.
pub(super) const DEFAULT_PORT: u16 = 29500;
const LOOPBACK: &str = "127.0.0.1";

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

/// A place where the address of rank 0 may stand.
#[derive(Clone, Debug)]
pub(super) enum MasterIn<'a> {
    /// A variable with a host.
    Host(&'a str),
    /// A variable with a host and perhaps a port.
    Endpoint(&'a str),
    /// A host that a file or a list names.
    Named { source: String, host: String },
}

/// Where rank 0 listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Master {
    pub(super) addr: String,
    /// None: any free one.
    pub(super) port: Option<u16>,
    /// The launcher listens on that port itself.
    pub(super) reserved: bool,
}

/// One environment per pod: what its launcher says.
pub(super) struct Pod {
    pub(super) nnodes: usize,
    pub(super) node_rank: usize,
    pub(super) nproc: usize,
    pub(super) master: Master,
}

/// One environment per rank: what its launcher says.
pub(super) struct Process {
    pub(super) world_size: usize,
    pub(super) rank: usize,
    pub(super) local_rank: usize,
    pub(super) local_world_size: Option<usize>,
    pub(super) nnodes: Option<usize>,
    pub(super) node_rank: Option<usize>,
    pub(super) master: Master,
}

/// Reads the surroundings for one launcher, and remembers what said what.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    pub(super) around: &'a Surroundings,
    pub(super) launcher: &'static str,
    sources: BTreeMap<&'static str, String>,
    warnings: Vec<Warning>,
    one_machine: bool,
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

    fn error_of(
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

    fn said_by_variable(&mut self, field: &'static str, name: &str) {
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

    fn parse(&self, name: &str, text: &str) -> Result<usize, EnvError> {
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

    fn said_by_flag(&mut self, flag: Flag, name: &str, text: &str) {
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

    /// The port of rank 0: a flag, else the first of `names` that is set, else `default`.
    fn port(&mut self, names: &[&str], default: Option<u16>) -> Result<Option<u16>, EnvError> {
        if let Some((name, text)) = self.flag(Flag::MasterPort) {
            self.said_by_flag(Flag::MasterPort, name, text);
            return self.parse_port(name, text).map(Some);
        }
        let set = names.iter().find_map(|n| Some((*n, self.variable(n)?)));
        if let Some((name, text)) = set {
            self.said_by_variable("master_port", name);
            return self.parse_port(name, text).map(Some);
        }
        match default {
            Some(port) => self.said("master_port", format!("default {port}")),
            None => self.said("master_port", "any free port"),
        }
        Ok(default)
    }

    pub(super) fn parse_port(&self, name: &str, text: &str) -> Result<u16, EnvError> {
        address::port(text).ok_or_else(|| {
            let fix = "correct the port where the job defines it";
            let value = Some(text.to_owned());
            self.error_of(Code::Port, name, value, "a TCP port, 1 to 65535", fix)
        })
    }

    fn bad_address(&self, name: &str, text: &str, problem: &str) -> EnvError {
        self.error_of(
            Code::MasterAddr,
            name,
            Some(text.to_owned()),
            format!("a host name or an address, IPv6 in brackets, but this {problem}"),
            "give the bare host name of rank 0's pod; a port has a variable of its own",
        )
    }

    /// Where rank 0 is, by a flag, else by the first of `places` that says so.
    pub(super) fn master(
        &mut self,
        places: &[MasterIn<'_>],
        ports: &[&str],
        default_port: u16,
    ) -> Result<Option<Master>, EnvError> {
        let Some((source, addr, port)) = self.master_host(places)? else {
            return Ok(None);
        };
        self.said("master_addr", source.clone());
        let port = match port {
            Some(text) if self.flag(Flag::MasterPort).is_none() => {
                self.said("master_port", source.clone());
                let name = source.split(['=', ' ']).next().unwrap_or(&source);
                Some(self.parse_port(name, &text)?)
            }
            _ => self.port(ports, Some(default_port))?,
        };
        Ok(Some(Master {
            addr,
            port,
            reserved: false,
        }))
    }

    /// Source, host and the port beside it.
    fn master_host(
        &self,
        places: &[MasterIn<'_>],
    ) -> Result<Option<(String, String, Option<String>)>, EnvError> {
        if let Some((name, text)) = self.flag(Flag::MasterAddr) {
            let (host, port) =
                address::endpoint(text).map_err(|e| self.bad_address(name, text, e))?;
            return Ok(Some((format!("{name} {text}"), host, port)));
        }
        for place in places {
            let (name, endpoint) = match place {
                MasterIn::Host(name) => (*name, false),
                MasterIn::Endpoint(name) => (*name, true),
                MasterIn::Named { source, host } => {
                    let host =
                        address::host(host).map_err(|e| self.bad_address(source, host, e))?;
                    return Ok(Some((source.clone(), host, None)));
                }
            };
            let Some(text) = self.variable(name) else {
                continue;
            };
            let parsed = if endpoint {
                address::endpoint(text)
            } else {
                address::host(text).map(|host| (host, None))
            };
            let (host, port) = parsed.map_err(|e| self.bad_address(name, text, e))?;
            return Ok(Some((format!("{name}={text}"), host, port)));
        }
        Ok(None)
    }

    /// As [`Reader::master`]; without an answer, this machine if it is the only one, else an error
    /// about `name`.
    pub(super) fn master_of(
        &mut self,
        places: &[MasterIn<'_>],
        ports: &[&str],
        default_port: u16,
        (single_node, scope): (bool, Scope),
        name: &str,
    ) -> Result<Master, EnvError> {
        if let Some(master) = self.master(places, ports, default_port)? {
            return Ok(master);
        }
        if !single_node {
            return Err(self.error(
                Code::MasterAddr,
                name,
                "the host name of the machine of rank 0, since there are several machines",
                "set it to an address that every machine can reach (mpirun: `-x MASTER_ADDR`), \
                 or pass --master-addr HOST",
            ));
        }
        // Ranks that were started one by one must know the port without talking to each other.
        let default = (scope == Scope::Process).then_some(default_port);
        self.loopback(ports, default)
    }

    /// Rank 0 on this machine, which is the only one.
    pub(super) fn loopback(
        &mut self,
        ports: &[&str],
        default: Option<u16>,
    ) -> Result<Master, EnvError> {
        self.said("master_addr", "a single machine");
        Ok(Master {
            addr: LOOPBACK.to_owned(),
            port: self.port(ports, default)?,
            reserved: false,
        })
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

    /// What every launcher with one environment per pod ends with: its ranks.
    pub(super) fn pod(mut self, pod: Pod) -> Result<LaunchEnv, EnvError> {
        let rank_by = self.source_name("node_rank", "--node-rank");
        let nodes_by = self.source_name("nnodes", "--nnodes");
        self.below((&rank_by, pod.node_rank), (&nodes_by, pod.nnodes))?;
        self.refuse_loopback(&pod.master, pod.nnodes > 1 && pod.node_rank > 0)?;
        self.said(
            "world_size",
            format!("{} machines of {} ranks", pod.nnodes, pod.nproc),
        );
        let first = pod.node_rank * pod.nproc;
        let cpu = self.on_cpu();
        let devices = (0..pod.nproc).map(|local| (!cpu).then_some(local));
        Ok(LaunchEnv {
            launcher: self.launcher,
            scope: Scope::Pod,
            world_size: pod.nnodes * pod.nproc,
            nnodes: Some(pod.nnodes),
            node_rank: Some(pod.node_rank),
            local_world_size: Some(pod.nproc),
            ranks: (first..first + pod.nproc).collect(),
            local_ranks: (0..pod.nproc).collect(),
            devices: devices.collect(),
            ..self.rest(pod.master)
        })
    }

    /// What every launcher with one environment per rank ends with.
    pub(super) fn process(mut self, process: Process) -> Result<LaunchEnv, EnvError> {
        let Process {
            world_size,
            rank,
            local_rank,
            master,
            ..
        } = process;
        let world_by = self.source_name("world_size", "the number of ranks");
        let rank_by = self.source_name("ranks", "the rank");
        let local_by = self.source_name("local_ranks", "the local rank");
        if world_size == 0 {
            let fix = "correct it where the job defines it";
            return Err(self.error(Code::Range, &world_by, "at least 1", fix));
        }
        self.below((&rank_by, rank), (&world_by, world_size))?;
        let flag_nodes = self.flag_or(Flag::Nnodes, &[])?;
        let nnodes = self.agree(process.nnodes, flag_nodes, Flag::Nnodes)?;
        let flag_rank = self.flag_or(Flag::NodeRank, &[])?;
        let node_rank = self.agree(process.node_rank, flag_rank, Flag::NodeRank)?;
        let flag_local = self.flag_or(Flag::Nproc, &[])?;
        let local_size = self.agree(process.local_world_size, flag_local, Flag::Nproc)?;
        if let Some(local_size) = local_size {
            let size_by = self.source_name("local_world_size", "the local number of ranks");
            self.below((&local_by, local_rank), (&size_by, local_size))?;
            if local_size > world_size {
                let expected = format!("at most {world_by}, which is {world_size}");
                let fix = "check that both come from the same job";
                return Err(self.error(Code::Range, &size_by, expected, fix));
            }
        }
        if let (Some(node), Some(nodes)) = (node_rank, nnodes) {
            let by = (self.source_name("node_rank", "the node's rank"), node);
            let of = self.source_name("nnodes", "the number of machines");
            self.below((&by.0, by.1), (&of, nodes))?;
        }
        let several = match (nnodes, local_size) {
            (Some(nodes), _) => nodes > 1,
            (None, Some(local)) => local < world_size,
            (None, None) => false,
        };
        self.refuse_loopback(&master, several && node_rank != Some(0))?;
        let device = self.device_of(&local_by, local_rank)?;
        self.note_idle_gpus(local_size);
        Ok(LaunchEnv {
            launcher: self.launcher,
            scope: Scope::Process,
            world_size,
            nnodes,
            node_rank,
            local_world_size: local_size,
            ranks: vec![rank],
            local_ranks: vec![local_rank],
            devices: vec![device],
            ..self.rest(master)
        })
    }

    /// The name of what said `field`: `RANK` of `RANK=3`.
    fn source_name(&self, field: &str, otherwise: &str) -> String {
        let source = self.sources.get(field).map_or(otherwise, String::as_str);
        let end = source.find('=').unwrap_or(source.len());
        let name = &source[..end];
        if name.starts_with("--") {
            name.split(' ').next().unwrap_or(name).to_owned()
        } else {
            name.to_owned()
        }
    }

    /// A launcher that starts every rank itself has its own numbers; a flag may only repeat them.
    fn agree(
        &self,
        known: Option<usize>,
        flag: Option<usize>,
        which: Flag,
    ) -> Result<Option<usize>, EnvError> {
        let (Some(known), Some(given)) = (known, flag) else {
            return Ok(known.or(flag));
        };
        if known == given {
            return Ok(Some(known));
        }
        let name = self.flag(which).map_or(which.names().0, |(name, _)| name);
        Err(self.error_of(
            Code::Conflict,
            name,
            Some(given.to_string()),
            format!(
                "{known}, as {} says, which started every rank itself",
                self.launcher
            ),
            "leave it out, or set it where the launcher is called",
        ))
    }

    fn refuse_loopback(&self, master: &Master, is_elsewhere: bool) -> Result<(), EnvError> {
        if !is_elsewhere || self.one_machine || !address::is_loopback(&master.addr) {
            return Ok(());
        }
        let name = self.source_name("master_addr", "--master-addr");
        Err(self.error_of(
            Code::MasterAddr,
            &name,
            Some(master.addr.clone()),
            "the address of another machine: rank 0 is not on this one, and loopback never leaves it",
            "set it to the host name of rank 0's pod",
        ))
    }

    /// Ends a read: what pods and processes have in common.
    fn rest(self, master: Master) -> LaunchEnv {
        LaunchEnv {
            launcher: self.launcher,
            scope: Scope::Pod,
            world_size: 1,
            nnodes: None,
            node_rank: None,
            local_world_size: None,
            ranks: Vec::new(),
            local_ranks: Vec::new(),
            devices: Vec::new(),
            master_addr: master.addr,
            master_port: master.port,
            master_port_reserved: master.reserved,
            job_id: None,
            restart_count: None,
            token: None,
            warnings: self.warnings,
            sources: self.sources,
        }
    }
}
