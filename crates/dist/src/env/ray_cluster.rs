//! A pod of a Ray cluster outside of Ray Train: Ray gives ranks to its workers, not to pods.
//!
//! # Source
//! KubeRay, `ray-operator/controllers/ray/common/pod.go`.

use super::reader::Reader;
use super::{Code, Launcher, Surroundings};

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "ray-cluster",
    variables: &[],
    detect: |around| sign(around).is_some(),
    read: |around| {
        let name = sign(around).unwrap_or("RAY_CLUSTER_NAME");
        Err(Reader::new(around, "ray-cluster").error(
            Code::WrongRole,
            name,
            "that Ray Train starts this program: a pod of a Ray cluster has no rank",
            "start it from the training function of a TorchTrainer, or pass --standalone to train \
             on this pod alone",
        ))
    },
};

fn sign(around: &Surroundings) -> Option<&str> {
    let name = around.has("RAY_CLUSTER_NAME").then_some("RAY_CLUSTER_NAME");
    name.or_else(|| around.named("KUBERAY_*").next().map(|(name, _)| name))
}
