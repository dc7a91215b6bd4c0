//! Which rank a process is, by what its launcher left in the environment.
//!
//! Each launcher has a file with one pure function: variables, facts of the machine, files and flags
//! in, a [`LaunchEnv`] or an [`EnvError`] out. [`detect`] asks them in the order of `LAUNCHERS`,
//! and the first one that recognises its variables answers. Nothing here writes to the environment.

mod address;
pub mod check;
mod error;
mod finish;
mod gpus;
mod launch_env;
mod master;
mod reader;
mod surroundings;
#[cfg(test)]
mod tests;

mod elastic;
mod flux;
mod indexed_job;
mod jax;
mod lws;
mod mpi_role;
mod openmpi;
pub mod own;
mod partial;
mod pet;
mod pmi;
mod process_env;
mod rank_in_pod;
mod ray_cluster;
mod slurm;
mod standalone;
mod torchrun;
mod torchx;
mod volcano;
mod xgboost;

pub use error::{Code, EnvError};
pub use launch_env::{LaunchEnv, Scope, Secret, Warning};
pub use surroundings::{Flags, Host, Surroundings};

/// One launcher: how to recognise it, and how to read it.
pub(crate) struct Launcher {
    /// What it is called before it has been read, which may tell it more exactly.
    name: &'static str,
    /// Names of the variables it is read from; `PREFIX*` stands for many.
    variables: &'static [&'static str],
    /// Whether these surroundings are its.
    detect: fn(&Surroundings) -> bool,
    /// What they say.
    read: fn(&Surroundings) -> Result<LaunchEnv, EnvError>,
}

/// Every launcher, in the order in which they are asked.
///
/// A process inherits the variables of what started its pod, so what starts single ranks comes
/// first; and a rank of ferrotune's own launcher never becomes a launcher itself. Flux and Slurm set PMI's variables beside their own, so they come before it.
const LAUNCHERS: [&Launcher; 22] = [
    &own::LAUNCHER,
    &own::ALONE,
    &torchrun::LAUNCHER,
    &process_env::LAUNCHER,
    &openmpi::LAUNCHER,
    &flux::LAUNCHER,
    &slurm::LAUNCHER,
    &pmi::LAUNCHER,
    &mpi_role::LAUNCHER,
    &elastic::LAUNCHER,
    &pet::LAUNCHER,
    &lws::LAUNCHER,
    &jax::LAUNCHER,
    &xgboost::LAUNCHER,
    &torchx::LAUNCHER,
    &rank_in_pod::LAUNCHER,
    &volcano::LAUNCHER,
    &indexed_job::LAUNCHER,
    &slurm::WITHOUT_SRUN,
    &ray_cluster::LAUNCHER,
    &partial::LAUNCHER,
    &standalone::LAUNCHER,
];

/// Which rank, or ranks, this process has to be.
///
/// # Errors
/// If variables are malformed, contradict each other, or leave a rank or a size open.
pub fn detect(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    refuse_unexpanded(around)?;
    let launcher = LAUNCHERS.iter().find(|launcher| (launcher.detect)(around));
    let read = launcher.map_or(standalone::LAUNCHER.read, |launcher| launcher.read);
    let mut found = read(around)?;
    own::complete(around, &mut found)?;
    Ok(found)
}

/// The kubelet leaves `$(NAME)` as it is where NAME is not defined before it.
fn refuse_unexpanded(around: &Surroundings) -> Result<(), EnvError> {
    if around.flags.standalone {
        return Ok(());
    }
    let broken = around.variables.iter().find(|(name, value)| {
        let known = || {
            let mut names = LAUNCHERS.iter().flat_map(|launcher| launcher.variables);
            names.any(|pattern| is_named(name, pattern))
        };
        (value.contains("$(") || value.contains("${")) && known()
    });
    let Some((name, value)) = broken else {
        return Ok(());
    };
    let launcher = LAUNCHERS.iter().find(|launcher| {
        let mut names = launcher.variables.iter();
        (launcher.detect)(around) && names.any(|pattern| is_named(name, pattern))
    });
    Err(EnvError {
        code: Code::Unexpanded,
        launcher: launcher.map_or("unknown", |launcher| launcher.name),
        variable: name.clone(),
        value: Some(value.clone()),
        expected: "a value, not a reference that nobody replaced".into(),
        fix: "define the variable that it refers to, above it in the pod's list of variables; in \
              shell syntax run the command with `sh -c`"
            .into(),
    })
}

fn is_named(name: &str, pattern: &str) -> bool {
    match pattern.split_once('*') {
        Some((start, end)) => {
            name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
        }
        None => name == pattern,
    }
}

impl Surroundings {
    fn has(&self, name: &str) -> bool {
        self.variables.contains_key(name)
    }

    fn has_all(&self, names: &[&str]) -> bool {
        names.iter().all(|name| self.has(name))
    }

    /// Variables of this pattern, by name.
    fn named<'a>(&'a self, pattern: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        let matching = self
            .variables
            .iter()
            .filter(move |(name, _)| is_named(name, pattern));
        matching.map(|(name, value)| (name.as_str(), value.as_str()))
    }
}
