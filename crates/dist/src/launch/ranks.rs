//! Starting ranks: what each of them finds in its environment, and where its output goes.

use super::output::{self, Prefixed};
use super::{Launch, LaunchError};
use crate::env::{LaunchEnv, own};
use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// Threads of a rank's own pool, as rayon reads it.
const THREADS: &str = "RAYON_NUM_THREADS";

/// A started rank.
#[derive(Debug)]
pub(super) struct Rank {
    pub(super) rank: usize,
    pub(super) pid: Pid,
}

/// The ranks of this machine, and the threads that pass their output on.
pub(super) struct Ranks {
    pub(super) alive: Vec<Rank>,
    pub(super) output: Prefixed,
}

pub(super) fn start(launch: &Launch, found: &LaunchEnv) -> Result<Ranks, LaunchError> {
    let shared = shared_variables(found, std::env::var_os(THREADS).is_some())?;
    let mut ranks = Ranks {
        alive: Vec::new(),
        output: Prefixed::default(),
    };
    for (&rank, &local) in found.ranks.iter().zip(&found.local_ranks) {
        match start_one(launch, &shared, (rank, local), &mut ranks.output) {
            Ok(pid) => ranks.alive.push(Rank { rank, pid }),
            Err(source) => {
                for started in &ranks.alive {
                    let _ = kill_process_group(started.pid, Signal::KILL);
                }
                let what = format!("rank {rank} ({})", launch.program.display());
                return Err(LaunchError::of(what)(source));
            }
        }
    }
    Ok(ranks)
}

fn start_one(
    launch: &Launch,
    shared: &BTreeMap<&'static str, String>,
    (rank, local): (usize, usize),
    output: &mut Prefixed,
) -> std::io::Result<Pid> {
    let mut command = Command::new(&launch.program);
    command
        .args(&launch.arguments)
        .envs(&launch.variables)
        .envs(shared)
        .env(own::RANK, rank.to_string())
        .env(own::LOCAL_RANK, local.to_string())
        // Flags by their variables are settled now.
        .env_remove("FERROTUNE_NPROC")
        .stdin(Stdio::null())
        // Ctrl-C on a terminal reaches the launcher alone, which passes it on once.
        .process_group(0);
    if rank != 0 {
        let (reader, writer) = std::io::pipe()?;
        command.stdout(writer.try_clone()?).stderr(writer);
        output.pass_on(rank, reader);
    }
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    Ok(pid.expect("a process that exists has a positive number"))
}

/// What is the same for every rank of this machine.
pub(super) fn shared_variables(
    found: &LaunchEnv,
    threads_are_set: bool,
) -> Result<BTreeMap<&'static str, String>, LaunchError> {
    let local = found.ranks.len();
    let port = match found.master_port {
        Some(port) => port,
        None => free_port()?,
    };
    let addr = if found.master_addr.contains(':') {
        format!("[{}]", found.master_addr)
    } else {
        found.master_addr.clone()
    };
    let nnodes = found.nnodes.unwrap_or(1);
    let mut variables = BTreeMap::from([
        (own::WORLD_SIZE, found.world_size.to_string()),
        (own::LOCAL_WORLD_SIZE, local.to_string()),
        (own::NNODES, nnodes.to_string()),
        (own::NODE_RANK, found.node_rank.unwrap_or(0).to_string()),
        (own::MASTER_ADDR, addr),
        (own::MASTER_PORT, port.to_string()),
        (own::LAUNCHER_PID, std::process::id().to_string()),
    ]);
    let alone = nnodes == 1;
    if let Some(job) = &found.job_id {
        variables.insert(own::JOB_ID, job.clone());
    } else if alone {
        variables.insert(own::JOB_ID, format!("local-{}", random_hex::<4>()?));
    }
    if let Some(count) = found.restart_count {
        variables.insert(own::RESTART_ATTEMPT, count.to_string());
    }
    // Pods cannot agree on a random token; theirs is inherited, if there is one.
    if found.token.is_none() && alone {
        variables.insert(own::TOKEN, random_hex::<32>()?);
    }
    if !threads_are_set && local > 1 {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        variables.insert(THREADS, (cores / local).max(1).to_string());
    }
    Ok(variables)
}

/// A port that nobody listens on at this moment.
fn free_port() -> Result<u16, LaunchError> {
    let bound = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    Ok(bound
        .map_err(LaunchError::of("a listener on 127.0.0.1"))?
        .port())
}

fn random_hex<const BYTES: usize>() -> Result<String, LaunchError> {
    let mut bytes = [0; BYTES];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    match filled {
        Ok(count) if count == BYTES => Ok(output::hex(&bytes)),
        Ok(_) => Err(LaunchError::of("a random token")(
            std::io::ErrorKind::UnexpectedEof.into(),
        )),
        Err(error) => Err(LaunchError::of("a random token")(error.into())),
    }
}
