//! From what a launcher says to ranks that train together.
//!
//! ```text
//! variables of the pod --dist::env--> LaunchEnv --place--> Recipe::prepare_at
//!                                         \--join--> group --> Recipe::train_with
//! ```

use crate::recipe::Recipe;
use ferrotune_core::checkpoint::data_digest;
use ferrotune_core::config::{DdpBackend, TrainConfig};
use ferrotune_core::io::blake3_of_bytes;
use ferrotune_core::process_group::{Place, ProcessGroup, Solo};
use ferrotune_core::{Error, Result};
use ferrotune_dist::env::LaunchEnv;
use ferrotune_dist::mpi::{self, MpiOptions};
use ferrotune_dist::nccl::NcclOptions;
use ferrotune_dist::{HostPort, JobToken, Membership, Nccl, Tcp, Timing, Work};
use ferrotune_kernels::Device;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Keys that may differ between the ranks of a run: paths, whose contents are compared, and what each
/// machine decides for itself.
const OWN_KEYS: [&str; 10] = [
    "chat_template_path",
    "dataset_cache_dir",
    "dataset_name",
    "device",
    "eval_file",
    "model_name_or_path",
    "num_threads",
    "output_dir",
    "run_name",
    "train_file",
];

/// The token of a job that was given none.
const NO_TOKEN: &str = "no token";

/// The rank of this process, which is one rank of `found`.
///
/// # Errors
/// [`Error::Config`] if `found` is a pod of several ranks, which have to be started first.
pub fn place(found: &LaunchEnv) -> Result<Place> {
    match (&found.ranks[..], &found.local_ranks[..]) {
        (&[rank], &[local_rank]) => Ok(Place {
            rank,
            world_size: found.world_size,
            local_rank,
            local_world_size: found.local_world_size.unwrap_or(1),
        }),
        (ranks, _) => Err(Error::config(
            "ranks",
            format!(
                "this process stands for {} ranks; start each with `ferrotune launch`",
                ranks.len()
            ),
        )),
    }
}

/// Meets the other ranks of `found`, and joins them for the run of `recipe`: by its `ddp_backend`, else NCCL
/// where they compute on GPUs, and TCP where not.
///
/// # Errors
/// [`Error::Config`] if ranks do not fit together, or NCCL or MPI is not there; [`Error::Transient`] if they do not
/// all come in time; [`Error::Stopped`] if `stop` is set before they have.
pub fn join(
    found: &LaunchEnv,
    recipe: &Recipe,
    stop: &AtomicBool,
) -> Result<Box<dyn ProcessGroup>> {
    if found.world_size == 1 {
        return Ok(Box::new(Solo));
    }
    let config = &recipe.config;
    let membership = membership(found)?;
    let work = Work {
        device: match &recipe.device {
            Device::Cpu => "cpu".into(),
            Device::Cuda(device) => device.name().into(),
        },
        config_digest: digests(recipe)?,
    };
    let tcp = Tcp::join(&membership, &work, &timing(config), stop)?;
    let by_device = match recipe.device.is_cuda() {
        true => DdpBackend::Nccl,
        false => DdpBackend::Gloo,
    };
    let timeout = Duration::from_secs(config.runtime.ddp_timeout);
    let peers = Some(tcp.abort_handle());
    let tcp = Box::new(tcp);
    match config.runtime.ddp_backend.unwrap_or(by_device) {
        DdpBackend::Gloo => Ok(tcp),
        DdpBackend::Mpi => mpi::join(tcp, MpiOptions { timeout, peers }),
        DdpBackend::Nccl => {
            let options = NcclOptions {
                timeout,
                peers,
                ..NcclOptions::default()
            };
            Ok(Box::new(Nccl::new(tcp, &recipe.device, options)?))
        }
    }
}

/// What the launcher says, in the words of the store.
fn membership(found: &LaunchEnv) -> Result<Membership> {
    let Place {
        rank,
        world_size,
        local_rank,
        local_world_size,
    } = place(found)?;
    let alone = found.local_world_size == Some(world_size);
    let Some(port) = found.master_port else {
        return Err(Error::config(
            "master_port",
            format!(
                "{} does not say where rank 0 listens; set FERROTUNE_MASTER_PORT, the same on every rank",
                found.launcher
            ),
        ));
    };
    // Jobs without a name on one machine have different ports; the name of a host may differ between ranks.
    let unnamed = || format!("port-{port}");
    let job_id = found.job_id.clone().unwrap_or_else(unnamed);
    // The job's name keeps the ranks of two jobs apart; without a secret, nobody is kept out.
    let token = found.token.as_ref().map_or(NO_TOKEN, |t| t.reveal());
    Ok(Membership {
        rank,
        world_size,
        local_rank,
        local_world_size,
        nnodes: found.nnodes.unwrap_or(if alone { 1 } else { world_size }),
        node_rank: found.node_rank.unwrap_or(0),
        master: HostPort {
            host: found.master_addr.clone(),
            port,
        },
        master_port_is_taken: found.master_port_reserved,
        bind: None,
        job_id,
        restart_attempt: found.restart_count.unwrap_or(0) as u64,
        token: JobToken::new(token),
        launcher: found.launcher.into(),
    })
}

fn timing(config: &TrainConfig) -> Timing {
    let runtime = &config.runtime;
    let call = Duration::from_secs(runtime.ddp_timeout);
    let dead_after = Duration::from_secs(runtime.peer_timeout);
    let standard = Timing::default();
    Timing {
        rendezvous: Duration::from_secs(runtime.rendezvous_timeout),
        heartbeat: standard.heartbeat.min(dead_after / 8),
        dead_after,
        first_call: call,
        call,
        ..standard
    }
}

/// Digests of the sections of the configuration, of base and of data, so that a difference says where it is.
fn digests(recipe: &Recipe) -> Result<String> {
    let config = recipe.config.to_json();
    let mut sections: BTreeMap<&str, String> = BTreeMap::new();
    for key in TrainConfig::keys() {
        if !OWN_KEYS.contains(&key.name) {
            let section = sections.entry(key.section).or_default();
            *section += &format!("{}={}\n", key.name, config[key.name]);
        }
    }
    for (name, digest) in &recipe.fingerprints {
        sections.insert(name, digest.clone());
    }
    if let Some(rows) = &recipe.eval_dataset {
        sections.insert("eval_data", data_digest(&rows.examples)?);
    }
    let short = |text: &String| blake3_of_bytes(text.as_bytes())[..8].to_owned();
    let parts = sections
        .iter()
        .map(|(name, text)| format!("{name} {}", short(text)));
    Ok(parts.collect::<Vec<_>>().join(", "))
}
