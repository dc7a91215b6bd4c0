//! TorchX: its schedulers say where rank 0 is, but not which replica this is.
//!
//! On Volcano each replica is a task of its own, so `VC_TASK_INDEX` is 0 everywhere.
//!
//! # Source
//! TorchX, `torchx/schedulers/kubernetes_scheduler.py` and `kubernetes_mcad_scheduler.py`.

use super::finish::Pod;
use super::master::{DEFAULT_PORT, MasterIn};
use super::reader::{Flag, Reader};
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings};

const JOB: &str = "TORCHX_JOB_ID";
const RANK0: &str = "TORCHX_RANK0_HOST";

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "torchx",
    variables: &[
        JOB,
        RANK0,
        "TORCHX_MCAD_*_0_HOSTS",
        "VC_*_0_HOSTS",
        "MASTER_PORT",
    ],
    detect: |around| around.has(JOB),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let mut reader = Reader::new(around, "torchx");
    let nnodes = reader.nnodes(&[])?;
    let node_rank = reader.flag_or(Flag::NodeRank, &[])?;
    let node_rank = node_rank
        .or((nnodes == Some(1)).then_some(0))
        .ok_or_else(|| {
            reader.error(
                Code::RankUnknown,
                "--node-rank",
                "this replica's number, which TorchX puts nowhere but into its macro",
                "add `--node-rank ${replica_id}` to the role's arguments",
            )
        })?;
    let nnodes = nnodes.ok_or_else(|| {
        reader.error(
            Code::WorldUnknown,
            "--nnodes",
            "the number of replicas",
            "add `--nnodes N` to the role's arguments",
        )
    })?;
    let nproc = reader.nproc(None)?;
    let rank0 = rank0_host(around);
    let mut places = vec![MasterIn::Host(RANK0)];
    places.extend(rank0.map(MasterIn::Host));
    let master = reader.master_of(
        &places,
        &["MASTER_PORT"],
        DEFAULT_PORT,
        (nnodes == 1, Scope::Pod),
        "--master-addr",
    )?;
    let local = around.variables[JOB].starts_with("local");
    if local {
        reader.replicas_share_this_machine();
    }
    let pod = Pod {
        nnodes,
        node_rank,
        nproc,
        master,
    };
    let job_id = reader.variable(JOB).map(str::to_owned);
    reader.said("job_id", JOB);
    Ok(LaunchEnv {
        job_id,
        ..reader.pod(pod)?
    })
}

/// The variable that names replica 0's pod to the others, if there is exactly one.
fn rank0_host(around: &Surroundings) -> Option<&str> {
    let mut names = around
        .named("VC_*_0_HOSTS")
        .chain(around.named("TORCHX_MCAD_*_0_HOSTS"));
    let (name, _) = names.next()?;
    names.next().is_none().then_some(name)
}
