//! What every launcher ends with: the checks that hold for all of them, and the ranks.

use super::master::Master;
use super::reader::{Flag, Reader};
use super::{Code, EnvError, LaunchEnv, Scope, address};

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

impl Reader<'_> {
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
    pub(super) fn process(mut self, mut process: Process) -> Result<LaunchEnv, EnvError> {
        let Process {
            world_size,
            rank,
            local_rank,
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
        self.agree_with_flags(&mut process)?;
        self.check_local(&process, (&local_by, &world_by))?;
        let (nnodes, node_rank) = (process.nnodes, process.node_rank);
        let local_size = process.local_world_size;
        let several = match (nnodes, local_size) {
            (Some(nodes), _) => nodes > 1,
            (None, Some(local)) => local < world_size,
            (None, None) => false,
        };
        self.refuse_loopback(&process.master, several && node_rank != Some(0))?;
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
            ..self.rest(process.master)
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

    fn agree_with_flags(&mut self, process: &mut Process) -> Result<(), EnvError> {
        let nnodes = self.flag_or(Flag::Nnodes, &[])?;
        process.nnodes = self.agree(process.nnodes, nnodes, Flag::Nnodes)?;
        let node_rank = self.flag_or(Flag::NodeRank, &[])?;
        process.node_rank = self.agree(process.node_rank, node_rank, Flag::NodeRank)?;
        // `auto` leaves the number to the launcher.
        if self
            .flag(Flag::Nproc)
            .is_some_and(|(_, text)| text != "auto")
        {
            let nproc = self.flag_or(Flag::Nproc, &[])?;
            process.local_world_size = self.agree(process.local_world_size, nproc, Flag::Nproc)?;
        }
        Ok(())
    }

    /// Numbers on this machine are below their counts, and these below those of the whole.
    fn check_local(
        &self,
        process: &Process,
        (local_by, world_by): (&str, &str),
    ) -> Result<(), EnvError> {
        if let Some(local_size) = process.local_world_size {
            let size_by = self.source_name("local_world_size", "the local number of ranks");
            self.below((local_by, process.local_rank), (&size_by, local_size))?;
            if local_size > process.world_size {
                let expected = format!("at most {world_by}, which is {}", process.world_size);
                let fix = "check that both come from the same job";
                return Err(self.error(Code::Range, &size_by, expected, fix));
            }
        }
        if let (Some(node), Some(nodes)) = (process.node_rank, process.nnodes) {
            let by = self.source_name("node_rank", "the node's rank");
            let of = self.source_name("nnodes", "the number of machines");
            self.below((&by, node), (&of, nodes))?;
        }
        Ok(())
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
