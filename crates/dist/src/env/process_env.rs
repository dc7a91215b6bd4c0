//! The environment of torch.distributed for one rank, set by Ray Train, or by hand.
//!
//! Ray Train runs rank 0's own process group on `MASTER_PORT`, so that port is taken.
//!
//! # Source
//! Ray, `python/ray/train/torch/config.py`.

use super::finish::Process;
use super::master::{DEFAULT_PORT, MasterIn};
use super::reader::Reader;
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings, openmpi};

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "c10d-env-process",
    variables: &[
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    ],
    detect: |around| around.has_all(&["RANK", "WORLD_SIZE", "LOCAL_RANK"]),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let ray = around.has("NODE_RANK") && around.named("RAY_*").next().is_some();
    let name = if ray { "ray-train" } else { "c10d-env-process" };
    let mut reader = Reader::new(around, name);
    let world_size = reader.need("world_size", "WORLD_SIZE", Code::WorldUnknown)?;
    let rank = reader.need("ranks", "RANK", Code::RankUnknown)?;
    let local_rank = reader.need("local_ranks", "LOCAL_RANK", Code::RankUnknown)?;
    openmpi::agrees_with(&reader, world_size, rank, Some(local_rank))?;
    let local_world_size = reader.field("local_world_size", "LOCAL_WORLD_SIZE")?;
    let single_node = world_size == 1 || local_world_size == Some(world_size);
    let mut process = Process {
        world_size,
        rank,
        local_rank,
        local_world_size,
        nnodes: single_node.then_some(1),
        node_rank: reader.field("node_rank", "NODE_RANK")?,
        master: reader.master_of(
            &[MasterIn::Host("MASTER_ADDR")],
            &["MASTER_PORT"],
            DEFAULT_PORT,
            (single_node, Scope::Process),
            "MASTER_ADDR",
        )?,
    };
    process.master.reserved = ray;
    reader.process(process)
}
