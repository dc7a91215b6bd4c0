//! Flux: one environment per task, with PMI's variables beside its own.
//!
//! # Source
//! Kubeflow Trainer, the Flux plugin's entrypoint; flux-core's shell.

use super::finish::Process;
use super::master::{DEFAULT_PORT, MasterIn};
use super::reader::Reader;
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings};

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "flux",
    variables: &[
        "FLUX_TASK_RANK",
        "FLUX_JOB_SIZE",
        "FLUX_TASK_LOCAL_ID",
        "FLUX_JOB_NNODES",
        "FLUX_JOB_ID",
        "MASTER_ADDR",
        "MASTER_PORT",
    ],
    detect: |around| around.has("FLUX_TASK_RANK"),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let mut reader = Reader::new(around, "flux");
    let world_size = reader.need("world_size", "FLUX_JOB_SIZE", Code::WorldUnknown)?;
    let rank = reader.need("ranks", "FLUX_TASK_RANK", Code::RankUnknown)?;
    let local_rank = reader.need("local_ranks", "FLUX_TASK_LOCAL_ID", Code::RankUnknown)?;
    for (name, value, theirs) in [
        ("FLUX_TASK_RANK", rank, "PMI_RANK"),
        ("FLUX_JOB_SIZE", world_size, "PMI_SIZE"),
    ] {
        if let Some(number) = reader.number(theirs)? {
            reader.same((name, value), (theirs, number))?;
        }
    }
    let nnodes = reader.nnodes(&["FLUX_JOB_NNODES"])?;
    let single_node = nnodes == Some(1) || world_size == 1;
    let master = reader.master_of(
        &[MasterIn::Host("MASTER_ADDR")],
        &["MASTER_PORT"],
        DEFAULT_PORT,
        (single_node, Scope::Process),
        "MASTER_ADDR",
    )?;
    let job_id = reader.variable("FLUX_JOB_ID").map(str::to_owned);
    let process = Process {
        world_size,
        rank,
        local_rank,
        local_world_size: single_node.then_some(world_size),
        nnodes: if single_node { Some(1) } else { nnodes },
        node_rank: single_node.then_some(0),
        master,
    };
    Ok(LaunchEnv {
        job_id,
        ..reader.process(process)?
    })
}
