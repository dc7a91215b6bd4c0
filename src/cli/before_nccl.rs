//! What is looked at, set and said before ranks on GPUs open NCCL.

use super::{Failure, print_note};
use ferrotune::core::Error;
use ferrotune::core::config::{DdpBackend, TrainConfig};
use ferrotune::dist::env::LaunchEnv;
use ferrotune::dist::nccl::preflight;
use std::collections::BTreeMap;
use std::net::{IpAddr, ToSocketAddrs};

/// The variables that the ranks of this machine are to be started with, after saying what was found.
/// `config` is that of `train`, if that is what is started.
pub(super) fn variables(
    found: &LaunchEnv,
    config: Option<&TrainConfig>,
) -> Result<BTreeMap<String, String>, Failure> {
    let Some(report) = look(found, config)? else {
        return Ok(BTreeMap::new());
    };
    print_note(&report.variables.to_string());
    Ok(report.variables.by_us)
}

/// The same for a rank that another launcher has started, which is too late to set anything.
pub(super) fn advise(found: &LaunchEnv, config: &TrainConfig) -> Result<(), Failure> {
    let started_by_us = found.launcher == "ferrotune";
    if started_by_us || found.local_ranks.first() != Some(&0) {
        return Ok(());
    }
    let Some(report) = look(found, Some(config))? else {
        return Ok(());
    };
    let ours = &report.variables.by_us;
    if !ours.is_empty() {
        let each: Vec<String> = ours.iter().map(|(n, v)| format!("{n}={v}")).collect();
        print_note(&format!(
            "for NCCL on this machine, set {}; `ferrotune launch -- train ...` as the command of a rank sets it",
            each.join(" ")
        ));
    }
    Ok(())
}

/// Nothing where no NCCL is to be opened.
fn look(
    found: &LaunchEnv,
    config: Option<&TrainConfig>,
) -> Result<Option<preflight::Report>, Failure> {
    let over_tcp = config.is_some_and(|c| c.runtime.ddp_backend == Some(DdpBackend::Gloo));
    if found.world_size == 1 || found.devices.iter().all(Option::is_none) || over_tcp {
        return Ok(None);
    }
    let local_ranks = found.local_world_size.unwrap_or(found.ranks.len());
    let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    let environment = std::env::vars_os().filter_map(text);
    let report = preflight::look(address_of(&found.master_addr), local_ranks, environment)
        .map_err(Error::read("/dev/shm or /proc/net"))?;
    for warning in &report.warnings {
        print_note(warning);
    }
    Ok(Some(report))
}

/// None while the name does not resolve, as at the start of a pod.
fn address_of(host: &str) -> Option<IpAddr> {
    let mut addresses = (host, 0).to_socket_addrs().ok()?;
    addresses.next().map(|address| address.ip())
}
