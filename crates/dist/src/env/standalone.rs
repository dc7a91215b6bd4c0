//! No launcher: this machine with its GPUs, or the machines that the command line counts.

use super::finish::Pod;
use super::master::DEFAULT_PORT;
use super::reader::{Flag, Reader};
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings};

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "standalone",
    variables: &[],
    detect: |_| true,
    read,
};

pub(super) fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let mut reader = Reader::new(around, "standalone");
    if [Flag::Nnodes, Flag::NodeRank, Flag::MasterAddr]
        .into_iter()
        .any(|flag| reader.flag(flag).is_some())
        && !around.flags.standalone
    {
        return read_flags(around);
    }
    let nproc = local_ranks(&mut reader)?;
    let master = reader.loopback(&[], None)?;
    reader.said("nnodes", "no launcher found");
    reader.pod(Pod {
        nnodes: 1,
        node_rank: 0,
        nproc,
        master,
    })
}

fn read_flags(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let mut reader = Reader::new(around, "flags");
    let node_rank = reader.flag_or(Flag::NodeRank, &[])?;
    let nnodes = match reader.nnodes(&[])? {
        Some(nodes) => nodes,
        None if node_rank.is_none_or(|rank| rank == 0) => 1,
        None => return Err(missing(&reader, Code::WorldUnknown, Flag::Nnodes)),
    };
    let node_rank = match node_rank {
        Some(rank) => rank,
        None if nnodes == 1 => 0,
        None => return Err(missing(&reader, Code::RankUnknown, Flag::NodeRank)),
    };
    let nproc = local_ranks(&mut reader)?;
    let master = reader.master_of(
        &[],
        &[],
        DEFAULT_PORT,
        (nnodes == 1, Scope::Pod),
        "--master-addr",
    )?;
    reader.pod(Pod {
        nnodes,
        node_rank,
        nproc,
        master,
    })
}

/// Ranks of a machine that nobody else has counted: without GPUs they compute on the CPU.
fn local_ranks(reader: &mut Reader<'_>) -> Result<usize, EnvError> {
    if reader.around.host.gpus > 0 || reader.around.flags.cpu {
        return reader.nproc(None);
    }
    let cpu = Surroundings {
        flags: super::Flags {
            cpu: true,
            ..reader.around.flags.clone()
        },
        ..reader.around.clone()
    };
    let mut on_cpu = Reader::new(&cpu, reader.launcher);
    let ranks = on_cpu.nproc(None)?;
    reader.said("local_world_size", format!("no GPU, {ranks} on the CPU"));
    Ok(ranks)
}

fn missing(reader: &Reader<'_>, code: Code, flag: Flag) -> EnvError {
    let (name, variable) = flag.names();
    reader.error(
        code,
        name,
        "all of --nnodes, --node-rank and --master-addr, since one of them is given",
        format!("pass {name}, or set {variable}"),
    )
}
