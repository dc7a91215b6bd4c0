//! LeaderWorkerSet: one environment per pod; each group of pods is a world of its own.
//!
//! # Source
//! LeaderWorkerSet, `pkg/utils/pod/pod_utils.go`.

use super::finish::Pod;
use super::master::{DEFAULT_PORT, MasterIn};
use super::reader::{Flag, Reader};
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings};

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "lws",
    variables: &["LWS_WORKER_INDEX", "LWS_GROUP_SIZE", "LWS_LEADER_ADDRESS"],
    detect: |around| around.has("LWS_WORKER_INDEX"),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let mut reader = Reader::new(around, "lws");
    let nnodes = reader.nnodes(&["LWS_GROUP_SIZE"])?;
    let nnodes = match nnodes {
        Some(nodes) => nodes,
        None => reader.need("nnodes", "LWS_GROUP_SIZE", Code::WorldUnknown)?,
    };
    let node_rank = reader.flag_or(Flag::NodeRank, &["LWS_WORKER_INDEX"])?;
    let nproc = reader.nproc(None)?;
    let master = reader.master_of(
        &[MasterIn::Host("LWS_LEADER_ADDRESS")],
        &["MASTER_PORT"],
        DEFAULT_PORT,
        (nnodes == 1, Scope::Pod),
        "LWS_LEADER_ADDRESS",
    )?;
    reader.warn(
        "W_LWS_RESTARTS_ON_EXIT",
        "a LeaderWorkerSet starts its pods again after every exit, success included; delete it \
         when the run is done, or use a JobSet",
    );
    reader.pod(Pod {
        nnodes,
        node_rank: node_rank.unwrap_or(0),
        nproc,
        master,
    })
}
