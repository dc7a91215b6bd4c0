//! Indexed Jobs and JobSets: an index per pod, and nothing that counts the pods.
//!
//! A JobSet of several Jobs can say more by the downward API: `JOB_INDEX`, `PODS_PER_JOB` and
//! `REPLICATED_JOB_REPLICAS`.
//!
//! # Source
//! Kubernetes, `pkg/controller/job/indexed_job_utils.go`; JobSet, `pkg/controllers`.

use super::finish::Pod;
use super::master::{DEFAULT_PORT, MasterIn};
use super::reader::{Flag, Reader};
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings};

const INDEX: &str = "JOB_COMPLETION_INDEX";
const JOB: &str = "JOB_INDEX";
const PODS: &str = "PODS_PER_JOB";
const JOBS: &str = "REPLICATED_JOB_REPLICAS";

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "indexed-job",
    variables: &[INDEX, JOB, PODS, JOBS, "MASTER_ADDR", "MASTER_PORT"],
    detect: |around| around.has(INDEX),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let jobset = [JOB, PODS, JOBS].iter().any(|name| around.has(name));
    let name = if jobset { "jobset" } else { "indexed-job" };
    let mut reader = Reader::new(around, name);
    let index = reader.need("node_rank", INDEX, Code::RankUnknown)?;
    let place = place_of_job(&mut reader, index)?;
    let node_rank = match reader.flag_or(Flag::NodeRank, &[])? {
        Some(rank) => rank,
        None => place.rank,
    };
    let nnodes = match (reader.nnodes(&[])?, place.nnodes) {
        (Some(nodes), _) | (None, Some(nodes)) => nodes,
        (None, None) => one_pod(&mut reader, node_rank)?,
    };
    let nproc = reader.nproc(None)?;
    let master = reader.master_of(
        &[MasterIn::Host("MASTER_ADDR")],
        &["MASTER_PORT"],
        DEFAULT_PORT,
        (nnodes == 1, Scope::Pod),
        "MASTER_ADDR",
    )?;
    reader.pod(Pod {
        nnodes,
        node_rank,
        nproc,
        master,
    })
}

/// A pod among those of all Jobs of a JobSet.
struct Place {
    rank: usize,
    nnodes: Option<usize>,
}

fn place_of_job(reader: &mut Reader<'_>, index: usize) -> Result<Place, EnvError> {
    let (job, pods, jobs) = (
        reader.number(JOB)?,
        reader.number(PODS)?,
        reader.number(JOBS)?,
    );
    let at_least_one = |name: &str, number: Option<usize>| {
        if number == Some(0) {
            let fix = "correct it in the JobSet's template";
            return Err(reader.error(Code::Range, name, "at least 1", fix));
        }
        Ok(())
    };
    at_least_one(PODS, pods)?;
    at_least_one(JOBS, jobs)?;
    if let Some(pods) = pods {
        reader.below((INDEX, index), (PODS, pods))?;
    }
    if let (Some(job), Some(jobs)) = (job, jobs) {
        reader.below((JOB, job), (JOBS, jobs))?;
    }
    let first = match (job, pods, jobs) {
        (None | Some(0), _, _) if jobs.is_none_or(|jobs| jobs == 1) || job.is_some() => 0,
        (Some(job), Some(pods), _) => job * pods,
        (Some(_), None, _) => return Err(unknown(reader, PODS, "the pods of each Job")),
        (None, _, _) => return Err(unknown(reader, JOB, "the number of this pod's Job")),
    };
    let nnodes = match (pods, jobs) {
        (Some(pods), Some(jobs)) => Some(pods * jobs),
        // Without a number of its Job the pod belongs to the only one.
        (Some(pods), None) if job.is_none() => Some(pods),
        _ => None,
    };
    let source = format!("{INDEX}={index}");
    if first > 0 {
        reader.said(
            "node_rank",
            format!("{source} after {first} pods of other Jobs"),
        );
    }
    if nnodes.is_some() {
        reader.said("nnodes", format!("{JOBS} times {PODS}"));
    }
    Ok(Place {
        rank: first + index,
        nnodes,
    })
}

fn unknown(reader: &Reader<'_>, name: &str, what: &str) -> EnvError {
    reader.error(
        Code::WorldUnknown,
        name,
        format!("{what}, since the JobSet has several Jobs"),
        "map the JobSet's labels to JOB_INDEX and REPLICATED_JOB_REPLICAS, and set PODS_PER_JOB",
    )
}

/// Only the first pod may be alone, and only if nothing hints at others.
fn one_pod(reader: &mut Reader<'_>, node_rank: usize) -> Result<usize, EnvError> {
    let hint = reader.variable("MASTER_ADDR").is_some();
    let jobs = reader.variable(JOBS).is_some() || reader.variable(JOB).is_some();
    if node_rank > 0 || hint || jobs {
        return Err(reader.error(
            Code::WorldUnknown,
            "FERROTUNE_NNODES",
            format!(
                "the number of pods: this one is number {node_rank}, and no variable counts them"
            ),
            "pass --nnodes with the Job's `completions`, or set FERROTUNE_NNODES to it",
        ));
    }
    reader.said("nnodes", "assumed");
    reader.warn(
        "W_WORLD_ASSUMED_ONE_POD",
        "an Indexed Job does not say how many pods it has; this one, number 0, trains alone. If \
         there are more, pass --nnodes",
    );
    Ok(1)
}
