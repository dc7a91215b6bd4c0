//! PyTorchJob with an elastic policy: the operator gives no rank, since torchrun would agree on one.
//! With a fixed number of pods the pod's name says it.
//!
//! # Source
//! Training Operator v1.9, `pkg/controller.v1/pytorch/elastic.go`.

use super::finish::Pod;
use super::master::MasterIn;
use super::reader::{Flag, Reader};
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings, address, pet};

/// Where torchrun's c10d rendezvous listens if nothing says so.
pub(super) const RENDEZVOUS_PORT: u16 = 29400;
const NAME: &str = "pytorchjob-elastic-fixed";

pub(super) static LAUNCHER: Launcher = Launcher {
    name: NAME,
    variables: &[
        "PET_RDZV_ENDPOINT",
        "PET_RDZV_BACKEND",
        "PET_NNODES",
        "PET_NPROC_PER_NODE",
        "PET_STANDALONE",
    ],
    detect: |around| around.has("PET_RDZV_ENDPOINT") && !around.has("PET_NODE_RANK"),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let mut reader = Reader::new(around, NAME);
    let nnodes = pet::nnodes(&mut reader)?;
    if pet::is_standalone(&reader)? {
        return pet::alone(reader, nnodes);
    }
    let node_rank = match reader.flag_or(Flag::NodeRank, &[])? {
        Some(rank) => rank,
        None => by_hostname(&mut reader, nnodes)?,
    };
    let nproc = reader.nproc(Some("PET_NPROC_PER_NODE"))?;
    let backend = reader.variable("PET_RDZV_BACKEND");
    let by_peer = !backend.is_some_and(|backend| backend.starts_with("etcd"));
    if !by_peer && reader.flag(Flag::MasterAddr).is_none() {
        return Err(reader.error(
            Code::MasterAddr,
            "PET_RDZV_BACKEND",
            "`c10d`, whose endpoint is a pod of the job; etcd's endpoint is not",
            "set `rdzvBackend: c10d`, or pass --master-addr with the name of worker 0's pod",
        ));
    }
    let master = reader.master_of(
        &[MasterIn::Endpoint("PET_RDZV_ENDPOINT")],
        &[],
        RENDEZVOUS_PORT,
        (false, Scope::Pod),
        "PET_RDZV_ENDPOINT",
    )?;
    let job_id = reader.variable("PET_RDZV_ID").map(str::to_owned);
    let pod = Pod {
        nnodes,
        node_rank,
        nproc,
        master,
    };
    Ok(LaunchEnv {
        job_id,
        ..reader.pod(pod)?
    })
}

/// The operator names pods `JOB-worker-INDEX`.
fn by_hostname(reader: &mut Reader<'_>, nnodes: usize) -> Result<usize, EnvError> {
    let hostname = address::short(&reader.around.host.hostname);
    let index = hostname.rsplit_once("-worker-").map(|(_, index)| index);
    if let Some(index) = index.filter(|index| address::is_decimal(index))
        && let Ok(index) = index.parse()
    {
        reader.said("node_rank", format!("hostname={hostname}"));
        return Ok(index);
    }
    if nnodes == 1 {
        return Ok(0);
    }
    Err(EnvError {
        value: Some(hostname.to_owned()),
        ..reader.error(
            Code::RankUnknown,
            "hostname",
            "a pod named like JOB-worker-3: an elastic PyTorchJob says no rank elsewhere",
            "pass --node-rank, or leave the pod's hostname as the operator sets it",
        )
    })
}
