//! Kubeflow Trainer's XGBoost runtime, which has no ranks that could train together.
//!
//! # Source
//! Kubeflow Trainer, the XGBoost plugin.

use super::reader::Reader;
use super::{Code, Launcher};

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "trainjob-xgboost",
    variables: &["DMLC_TRACKER_URI"],
    detect: |around| around.has("DMLC_TRACKER_URI"),
    read: |around| {
        Err(Reader::new(around, "trainjob-xgboost").error(
            Code::UnsupportedRuntime,
            "DMLC_TRACKER_URI",
            "a runtime for torch, jax, mpi or plain programs, not for XGBoost",
            "name another runtime in the TrainJob's `runtimeRef`, such as `torch-distributed`",
        ))
    },
};
