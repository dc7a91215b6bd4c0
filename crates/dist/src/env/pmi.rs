//! MPICH's and Intel MPI's Hydra: one environment per rank, without an address of rank 0.
//!
//! # Source
//! MPICH, `src/pm/hydra`; Intel MPI's `MPI_LOCALRANKID` and `MPI_LOCALNRANKS`.

use super::finish::Process;
use super::reader::Reader;
use super::{Code, EnvError, LaunchEnv, Launcher, Surroundings, openmpi};

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "pmi",
    variables: &[
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        "MASTER_ADDR",
        "MASTER_PORT",
    ],
    detect: |around| around.has_all(&["PMI_RANK", "PMI_SIZE"]),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let mut reader = Reader::new(around, "pmi");
    let world_size = reader.need("world_size", "PMI_SIZE", Code::WorldUnknown)?;
    let rank = reader.need("ranks", "PMI_RANK", Code::RankUnknown)?;
    for (name, value, ours) in [
        ("RANK", rank, "PMI_RANK"),
        ("WORLD_SIZE", world_size, "PMI_SIZE"),
    ] {
        if let Some(number) = reader.number(name)? {
            reader.same((name, number), (ours, value))?;
        }
    }
    let local_world_size = reader.field("local_world_size", "MPI_LOCALNRANKS")?;
    let single_node = world_size == 1 || local_world_size == Some(world_size);
    let local_rank = match reader.field("local_ranks", "MPI_LOCALRANKID")? {
        Some(local) => local,
        // Alone on its machine, or alone with a GPU: no other rank to mix up with.
        None if world_size == 1 => 0,
        None => reader.need("local_ranks", "MPI_LOCALRANKID", Code::RankUnknown)?,
    };
    let master = openmpi::master(&mut reader, single_node)?;
    reader.process(Process {
        world_size,
        rank,
        local_rank,
        local_world_size,
        nnodes: single_node.then_some(1),
        node_rank: single_node.then_some(0),
        master,
    })
}
