//! torchrun: one environment per rank, laid over the one that its pod has.
//!
//! `TORCHELASTIC_RUN_ID` says that torchrun started this process, so it goes before all that the pod
//! itself was given.
//!
//! # Source
//! PyTorch, `torch/distributed/elastic/agent/server/local_elastic_agent.py`.

use super::finish::Process;
use super::master::{DEFAULT_PORT, MasterIn};
use super::reader::Reader;
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings};

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "torchrun",
    variables: &[
        "TORCHELASTIC_RUN_ID",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_USE_AGENT_STORE",
    ],
    detect: |around| around.has("TORCHELASTIC_RUN_ID"),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let mut reader = Reader::new(around, "torchrun");
    let mut process = Process {
        world_size: reader.need("world_size", "WORLD_SIZE", Code::WorldUnknown)?,
        rank: reader.need("ranks", "RANK", Code::RankUnknown)?,
        local_rank: reader.need("local_ranks", "LOCAL_RANK", Code::RankUnknown)?,
        local_world_size: reader.field("local_world_size", "LOCAL_WORLD_SIZE")?,
        nnodes: reader.field("nnodes", "GROUP_WORLD_SIZE")?,
        node_rank: reader.field("node_rank", "GROUP_RANK")?,
        master: reader.master_of(
            &[MasterIn::Host("MASTER_ADDR")],
            &["MASTER_PORT"],
            DEFAULT_PORT,
            (false, Scope::Process),
            "MASTER_ADDR",
        )?,
    };
    let store = reader.variable("TORCHELASTIC_USE_AGENT_STORE");
    process.master.reserved = matches!(store, Some("True" | "true" | "1"));
    let restart_count = reader.field("restart_count", "TORCHELASTIC_RESTART_COUNT")?;
    let job = reader.variable("TORCHELASTIC_RUN_ID");
    let job_id = job
        .filter(|id| !["", "none"].contains(id))
        .map(str::to_owned);
    if job_id.is_some() {
        reader.said("job_id", "TORCHELASTIC_RUN_ID");
    }
    Ok(LaunchEnv {
        job_id,
        restart_count,
        ..reader.process(process)?
    })
}
