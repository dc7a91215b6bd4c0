//! `RANK` and `MASTER_ADDR` without `LOCAL_RANK`: Volcano's pytorch plugin, PyTorchJob before 1.7,
//! and manifests written by hand. Both operators count pods, whatever the GPUs of one.
//!
//! # Source
//! Volcano, `pkg/controllers/job/plugins/distributed-framework/pytorch`; Training Operator v1.5,
//! `pkg/controller.v1/pytorch/envvar.go`.

use super::finish::Pod;
use super::master::{DEFAULT_PORT, MasterIn};
use super::reader::{Flag, Reader};
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings, address};

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "c10d-env-pod",
    variables: &["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"],
    detect: |around| around.has_all(&["RANK", "MASTER_ADDR"]) && !around.has("LOCAL_RANK"),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let volcano = around.named("VC_*").next().is_some();
    let name = if volcano {
        "volcano-pytorch"
    } else {
        "c10d-env-pod"
    };
    let mut reader = Reader::new(around, name);
    let node_rank = match reader.flag_or(Flag::NodeRank, &["RANK"])? {
        Some(rank) => rank,
        None => reader.need("node_rank", "RANK", Code::RankUnknown)?,
    };
    let nnodes = reader.nnodes(&["WORLD_SIZE"])?;
    let nnodes = nnodes.ok_or_else(|| {
        reader.error(
            Code::WorldUnknown,
            "WORLD_SIZE",
            "the number of pods",
            "pass --nnodes with the number of pods, or set FERROTUNE_NNODES",
        )
    })?;
    if !volcano && !is_operators(&around.host.hostname) {
        refuse_ambiguous(&reader)?;
    }
    let nproc = reader.nproc(None)?;
    let master = reader.master_of(
        &[MasterIn::Host("MASTER_ADDR")],
        &["MASTER_PORT"],
        DEFAULT_PORT,
        (false, Scope::Pod),
        "MASTER_ADDR",
    )?;
    reader.pod(Pod {
        nnodes,
        node_rank,
        nproc,
        master,
    })
}

/// The Training Operator names its pods `JOB-master-0` and `JOB-worker-3`.
fn is_operators(hostname: &str) -> bool {
    let mut parts = address::short(hostname).rsplitn(3, '-');
    let index = parts.next().is_some_and(address::is_decimal);
    let role = parts
        .next()
        .is_some_and(|r| ["master", "worker"].contains(&r));
    index && role && parts.next().is_some_and(|job| !job.is_empty())
}

/// With several GPUs, and nothing that tells what counts `RANK`, both readings train wrongly half of
/// the time.
fn refuse_ambiguous(reader: &Reader<'_>) -> Result<(), EnvError> {
    let several = reader.around.host.gpus > 1 && !reader.around.flags.cpu;
    if !several || reader.flag(Flag::Nproc).is_some() {
        return Ok(());
    }
    Err(reader.error(
        Code::AmbiguousScope,
        "RANK",
        format!(
            "to be told whether it counts pods or processes, since this one sees {} GPUs",
            reader.around.host.gpus
        ),
        "if it counts pods, pass --nproc auto; if it counts processes, set LOCAL_RANK too",
    ))
}

#[cfg(test)]
mod tests {
    use super::is_operators;

    #[test]
    fn pods_of_the_operator_are_known_by_name() {
        assert!(is_operators("a-b-master-0") && is_operators("x-worker-12.ns.svc"));
        for other in [
            "ft-1",
            "worker-1",
            "a-worker-x",
            "a-workers-1",
            "",
            "-worker-1",
        ] {
            assert!(!is_operators(other), "{other:?}");
        }
    }
}
