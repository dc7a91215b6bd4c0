//! Slurm: `srun` makes one environment per task. The shell of a batch script has some of the same
//! variables, but is no task.
//!
//! # Source
//! Slurm, srun(1), "OUTPUT ENVIRONMENT VARIABLES".

use super::finish::Process;
use super::master::{DEFAULT_PORT, MasterIn};
use super::reader::Reader;
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings, address};

const TASKS: &str = "SLURM_STEP_NUM_TASKS";
const NODES: &str = "SLURM_STEP_NUM_NODES";
const LIST: &str = "SLURM_STEP_NODELIST";
const PER_NODE: &str = "SLURM_STEP_TASKS_PER_NODE";
const NODE: &str = "SLURM_NODEID";

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "slurm",
    variables: &[
        TASKS,
        NODES,
        LIST,
        PER_NODE,
        NODE,
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_JOB_ID",
        "MASTER_ADDR",
        "MASTER_PORT",
    ],
    detect: |around| around.has_all(&[TASKS, "SLURM_PROCID"]),
    read,
};

/// A batch script's or an allocation's shell.
pub(super) static WITHOUT_SRUN: Launcher = Launcher {
    name: "slurm",
    variables: &[],
    detect: |around| around.has("SLURM_JOB_ID"),
    read: |around| {
        Err(Reader::new(around, "slurm").error(
            Code::WrongRole,
            "SLURM_JOB_ID",
            "that srun starts this program: an allocation's shell is no task",
            "start it as `srun ferrotune ...`, or pass --standalone to use this machine alone",
        ))
    },
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let mut reader = Reader::new(around, "slurm");
    let world_size = reader.need("world_size", TASKS, Code::WorldUnknown)?;
    let rank = reader.need("ranks", "SLURM_PROCID", Code::RankUnknown)?;
    let local_rank = reader.need("local_ranks", "SLURM_LOCALID", Code::RankUnknown)?;
    let hosts = reader.variable(LIST).map(|list| {
        expand(list).ok_or_else(|| {
            let fix = "run this program with srun itself";
            let expected = "a list of hosts like gpu[07-08,10],login";
            reader.error(Code::MasterAddr, LIST, expected, fix)
        })
    });
    let hosts = hosts.transpose()?;
    let nnodes = reader.field("nnodes", NODES)?;
    if let (Some(nodes), Some(hosts)) = (nnodes, &hosts) {
        let of = format!("{LIST}, which lists them,");
        reader.same((NODES, nodes), (&of, hosts.len()))?;
    }
    let nnodes = nnodes.or(hosts.as_ref().map(Vec::len));
    let node_rank = reader.field("node_rank", NODE)?;
    let local_world_size = local_size(&mut reader, world_size, node_rank)?;
    let mut places = vec![MasterIn::Host("MASTER_ADDR")];
    if let Some(first) = hosts.as_ref().and_then(|hosts| hosts.first()) {
        places.push(MasterIn::Named {
            source: format!("{LIST}={}", reader.variable(LIST).unwrap_or_default()),
            host: first.clone(),
        });
    }
    let single_node = nnodes == Some(1) || world_size == 1;
    let master = reader.master_of(
        &places,
        &["MASTER_PORT"],
        DEFAULT_PORT,
        (single_node, Scope::Process),
        LIST,
    )?;
    let job_id = reader.variable("SLURM_JOB_ID").map(str::to_owned);
    let restart_count = reader.field("restart_count", "SLURM_RESTART_COUNT")?;
    let process = Process {
        world_size,
        rank,
        local_rank,
        local_world_size,
        nnodes,
        node_rank,
        master,
    };
    Ok(LaunchEnv {
        job_id,
        restart_count,
        ..reader.process(process)?
    })
}

/// Tasks on this machine, of `4(x2),1`; the sum must be the number of tasks.
fn local_size(
    reader: &mut Reader<'_>,
    world_size: usize,
    node_rank: Option<usize>,
) -> Result<Option<usize>, EnvError> {
    let Some(text) = reader.variable(PER_NODE) else {
        return Ok(None);
    };
    let counts = per_node(text).ok_or_else(|| {
        let fix = "run this program with srun itself";
        reader.error(Code::NotInt, PER_NODE, "a list like 4(x2),1", fix)
    })?;
    let of = format!("{PER_NODE}, which adds up to it,");
    reader.same((TASKS, world_size), (&of, counts.iter().sum()))?;
    reader.said("local_world_size", format!("{PER_NODE}={text}"));
    Ok(node_rank.and_then(|node| counts.get(node).copied()))
}

/// `4(x2),1` is 4, 4, 1.
fn per_node(text: &str) -> Option<Vec<usize>> {
    let mut counts = Vec::new();
    for part in text.split(',') {
        let (count, times) = match part.split_once("(x") {
            Some((count, times)) => (count, times.strip_suffix(')')?),
            None => (part, "1"),
        };
        if !address::is_decimal(count) || !address::is_decimal(times) {
            return None;
        }
        let times: u16 = times.parse().ok()?;
        let count = usize::from(count.parse::<u16>().ok()?);
        counts.extend(std::iter::repeat_n(count, times.into()));
    }
    Some(counts)
}

/// More hosts than any list of a job has.
const MOST_HOSTS: usize = 1 << 16;

/// `gpu[07-08,10],login` is gpu07, gpu08, gpu10, login; several brackets multiply.
fn expand(list: &str) -> Option<Vec<String>> {
    let mut hosts = Vec::new();
    let mut depth = 0;
    let parts = list.split(|c| {
        match c {
            '[' => depth += 1,
            ']' => depth -= 1,
            _ => {}
        }
        c == ',' && depth == 0
    });
    for part in parts {
        let found = expand_one(part)?;
        if part.is_empty() || hosts.len() + found.len() > MOST_HOSTS {
            return None;
        }
        hosts.extend(found);
    }
    Some(hosts)
}

fn expand_one(pattern: &str) -> Option<Vec<String>> {
    let Some((before, rest)) = pattern.split_once('[') else {
        return (!pattern.contains(']')).then(|| vec![pattern.to_owned()]);
    };
    let (ranges, after) = rest.split_once(']')?;
    let tails = expand_one(after)?;
    let mut hosts = Vec::new();
    for range in ranges.split(',') {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !digits(low) || !digits(high) {
            return None;
        }
        let (first, last): (u32, u32) = (low.parse().ok()?, high.parse().ok()?);
        let count = (last.checked_sub(first)? as usize).checked_add(1)?;
        if hosts.len() + count.checked_mul(tails.len())? > MOST_HOSTS {
            return None;
        }
        for number in first..=last {
            let start = format!("{before}{number:0width$}", width = low.len());
            hosts.extend(tails.iter().map(|tail| format!("{start}{tail}")));
        }
    }
    Some(hosts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_lists_expand_as_scontrol_does() {
        let list = |text: &str| expand(text).map(|hosts| hosts.join(" "));
        assert_eq!(
            list("gpu[07-08,10],login").as_deref(),
            Some("gpu07 gpu08 gpu10 login")
        );
        assert_eq!(list("n[9-11]").as_deref(), Some("n9 n10 n11"));
        assert_eq!(
            list("r[0-1]n[1-2]x").as_deref(),
            Some("r0n1x r0n2x r1n1x r1n2x")
        );
        assert_eq!(list("a").as_deref(), Some("a"));
        for bad in [
            "",
            "a[",
            "a]",
            "a[1",
            "a[x]",
            "a[2-1]",
            "a[]",
            "a,,b",
            "a[0-4294967295]",
        ] {
            assert_eq!(list(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn tasks_per_node_expand() {
        assert_eq!(per_node("4(x2),1"), Some(vec![4, 4, 1]));
        assert_eq!(per_node("3"), Some(vec![3]));
        for bad in ["", "4(x2", "x", "4(x)", "4,"] {
            assert_eq!(per_node(bad), None, "{bad:?}");
        }
    }
}
