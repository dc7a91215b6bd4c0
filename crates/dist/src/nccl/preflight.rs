//! What usually goes wrong before NCCL says anything: shared memory of a container that is too small or
//! full of what dead processes left, the wrong network interface, variables nobody remembers.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

/// Where POSIX shared memory lies.
const SHARED_MEMORY: &str = "/dev/shm";
/// What NCCL calls its segments there.
const SEGMENT_PREFIX: &str = "nccl-";
/// Shared memory a rank can need beside others of its machine, in bytes: three channels of 9.6 MB.
const BYTES_PER_RANK: u64 = 32 << 20;

/// What a look before the start has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What will or may go wrong, and what helps.
    pub warnings: Vec<String>,
    /// `NCCL_*` of the user, and what is to be set beside it before NCCL is opened.
    pub variables: Variables,
}

/// Looks at this machine: `local_ranks` of this run are on it, `master` is the address of rank 0, and
/// `environment` has the variables of this process.
///
/// Nothing is changed: who starts the ranks sets [`Variables::by_us`] for them.
///
/// # Errors
/// If `/dev/shm` or the routing tables cannot be read.
pub fn look(
    master: Option<IpAddr>,
    local_ranks: usize,
    environment: impl IntoIterator<Item = (String, String)>,
) -> io::Result<Report> {
    let memory = SharedMemory::look(Path::new(SHARED_MEMORY), Path::new("/proc"))?;
    let warnings = memory.warnings(local_ranks);
    let read = |path| match fs::read_to_string(path) {
        // A kernel without IPv6 has no such table.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        table => table,
    };
    let (route, route6) = (read("/proc/net/route")?, read("/proc/net/ipv6_route")?);
    let interface = master.and_then(|address| interface_to(address, &route, &route6));
    let mut by_us = BTreeMap::new();
    if let Some(interface) = interface {
        // `=`: this name, not every one that starts with it.
        by_us.insert("NCCL_SOCKET_IFNAME".to_owned(), format!("={interface}"));
    }
    if memory.is_short(local_ranks) {
        by_us.insert("NCCL_SHM_DISABLE".to_owned(), "1".to_owned());
    }
    let variables = Variables::new(environment, by_us);
    Ok(Report {
        warnings,
        variables,
    })
}

/// `/dev/shm`, through which ranks of one machine exchange what their GPUs cannot exchange directly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedMemory {
    /// Bytes in all.
    pub total: u64,
    /// Bytes that are free.
    pub free: u64,
    /// Segments of NCCL that no process here has mapped, and their bytes.
    pub stale: Vec<(PathBuf, u64)>,
}

impl SharedMemory {
    /// Looks at the file system of `folder`, and into the maps of the processes under `processes`.
    ///
    /// # Errors
    /// If `folder` cannot be read.
    pub fn look(folder: &Path, processes: &Path) -> io::Result<Self> {
        let space = rustix::fs::statvfs(folder)?;
        Ok(Self {
            total: space.f_blocks * space.f_frsize,
            free: space.f_bavail * space.f_frsize,
            stale: stale_segments(folder, processes)?,
        })
    }

    /// Whether `local_ranks` ranks may need more than is free.
    #[must_use]
    pub fn is_short(&self, local_ranks: usize) -> bool {
        local_ranks > 1 && self.free < local_ranks as u64 * BYTES_PER_RANK
    }

    /// What to tell before `local_ranks` ranks start.
    #[must_use]
    pub fn warnings(&self, local_ranks: usize) -> Vec<String> {
        let mut warnings = Vec::new();
        let mib = |bytes: u64| bytes >> 20;
        if !self.stale.is_empty() {
            let bytes = self.stale.iter().map(|(_, bytes)| bytes).sum();
            let mut text = format!(
                "{SHARED_MEMORY} holds {} segments of NCCL ({} MiB) that no process here uses, left by \
                 processes that were killed; remove them:\n  rm",
                self.stale.len(),
                mib(bytes)
            );
            for (path, _) in &self.stale {
                // Writing to a string cannot fail.
                let _ = write!(text, " {}", path.display());
            }
            warnings.push(text);
        }
        if self.is_short(local_ranks) {
            let needed = local_ranks as u64 * BYTES_PER_RANK;
            let (total, free, needed) = (mib(self.total), mib(self.free), mib(needed));
            warnings.push(format!(
                "{SHARED_MEMORY} has {free} MiB free of {total}, {local_ranks} ranks of one machine can need \
                 {needed}; they go without it (NCCL_SHM_DISABLE=1), which is slower. In Kubernetes, give the \
                 pod a larger one:\n{VOLUME}"
            ));
        }
        warnings
    }
}

/// The part of a pod that makes `/dev/shm` as large as its memory limit allows.
const VOLUME: &str = "\
spec:
  containers:
    - name: trainer
      volumeMounts:
        - name: shm
          mountPath: /dev/shm
  volumes:
    - name: shm
      emptyDir:
        medium: Memory";

/// Segments of NCCL in `folder` that no process under `processes` has mapped, by name.
fn stale_segments(folder: &Path, processes: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
    let mut segments = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let ours = entry
            .file_name()
            .to_string_lossy()
            .starts_with(SEGMENT_PREFIX);
        if let (true, Ok(facts)) = (ours, entry.metadata()) {
            segments.insert(entry.path(), facts.len());
        }
    }
    if segments.is_empty() {
        return Ok(Vec::new());
    }
    for process in fs::read_dir(processes)?.flatten() {
        // Processes end meanwhile, and those of other users are closed: their segments cannot be removed
        // from here either.
        let maps = fs::read_to_string(process.path().join("maps")).unwrap_or_default();
        segments.retain(|path, _| {
            !maps
                .lines()
                .any(|line| line.ends_with(&*path.to_string_lossy()))
        });
    }
    Ok(segments.into_iter().collect())
}

/// The interface that packets to `address` leave by, read in the kernel's tables: `/proc/net/route` and
/// `/proc/net/ipv6_route`. `None` for this machine itself.
#[must_use]
pub fn interface_to(address: IpAddr, route: &str, route6: &str) -> Option<String> {
    let routes: Vec<Route> = match address {
        IpAddr::V4(_) => route.lines().filter_map(Route::v4).collect(),
        IpAddr::V6(_) => route6.lines().filter_map(Route::v6).collect(),
    };
    let address = bits(address);
    routes
        .into_iter()
        .filter(|route| route.usable && route.covers(address))
        // The longest prefix, then the smallest metric, then the first.
        .min_by_key(|route| (std::cmp::Reverse(route.prefix), route.metric))
        .map(|route| route.interface)
        .filter(|interface| interface != "lo")
}

/// One line of a routing table, with addresses as 128 bits, IPv4 in the upper 32.
struct Route {
    interface: String,
    destination: u128,
    prefix: u32,
    metric: u32,
    usable: bool,
}

/// `RTF_UP` and `RTF_REJECT` of Linux.
const UP: u32 = 0x1;
const REJECT: u32 = 0x200;

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)) << 96,
        IpAddr::V6(address) => u128::from(address),
    }
}

impl Route {
    /// `Iface Destination Gateway Flags RefCnt Use Metric Mask ...`, addresses in hex as the machine
    /// stores them in network order.
    fn v4(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let hex = |i: usize| u32::from_str_radix(fields.get(i)?, 16).ok();
        let address = |i: usize| Some(Ipv4Addr::from(hex(i)?.to_ne_bytes()));
        let (flags, mask) = (hex(3)?, address(7)?);
        Some(Self {
            interface: (*fields.first()?).to_owned(),
            destination: bits(address(1)?.into()),
            prefix: u32::from(mask).count_ones(),
            metric: fields.get(6)?.parse().ok()?,
            usable: flags & UP != 0 && flags & REJECT == 0,
        })
    }

    /// `destination length source length next-hop metric references use flags interface`, all in hex.
    fn v6(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let hex = |i: usize| u32::from_str_radix(fields.get(i)?, 16).ok();
        let destination = u128::from_str_radix(fields.first()?, 16).ok()?;
        let flags = hex(8)?;
        Some(Self {
            interface: (*fields.get(9)?).to_owned(),
            destination: bits(Ipv6Addr::from(destination).into()),
            prefix: hex(1)?,
            metric: hex(5)?,
            usable: flags & UP != 0 && flags & REJECT == 0,
        })
    }

    fn covers(&self, address: u128) -> bool {
        let mask = u128::MAX.checked_shl(128 - self.prefix).unwrap_or(0);
        (address ^ self.destination) & mask == 0
    }
}

/// `NCCL_*`: what the user set, and what is set beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Variables {
    /// The user's, which stay as they are.
    pub by_user: BTreeMap<String, String>,
    /// Ours.
    pub by_us: BTreeMap<String, String>,
}

impl Variables {
    /// The user's from `environment`; of `ours`, those that the user did not set.
    #[must_use]
    pub fn new(
        environment: impl IntoIterator<Item = (String, String)>,
        ours: BTreeMap<String, String>,
    ) -> Self {
        let by_user: BTreeMap<_, _> = environment
            .into_iter()
            .filter(|(name, _)| name.starts_with("NCCL_"))
            .collect();
        let mut by_us = ours;
        by_us.retain(|name, _| !by_user.contains_key(name));
        Self { by_user, by_us }
    }
}

impl fmt::Display for Variables {
    /// One line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |variables: &BTreeMap<String, String>| {
            let each: Vec<String> = variables.iter().map(|(n, v)| format!("{n}={v}")).collect();
            match each.is_empty() {
                true => "none".to_owned(),
                false => each.join(" "),
            }
        };
        let (user, ours) = (list(&self.by_user), list(&self.by_us));
        write!(
            f,
            "NCCL variables set by the user: {user}; by ferrotune: {ours}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a pod: a default route by eth0, its subnet, an RDMA network by net1, and a refused network.
    const ROUTE: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0100F40A\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0000F40A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
net1\t0002F40A\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
net2\t0002F40A\t00000000\t0001\t0\t0\t200\t00FFFFFF\t0\t0\t0
down\t0003F40A\t00000000\t0000\t0\t0\t0\t00FFFFFF\t0\t0\t0
none\t0004F40A\t00000000\t0201\t0\t0\t0\t00FFFFFF\t0\t0\t0
";
    const ROUTE6: &str = "\
fd000000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0
00000000000000000000000000000001 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000003 00000000 80200001       lo
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd000000000000000000000000000001 00000400 00000001 00000000 00000003     eth1
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
";

    #[test]
    fn the_interface_is_the_one_of_the_longest_prefix() {
        for (address, interface) in [
            ("10.244.1.7", Some("eth0")),
            ("10.244.2.9", Some("net1")),
            ("10.244.3.9", Some("eth0")),
            ("10.244.4.9", Some("eth0")),
            ("192.168.1.1", Some("eth0")),
            ("fd00::5", Some("eth0")),
            ("2001:db8::1", Some("eth1")),
            ("::1", None),
        ] {
            let found = interface_to(address.parse().expect("an address"), ROUTE, ROUTE6);
            assert_eq!(found.as_deref(), interface, "{address}");
        }
        let alone = interface_to(IpAddr::from([10, 0, 0, 1]), "", "garbage\n1 2 3\n");
        assert_eq!(alone, None);
    }

    #[test]
    fn variables_of_the_user_win_and_all_are_listed_in_one_line() {
        let set = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            let owned = |&(n, v): &(&str, &str)| (n.to_owned(), v.to_owned());
            pairs.iter().map(owned).collect()
        };
        let user = set(&[
            ("PATH", "/bin"),
            ("NCCL_DEBUG", "INFO"),
            ("NCCL_SOCKET_IFNAME", "ib0"),
        ]);
        let ours = set(&[("NCCL_SOCKET_IFNAME", "=eth0"), ("NCCL_SHM_DISABLE", "1")]);
        let variables = Variables::new(user, ours);
        assert_eq!(
            variables.to_string(),
            "NCCL variables set by the user: NCCL_DEBUG=INFO NCCL_SOCKET_IFNAME=ib0; by ferrotune: \
             NCCL_SHM_DISABLE=1"
        );
        assert_eq!(
            Variables::default().to_string(),
            "NCCL variables set by the user: none; by ferrotune: none"
        );
    }

    #[test]
    fn segments_that_nobody_maps_are_stale() {
        let folder = tempfile::tempdir().expect("a folder");
        let (memory, processes) = (folder.path().join("shm"), folder.path().join("proc"));
        for process in ["1", "77"] {
            fs::create_dir_all(processes.join(process)).expect("a process");
        }
        fs::create_dir(&memory).expect("a folder");
        for (name, bytes) in [("nccl-AAAAAA", 7), ("nccl-BBBBBB", 8), ("other", 9)] {
            fs::write(memory.join(name), vec![0; bytes]).expect("a segment");
        }
        let used = memory.join("nccl-AAAAAA");
        let line = format!("7f00-7f01 rw-s 00000000 00:1 2   {}\n", used.display());
        fs::write(processes.join("77/maps"), line).expect("its maps");
        let found = SharedMemory::look(&memory, &processes).expect("it can be read");
        assert_eq!(found.stale, [(memory.join("nccl-BBBBBB"), 8)]);
        assert!(found.total > 0);
        let warnings = found.warnings(1);
        let expected = format!("rm {}", memory.join("nccl-BBBBBB").display());
        assert!(warnings[0].ends_with(&expected), "{warnings:?}");
    }

    #[test]
    fn a_container_with_64_mib_is_too_small_for_eight_ranks() {
        let memory = SharedMemory {
            total: 64 << 20,
            free: 63 << 20,
            stale: Vec::new(),
        };
        assert!(memory.warnings(1).is_empty());
        let warnings = memory.warnings(8);
        assert_eq!(warnings.len(), 1);
        for part in [
            "63 MiB free of 64",
            "256",
            "medium: Memory",
            "mountPath: /dev/shm",
        ] {
            assert!(warnings[0].contains(part), "{part}: {warnings:?}");
        }
    }

    #[test]
    fn this_machine_can_be_looked_at() {
        let report = look(Some(IpAddr::from([127, 0, 0, 1])), 1, []).expect("Linux has both");
        assert!(!report.variables.by_us.contains_key("NCCL_SHM_DISABLE"));
    }
}
