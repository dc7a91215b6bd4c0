//! ferrotune's own variables: those that `ferrotune launch` gives to its ranks, and those that stand
//! for its flags.

use super::finish::Process;
use super::launch_env::Secret;
use super::master::{DEFAULT_PORT, MasterIn};
use super::reader::Reader;
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings, standalone};

/// Rank of this process.
pub const RANK: &str = "FERROTUNE_RANK";
/// Ranks of the whole run.
pub const WORLD_SIZE: &str = "FERROTUNE_WORLD_SIZE";
/// Rank of this process on its machine.
pub const LOCAL_RANK: &str = "FERROTUNE_LOCAL_RANK";
/// Ranks on this machine.
pub const LOCAL_WORLD_SIZE: &str = "FERROTUNE_LOCAL_WORLD_SIZE";
/// Machines.
pub const NNODES: &str = "FERROTUNE_NNODES";
/// This machine, from 0.
pub const NODE_RANK: &str = "FERROTUNE_NODE_RANK";
/// The machine of rank 0.
pub const MASTER_ADDR: &str = "FERROTUNE_MASTER_ADDR";
/// Where rank 0 listens.
pub const MASTER_PORT: &str = "FERROTUNE_MASTER_PORT";
/// The name of the run.
pub const JOB_ID: &str = "FERROTUNE_JOB_ID";
/// How often the run was started before.
pub const RESTART_ATTEMPT: &str = "FERROTUNE_RESTART_ATTEMPT";
/// What the ranks of a run share, to keep strangers out.
pub const TOKEN: &str = "FERROTUNE_TOKEN";
/// Process id of the launcher that started this rank.
pub const LAUNCHER_PID: &str = "FERROTUNE_LAUNCHER_PID";

/// `--standalone`: whatever the variables say.
pub(super) static ALONE: Launcher = Launcher {
    name: "standalone",
    variables: &[],
    detect: |around| around.flags.standalone,
    read: standalone::read,
};

/// A rank of `ferrotune launch`.
pub(super) static LAUNCHER: Launcher = Launcher {
    name: "ferrotune",
    // Without the token, which no message may show.
    variables: &[
        RANK,
        WORLD_SIZE,
        LOCAL_RANK,
        LOCAL_WORLD_SIZE,
        NNODES,
        NODE_RANK,
        "FERROTUNE_NPROC",
        MASTER_ADDR,
        MASTER_PORT,
        JOB_ID,
        RESTART_ATTEMPT,
    ],
    detect: |around| around.has(RANK),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let mut reader = Reader::new(around, "ferrotune");
    let process = Process {
        world_size: reader.need("world_size", WORLD_SIZE, Code::WorldUnknown)?,
        rank: reader.need("ranks", RANK, Code::RankUnknown)?,
        local_rank: reader.need("local_ranks", LOCAL_RANK, Code::RankUnknown)?,
        local_world_size: reader.field("local_world_size", LOCAL_WORLD_SIZE)?,
        nnodes: reader.field("nnodes", NNODES)?,
        node_rank: reader.field("node_rank", NODE_RANK)?,
        master: reader.master_of(
            &[MasterIn::Endpoint(MASTER_ADDR)],
            &[MASTER_PORT],
            DEFAULT_PORT,
            (false, Scope::Process),
            MASTER_ADDR,
        )?,
    };
    reader.process(process)
}

/// What only ferrotune's own variables say, for every launcher: the name of the run, the attempt,
/// the token.
pub(super) fn complete(around: &Surroundings, found: &mut LaunchEnv) -> Result<(), EnvError> {
    let reader = Reader::new(around, found.launcher);
    let set = |name| reader.variable(name).filter(|text| !text.is_empty());
    if let Some(job) = set(JOB_ID) {
        found.job_id = Some(job.to_owned());
        found.sources.insert("job_id", JOB_ID.to_owned());
    }
    if let Some(attempt) = reader.number(RESTART_ATTEMPT)? {
        found.restart_count = Some(attempt);
        let source = format!("{RESTART_ATTEMPT}={attempt}");
        found.sources.insert("restart_count", source);
    }
    if set(TOKEN).is_some_and(|text| text.contains("$(") || text.contains("${")) {
        let fix = "define the Secret's variable above it in the pod's list of variables";
        let expected = "a secret, not a reference that nobody replaced";
        // What surrounds the reference may be secret.
        return Err(reader.error_of(Code::Unexpanded, TOKEN, None, expected, fix));
    }
    found.token = set(TOKEN).map(|token| Secret(token.to_owned()));
    Ok(())
}
