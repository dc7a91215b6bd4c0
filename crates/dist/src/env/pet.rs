//! torchrun's own variables (`PET_*`), which Kubeflow Trainer and PyTorchJob give to each pod.
//!
//! `PET_NODE_RANK` counts pods. PyTorchJob sets `RANK` to the same, while its `WORLD_SIZE` counts
//! processes if the number per pod is a number, and pods if it is `auto`.
//!
//! # Source
//! Kubeflow Trainer, `pkg/runtime/framework/plugins/torch/torch.go`; Training Operator v1.9,
//! `pkg/controller.v1/pytorch/envvar.go`.

use super::elastic::RENDEZVOUS_PORT;
use super::finish::Pod;
use super::master::{DEFAULT_PORT, Master, MasterIn};
use super::reader::{Flag, Reader};
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings, address};

const NODES: &str = "PET_NNODES";
const RANK: &str = "PET_NODE_RANK";
const NPROC: &str = "PET_NPROC_PER_NODE";
const MASTER: &str = "PET_MASTER_ADDR";
const PORT: &str = "PET_MASTER_PORT";
const INDEX: &str = "JOB_COMPLETION_INDEX";

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "trainjob-torch",
    variables: &[
        NODES,
        RANK,
        NPROC,
        MASTER,
        PORT,
        "PET_RDZV_ENDPOINT",
        INDEX,
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ],
    detect: |around| around.has(RANK) || around.has_all(&[NODES, MASTER]),
    read,
};

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let by_operator = ["RANK", "WORLD_SIZE", "MASTER_ADDR"];
    let operator = !around.has(INDEX) && by_operator.iter().any(|name| around.has(name));
    let name = if operator {
        "pytorchjob"
    } else {
        "trainjob-torch"
    };
    let mut reader = Reader::new(around, name);
    let nnodes = nnodes(&mut reader)?;
    if is_standalone(&reader)? {
        return alone(reader, nnodes);
    }
    let node_rank = node_rank(&mut reader, nnodes)?;
    cross_check(&reader, nnodes)?;
    reader.below((RANK, node_rank), (NODES, nnodes))?;
    let nproc = reader.nproc(Some(NPROC))?;
    let master = master(&mut reader, nnodes)?;
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

/// `PET_NNODES`: `N`, or `MIN:MAX` if both are the same.
pub(super) fn nnodes(reader: &mut Reader<'_>) -> Result<usize, EnvError> {
    let range = reader.variable(NODES).and_then(|text| text.split_once(':'));
    let (Some((least, most)), None) = (range, reader.flag(Flag::Nnodes)) else {
        let nodes = reader.nnodes(&[NODES])?;
        return nodes.ok_or_else(|| {
            let fix = "pass --nnodes, or set PET_NNODES to the number of pods";
            reader.error(Code::WorldUnknown, NODES, "the number of pods", fix)
        });
    };
    let number = |text: &str| {
        let count = address::is_decimal(text).then(|| text.parse::<u32>().ok())?;
        count.map(|count| count as usize)
    };
    let (Some(least), Some(most)) = (number(least), number(most)) else {
        let fix = "correct the number of pods";
        return Err(reader.error(Code::NotInt, NODES, "N or MIN:MAX, two numbers", fix));
    };
    if least == 0 || least > most {
        let fix = "set the elastic policy's minReplicas and maxReplicas";
        return Err(reader.error(Code::Range, NODES, "at least 1, MIN not above MAX", fix));
    }
    if least < most {
        return Err(reader.error(
            Code::ElasticRange,
            NODES,
            "one number of pods for the whole run",
            format!("set minReplicas and maxReplicas both to the number of workers, as {most}"),
        ));
    }
    reader.said("nnodes", format!("{NODES}={least}:{most}"));
    Ok(least)
}

/// The operator sets `PET_STANDALONE` to nothing at all when it means yes.
pub(super) fn is_standalone(reader: &Reader<'_>) -> Result<bool, EnvError> {
    match reader.variable("PET_STANDALONE") {
        None | Some("0") => Ok(false),
        Some("" | "1") => Ok(true),
        Some(_) => {
            let fix = "remove it, or set it to 1";
            Err(reader.error(Code::NotInt, "PET_STANDALONE", "0, 1 or nothing", fix))
        }
    }
}

/// A pod that trains by itself.
pub(super) fn alone(mut reader: Reader<'_>, nnodes: usize) -> Result<LaunchEnv, EnvError> {
    if nnodes != 1 {
        return Err(reader.error(
            Code::Conflict,
            NODES,
            "1, since PET_STANDALONE makes each pod a run of its own",
            "remove `standalone` from the elastic policy, or ask for one replica",
        ));
    }
    let nproc = reader.nproc(Some(NPROC))?;
    let master = reader.loopback(&[], None)?;
    reader.pod(Pod {
        nnodes,
        node_rank: 0,
        nproc,
        master,
    })
}

fn node_rank(reader: &mut Reader<'_>, nnodes: usize) -> Result<usize, EnvError> {
    if let Some(rank) = reader.flag_or(Flag::NodeRank, &[RANK, INDEX])? {
        return Ok(rank);
    }
    if nnodes == 1 {
        reader.said("node_rank", "a single machine");
        return Ok(0);
    }
    Err(reader.error(
        Code::RankUnknown,
        RANK,
        "this pod's number, since there are several",
        "set PET_NODE_RANK from the pod's index, or pass --node-rank",
    ))
}

/// Everything that says the same thing twice must say the same.
fn cross_check(reader: &Reader<'_>, nnodes: usize) -> Result<(), EnvError> {
    if reader.flag(Flag::NodeRank).is_none()
        && let Some(rank) = reader.number(RANK)?
    {
        for other in ["RANK", INDEX] {
            if let Some(number) = reader.number(other)? {
                reader.same((other, number), (RANK, rank))?;
            }
        }
    }
    let own_size = reader.flag(Flag::Nnodes).or(reader.flag(Flag::Nproc));
    if own_size.is_none()
        && let Some(world) = reader.number("WORLD_SIZE")?
    {
        let per_pod = reader
            .variable(NPROC)
            .filter(|text| address::is_decimal(text));
        let per_pod: usize = per_pod.and_then(|n| n.parse().ok()).unwrap_or(1);
        let of = format!("{NODES} times {NPROC}, where that is a number,");
        let ranks = nnodes.saturating_mul(per_pod);
        reader.same(("WORLD_SIZE", world), (&of, ranks))?;
    }
    for (name, other) in [("MASTER_ADDR", MASTER), ("MASTER_PORT", PORT)] {
        if let (Some(a), Some(b)) = (reader.variable(name), reader.variable(other))
            && a != b
        {
            return Err(reader.error(
                Code::Conflict,
                name,
                format!("{b:?} as in {other}"),
                "remove the one that was set by hand",
            ));
        }
    }
    Ok(())
}

fn master(reader: &mut Reader<'_>, nnodes: usize) -> Result<Master, EnvError> {
    let by_endpoint = ["MASTER_ADDR", MASTER]
        .iter()
        .all(|name| reader.variable(name).is_none());
    let port = if by_endpoint && reader.variable("PET_RDZV_ENDPOINT").is_some() {
        RENDEZVOUS_PORT
    } else {
        DEFAULT_PORT
    };
    reader.master_of(
        &[
            MasterIn::Host(MASTER),
            MasterIn::Host("MASTER_ADDR"),
            MasterIn::Endpoint("PET_RDZV_ENDPOINT"),
        ],
        &[PORT, "MASTER_PORT"],
        port,
        (nnodes == 1, Scope::Pod),
        MASTER,
    )
}
