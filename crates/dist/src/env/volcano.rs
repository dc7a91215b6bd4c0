//! Volcano's svc and env plugins: the hosts of every task, and an index within one's own task.
//!
//! # Source
//! Volcano, `pkg/controllers/job/plugins/svc` and `env`.

use super::finish::Pod;
use super::master::{DEFAULT_PORT, MasterIn};
use super::reader::{Flag, Reader};
use super::surroundings::VOLCANO_FOLDER;
use super::{Code, EnvError, LaunchEnv, Launcher, Scope, Surroundings, address};
use std::collections::{BTreeMap, BTreeSet};

const INDEX: &str = "VC_TASK_INDEX";
/// Tasks whose pods come first, in this order.
const FIRST: [&str; 4] = ["master", "leader", "chief", "head"];

pub(super) static LAUNCHER: Launcher = Launcher {
    name: "volcano-svc",
    variables: &["VC_*_HOSTS", "VC_*_NUM", INDEX, "MASTER_PORT"],
    detect: |around| {
        around.named("VC_*_HOSTS").next().is_some()
            || around.has(INDEX)
            || host_files(around).next().is_some()
    },
    read,
};

/// Hosts of one task, and what listed them.
struct Task {
    source: String,
    hosts: Vec<String>,
}

fn read(around: &Surroundings) -> Result<LaunchEnv, EnvError> {
    let mut reader = Reader::new(around, "volcano-svc");
    if around.has_all(&["MASTER_ADDR", "WORLD_SIZE"]) {
        return Err(reader.error(
            Code::RankUnknown,
            "RANK",
            "a rank: the pytorch plugin gives one to its master and worker tasks only",
            "run this program in those tasks, or name this task in the plugin's --worker argument",
        ));
    }
    let tasks = tasks(&reader)?;
    let order = in_order(&tasks);
    let hosts: Vec<&String> = order.iter().flat_map(|task| &task.hosts).collect();
    let nnodes = reader.nnodes(&[])?;
    let nnodes = match nnodes {
        Some(nodes) => nodes,
        None if hosts.is_empty() => {
            return Err(reader.error(
                Code::WorldUnknown,
                "VC_*_HOSTS",
                "the list of hosts of each task",
                "add the plugin `svc: []` to the job, or pass --nnodes, --node-rank and \
                 --master-addr",
            ));
        }
        None => {
            let from: Vec<&str> = order.iter().map(|task| task.source.as_str()).collect();
            reader.said("nnodes", from.join(" + "));
            hosts.len()
        }
    };
    let node_rank = match reader.flag_or(Flag::NodeRank, &[])? {
        Some(rank) => rank,
        None => position(&mut reader, &order, &hosts)?,
    };
    let nproc = reader.nproc(None)?;
    let first = order.iter().find(|task| !task.hosts.is_empty());
    let first = first.map(|task| MasterIn::Named {
        source: task.source.clone(),
        host: task.hosts[0].clone(),
    });
    let places: Vec<_> = first.into_iter().collect();
    let master = reader.master_of(
        &places,
        &["MASTER_PORT"],
        DEFAULT_PORT,
        (nnodes == 1, Scope::Pod),
        "--master-addr",
    )?;
    reader.pod(Pod {
        nnodes,
        node_rank,
        nproc,
        master,
    })
}

/// Tasks by name, as variables spell it; a variable goes before the file of the same task.
fn tasks(reader: &Reader<'_>) -> Result<BTreeMap<String, Task>, EnvError> {
    let mut tasks = BTreeMap::new();
    for (path, text) in host_files(reader.around) {
        let name = path[VOLCANO_FOLDER.len() + 1..path.len() - ".host".len()].to_owned();
        let hosts = names(text.split(['\n', ',']));
        let source = path.to_owned();
        tasks.insert(
            name.to_uppercase().replace('-', "_"),
            Task { source, hosts },
        );
    }
    for (variable, text) in reader.around.named("VC_*_HOSTS") {
        let name = &variable["VC_".len()..variable.len() - "_HOSTS".len()];
        let hosts = names(text.split(','));
        let count = format!("VC_{name}_NUM");
        if let Some(number) = reader.number(&count)? {
            let of = format!("{variable}, which lists them,");
            reader.same((&count, number), (&of, hosts.len()))?;
        }
        let source = format!("{variable}={text}");
        tasks.insert(name.to_owned(), Task { source, hosts });
    }
    Ok(tasks)
}

fn host_files(around: &Surroundings) -> impl Iterator<Item = (&str, &str)> {
    around.files.iter().filter_map(|(path, text)| {
        let name = path.strip_prefix(VOLCANO_FOLDER)?.strip_prefix('/')?;
        name.strip_suffix(".host")?;
        Some((path.as_str(), text.as_str()))
    })
}

fn names<'a>(words: impl Iterator<Item = &'a str>) -> Vec<String> {
    let trimmed = words.map(str::trim).filter(|word| !word.is_empty());
    trimmed.map(str::to_owned).collect()
}

/// The task of rank 0 first, the others by name: every pod must count alike.
fn in_order(tasks: &BTreeMap<String, Task>) -> Vec<&Task> {
    let place = |name: &str| {
        let name = name.to_lowercase();
        let found = FIRST.iter().position(|first| name.ends_with(first));
        found.unwrap_or(FIRST.len())
    };
    let mut order: Vec<(&String, &Task)> = tasks.iter().collect();
    order.sort_by_key(|(name, _)| (place(name), *name));
    order.into_iter().map(|(_, task)| task).collect()
}

/// This pod's place in the list, by its host name; an index alone is enough for a single task only.
fn position(
    reader: &mut Reader<'_>,
    tasks: &[&Task],
    hosts: &[&String],
) -> Result<usize, EnvError> {
    let own = address::short(&reader.around.host.hostname).to_owned();
    let index = reader.number(INDEX)?;
    if let Some(at) = hosts.iter().position(|host| address::short(host) == own) {
        let in_task = tasks.iter().find_map(|task| {
            let mut hosts = task.hosts.iter();
            hosts.position(|host| address::short(host) == own)
        });
        if let (Some(index), Some(in_task)) = (index, in_task) {
            let of = format!("the position of {own} in its task");
            reader.same((INDEX, index), (&of, in_task))?;
        }
        reader.said("node_rank", format!("hostname={own}"));
        return Ok(at);
    }
    let with_hosts = tasks.iter().filter(|task| !task.hosts.is_empty());
    if let (Some(index), 1) = (index, with_hosts.count()) {
        reader.said("node_rank", format!("{INDEX}={index}"));
        return Ok(index);
    }
    let known: BTreeSet<&str> = hosts.iter().map(|host| address::short(host)).collect();
    Err(EnvError {
        value: Some(own),
        ..reader.error(
            Code::RankUnknown,
            "hostname",
            format!("one of the hosts of the job: {known:?}"),
            "leave the pod's hostname as Volcano sets it, or pass --node-rank",
        )
    })
}
