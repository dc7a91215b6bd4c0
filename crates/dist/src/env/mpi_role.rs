//! A pod of an MPI job that mpirun has not started: only mpirun's children have a rank.
//!
//! # Source
//! Kubeflow MPI operator, `pkg/controller/mpi_job_controller.go`; Kubeflow Trainer, the MPI plugin;
//! Volcano, the mpi plugin.

use super::reader::Reader;
use super::{Code, EnvError, LaunchEnv, Launcher, Surroundings};

/// What gives such a pod away, first match first.
const SIGNS: [&str; 5] = [
    "K_MPI_JOB_ROLE",
    "OMPI_MCA_orte_default_hostfile",
    "I_MPI_HYDRA_HOST_FILE",
    "HYDRA_HOST_FILE",
    "MPI_HOST",
];

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "mpi-pod",
    variables: &SIGNS,
    detect: |around| SIGNS.iter().any(|sign| around.has(sign)),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let reader = Reader::new(around, "mpi-pod");
    let sign = SIGNS.into_iter().find(|sign| around.has(sign));
    let sign = sign.unwrap_or(SIGNS[0]);
    let fix = if reader.variable("K_MPI_JOB_ROLE") == Some("worker") {
        "leave the worker's command to the operator (it runs sshd), and start this program with \
         mpirun in the launcher pod"
    } else {
        "start it as `mpirun ferrotune ...` in this pod"
    };
    let expected = "that mpirun starts this program: a pod of an MPI job has no rank itself";
    Err(reader.error(Code::WrongRole, sign, expected, fix))
}
