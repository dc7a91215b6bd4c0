//! JAX environments: one per pod, of Kubeflow Trainer and of the Training Operator's JAXJob.
//!
//! # Source
//! Kubeflow Trainer, the JAX plugin; Training Operator v1.9, `pkg/controller.v1/jax/envvar.go`.

use super::finish::Pod;
use super::master::{DEFAULT_PORT, MasterIn};
use super::reader::{Flag, Reader};
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings};

/// Where a JAXJob's coordinator listens if nothing says so.
const JAXJOB_PORT: u16 = 6666;

struct Names {
    launcher: &'static str,
    address: &'static str,
    port: &'static [&'static str],
    default_port: u16,
    nodes: &'static str,
    rank: &'static str,
}

const TRAINER: Names = Names {
    launcher: "trainjob-jax",
    address: "JAX_COORDINATOR_ADDRESS",
    port: &[],
    default_port: DEFAULT_PORT,
    nodes: "JAX_NUM_PROCESSES",
    rank: "JAX_PROCESS_ID",
};

const JAXJOB: Names = Names {
    launcher: "jaxjob",
    address: "COORDINATOR_ADDRESS",
    port: &["COORDINATOR_PORT"],
    default_port: JAXJOB_PORT,
    nodes: "NUM_PROCESSES",
    rank: "PROCESS_ID",
};

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "jax",
    variables: &[
        "JAX_COORDINATOR_ADDRESS",
        "JAX_NUM_PROCESSES",
        "JAX_PROCESS_ID",
        "COORDINATOR_ADDRESS",
        "COORDINATOR_PORT",
        "NUM_PROCESSES",
        "PROCESS_ID",
    ],
    detect: |around| around.has(TRAINER.address) || around.has(JAXJOB.address),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let names = if around.has(TRAINER.address) {
        &TRAINER
    } else {
        &JAXJOB
    };
    let mut reader = Reader::new(around, names.launcher);
    let nnodes = match reader.nnodes(&[names.nodes])? {
        Some(nodes) => nodes,
        None => reader.need("nnodes", names.nodes, Code::WorldUnknown)?,
    };
    let node_rank = match reader.flag_or(Flag::NodeRank, &[names.rank])? {
        Some(rank) => rank,
        None => reader.need("node_rank", names.rank, Code::RankUnknown)?,
    };
    if let Some(index) = reader.number("JOB_COMPLETION_INDEX")?
        && reader.flag(Flag::NodeRank).is_none()
    {
        reader.same((names.rank, node_rank), ("JOB_COMPLETION_INDEX", index))?;
    }
    let nproc = reader.nproc(None)?;
    let master = reader.master_of(
        &[MasterIn::Endpoint(names.address)],
        names.port,
        names.default_port,
        (false, Scope::Pod),
        names.address,
    )?;
    let by_variable = names
        .port
        .iter()
        .find_map(|n| Some((*n, reader.variable(n)?)));
    if let (Some((name, text)), Some(port)) = (by_variable, master.port)
        && reader.flag(Flag::MasterPort).is_none()
        && reader.flag(Flag::MasterAddr).is_none()
    {
        let stated = reader.parse_port(name, text)?;
        reader.same((name, stated.into()), (names.address, port.into()))?;
    }
    reader.pod(Pod {
        nnodes,
        node_rank,
        nproc,
        master,
    })
}
