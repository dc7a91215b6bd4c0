//! Open MPI's mpirun: one environment per rank, without an address of rank 0.
//!
//! `OMPI_COMM_WORLD_NODE_RANK` is the rank of a process on its machine, not of the machine, so
//! nothing says which machine this is. Ranks on other machines have only what `mpirun -x` passes on.
//!
//! # Source
//! Open MPI 5 documentation, "Environment variables set for MPI applications"; Kubeflow MPI
//! operator, `pkg/controller/mpi_job_controller.go`, for the file of hosts.

use super::finish::Process;
use super::master::{DEFAULT_PORT, Master, MasterIn};
use super::reader::Reader;
use super::surroundings::MPI_HOSTFILE;
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings};

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "openmpi",
    variables: &[
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ],
    detect: |around| around.has("OMPI_COMM_WORLD_RANK"),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let mut reader = Reader::new(around, "openmpi");
    let world_size = reader.need("world_size", "OMPI_COMM_WORLD_SIZE", Code::WorldUnknown)?;
    let rank = reader.need("ranks", "OMPI_COMM_WORLD_RANK", Code::RankUnknown)?;
    let local_rank = reader.need(
        "local_ranks",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        Code::RankUnknown,
    )?;
    for (name, value, ours) in [
        ("RANK", rank, "OMPI_COMM_WORLD_RANK"),
        ("WORLD_SIZE", world_size, "OMPI_COMM_WORLD_SIZE"),
    ] {
        if let Some(number) = reader.number(name)? {
            reader.same((name, number), (ours, value))?;
        }
    }
    let local_world_size = reader.field("local_world_size", "OMPI_COMM_WORLD_LOCAL_SIZE")?;
    let single_node = world_size == 1 || local_world_size == Some(world_size);
    let master = master(&mut reader, single_node)?;
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

/// The address of rank 0 under an MPI: passed on by `-x`, else the first host of the job's list.
pub(super) fn master(reader: &mut Reader<'_>, single_node: bool) -> Result<Master, EnvError> {
    let mut places = vec![MasterIn::Host("MASTER_ADDR")];
    let listed = reader.around.files.get(MPI_HOSTFILE);
    if let Some(host) = listed.and_then(|text| first_host(text)) {
        places.push(MasterIn::Named {
            source: format!("{MPI_HOSTFILE}, line 1"),
            host: host.to_owned(),
        });
    }
    reader.master_of(
        &places,
        &["MASTER_PORT"],
        DEFAULT_PORT,
        (single_node, Scope::Process),
        "MASTER_ADDR",
    )
}

/// `host slots=N` or `host:N`; comments and empty lines say nothing.
fn first_host(hostfile: &str) -> Option<&str> {
    let mut lines = hostfile.lines().map(str::trim);
    let line = lines.find(|line| !line.is_empty() && !line.starts_with('#'))?;
    line.split([' ', '\t', ':']).next()
}

/// Where a rank is given both by mpirun and by `RANK`, both must be the same.
pub(super) fn agrees_with(
    reader: &Reader<'_>,
    world_size: usize,
    rank: usize,
    local_rank: Option<usize>,
) -> Result<(), EnvError> {
    let pairs = [
        ("RANK", Some(rank), "OMPI_COMM_WORLD_RANK"),
        ("WORLD_SIZE", Some(world_size), "OMPI_COMM_WORLD_SIZE"),
        ("LOCAL_RANK", local_rank, "OMPI_COMM_WORLD_LOCAL_RANK"),
    ];
    for (name, value, theirs) in pairs {
        if let (Some(value), Some(other)) = (value, reader.number(theirs)?) {
            reader.same((name, value), (theirs, other))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::first_host;

    #[test]
    fn hosts_are_read_in_both_spellings() {
        assert_eq!(first_host("\n# x\na.b slots=2\nc\n"), Some("a.b"));
        assert_eq!(first_host("a:2\n"), Some("a"));
        assert_eq!(first_host(" \n"), None);
    }
}
