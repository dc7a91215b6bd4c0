//! Variables of a launcher that are not all there. To train alone then would be a run per pod, each
//! of which believes that it is the whole.

use super::finish::Pod;
use super::master::DEFAULT_PORT;
use super::reader::{Flag, Reader};
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings, pet};

/// What gives such an environment away, first match first.
const SIGNS: [&str; 15] = [
    "PET_NNODES",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "PMI_RANK",
    "PMIX_RANK",
    "PET_NPROC_PER_NODE",
    "LWS_GROUP_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "PMI_SIZE",
    "FLUX_JOB_SIZE",
    "JAX_NUM_PROCESSES",
    "FERROTUNE_WORLD_SIZE",
    "FERROTUNE_LOCAL_RANK",
];

/// Numbers that mean nothing without a rank, and where it would stand.
const RANKS: [(&str, &str); 6] = [
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("PMI_SIZE", "PMI_RANK"),
    ("FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    ("FERROTUNE_WORLD_SIZE", "FERROTUNE_RANK"),
    ("FERROTUNE_LOCAL_RANK", "FERROTUNE_RANK"),
];

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "unknown",
    variables: &SIGNS,
    detect: |around| SIGNS.iter().any(|sign| around.has(sign)),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    if around.has("PET_NNODES") || around.has("PET_NPROC_PER_NODE") {
        return without_master(around);
    }
    let reader = Reader::new(around, "unknown");
    let sign = SIGNS.into_iter().find(|sign| around.has(sign));
    let sign = sign.unwrap_or(SIGNS[0]);
    // What is there must be well formed before it can be incomplete.
    reader.number(sign)?;
    let start_with = "start this program with its launcher, or pass --standalone to train alone";
    if let Some((_, rank)) = RANKS.iter().find(|(with, _)| *with == sign) {
        let expected = format!("a rank, beside {sign}");
        return Err(reader.error(Code::RankUnknown, rank, expected, start_with));
    }
    Err(match sign {
        "JAX_NUM_PROCESSES" => reader.error(
            Code::MasterAddr,
            "JAX_COORDINATOR_ADDRESS",
            "the host of process 0, beside JAX_NUM_PROCESSES",
            "set JAX_COORDINATOR_ADDRESS, or pass --standalone to train alone",
        ),
        "RANK" if around.has("WORLD_SIZE") || around.has("LOCAL_RANK") => {
            let missing = if around.has("WORLD_SIZE") {
                ("MASTER_ADDR", Code::MasterAddr, "the host of rank 0")
            } else {
                ("WORLD_SIZE", Code::WorldUnknown, "the number of ranks")
            };
            let (name, code, expected) = missing;
            reader.error(code, name, format!("{expected}, beside RANK"), format!("set {name}"))
        }
        "RANK" => reader.error(
            Code::MasterAddr,
            "MASTER_ADDR",
            "the host of rank 0, beside RANK",
            "set MASTER_ADDR and WORLD_SIZE, or pass --standalone to train alone",
        ),
        "WORLD_SIZE" | "LOCAL_RANK" => {
            reader.error(Code::RankUnknown, "RANK", format!("a rank, beside {sign}"), start_with)
        }
        "LWS_GROUP_SIZE" => {
            let expected = "this pod's number in its group";
            reader.error(Code::RankUnknown, "LWS_WORKER_INDEX", expected, start_with)
        }
        _ => reader.error(
            Code::WorldUnknown,
            sign,
            "the number of ranks beside it, which this process manager says only through its library",
            "start it with Open MPI, Hydra or srun, which set variables, or pass --standalone",
        ),
    })
}

/// A PyTorchJob without a master and without an elastic policy: its pods are counted, but have
/// neither rank nor master.
fn without_master(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let mut reader = Reader::new(around, "pytorchjob");
    let nnodes = match around.has("PET_NNODES") {
        true => pet::nnodes(&mut reader)?,
        false => reader.nnodes(&[])?.unwrap_or(1),
    };
    if pet::is_standalone(&reader)? {
        return pet::alone(reader, nnodes);
    }
    let node_rank = reader.flag_or(Flag::NodeRank, &[])?;
    let node_rank = node_rank.or((nnodes == 1).then_some(0)).ok_or_else(|| {
        reader.error(
            Code::RankUnknown,
            "PET_NODE_RANK",
            "this pod's number: a PyTorchJob without a Master gives none",
            "add a Master replica to the job, or pass --node-rank and --master-addr",
        )
    })?;
    let nproc = reader.nproc(Some("PET_NPROC_PER_NODE"))?;
    let master = reader.master_of(
        &[],
        &["PET_MASTER_PORT"],
        DEFAULT_PORT,
        (nnodes == 1, Scope::Pod),
        "PET_MASTER_ADDR",
    )?;
    reader.pod(Pod {
        nnodes,
        node_rank,
        nproc,
        master,
    })
}
