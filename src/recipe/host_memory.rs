//! What the machine, and the limits on this process, leave to a run on the CPU.

use std::path::{Path, PathBuf};

/// What is assumed where nothing says: 16 TiB.
const UNKNOWN: u64 = 1 << 44;

/// Bytes that can be allocated without swapping and without being stopped.
///
/// The least of what the machine has free, what the limits of the process leave (`ulimit -v` and
/// `-d`), and what its control groups leave, of version 2 or 1, the group's own and those above it.
///
/// # Source
/// proc(5), cgroups(7), getrlimit(2). Of a group's usage, inactive pages of files are free, as
/// Kubernetes reckons.
pub(super) fn available() -> u64 {
    Host { root: "/".into() }.available()
}

/// A file system on which the kernel tells about itself.
struct Host {
    root: PathBuf,
}

/// A version of control groups: where it is mounted, and what its files are called.
struct Version {
    mounts: &'static [&'static str],
    limit: &'static str,
    usage: &'static str,
    /// Line of `memory.stat` with the pages that can be dropped.
    inactive: &'static str,
}

const FIRST: Version = Version {
    mounts: &["sys/fs/cgroup/memory"],
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    inactive: "total_inactive_file",
};
const SECOND: Version = Version {
    mounts: &["sys/fs/cgroup", "sys/fs/cgroup/unified"],
    limit: "memory.max",
    usage: "memory.current",
    inactive: "inactive_file",
};

impl Host {
    fn available(&self) -> u64 {
        let machine = self.kib("proc/meminfo", "MemAvailable:");
        let limits = [
            self.left_of("Max address space", "VmSize:"),
            self.left_of("Max data size", "VmData:"),
            self.left_of_groups(),
        ];
        let all = limits.into_iter().chain([machine]).flatten();
        all.min().unwrap_or(UNKNOWN).min(UNKNOWN)
    }

    fn read(&self, path: impl AsRef<Path>) -> String {
        std::fs::read_to_string(self.root.join(path)).unwrap_or_default()
    }

    /// The bytes of a line `NAME  123 kB`.
    fn kib(&self, path: &str, name: &str) -> Option<u64> {
        let kib = number_after(&self.read(path), name)?;
        Some(kib.saturating_mul(1024))
    }

    /// What a soft limit of the process leaves above what it uses; `None` if it is unlimited.
    fn left_of(&self, limit: &str, usage: &str) -> Option<u64> {
        let limit = number_after(&self.read("proc/self/limits"), limit)?;
        let used = self.kib("proc/self/status", usage).unwrap_or(0);
        Some(limit.saturating_sub(used))
    }

    /// What the control groups leave that this process is in.
    fn left_of_groups(&self) -> Option<u64> {
        let membership = self.read("proc/self/cgroup");
        let of_line = |line: &str| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next()?, parts.next()?);
            let version = match controllers {
                "" => SECOND,
                names if names.split(',').any(|name| name == "memory") => FIRST,
                _ => return None,
            };
            self.left_of_group(&version, path)
        };
        membership.lines().filter_map(of_line).min()
    }

    /// The least that the group at `path` and those above it leave. In a container the path can be
    /// the host's, and the group itself is what is mounted: levels that are not there say nothing.
    fn left_of_group(&self, version: &Version, path: &str) -> Option<u64> {
        let levels = Path::new(path.trim_start_matches('/')).ancestors();
        let folders = levels.flat_map(|level| {
            let mounts = version.mounts.iter();
            mounts.map(move |mount| Path::new(mount).join(level))
        });
        let left = |folder: PathBuf| {
            let number = |name: &str| self.read(folder.join(name)).trim().parse::<u64>().ok();
            let limit = number(version.limit)?;
            let stat = self.read(folder.join("memory.stat"));
            let inactive = number_after(&stat, version.inactive).unwrap_or(0);
            let used = number(version.usage).unwrap_or(0).saturating_sub(inactive);
            Some(limit.saturating_sub(used))
        };
        folders.filter_map(left).min()
    }
}

/// The first number after `name` at the beginning of a line.
fn number_after(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    if !rest.starts_with(char::is_whitespace) {
        return None;
    }
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A machine with 8 GiB free and the `files` given.
    fn available(files: &[(&str, &str)]) -> u64 {
        let root = tempfile::tempdir().expect("temporary directory");
        let machine = (
            "proc/meminfo",
            "MemTotal: 9 kB\nMemAvailable:    8388608 kB\n",
        );
        for (path, text) in [machine].iter().chain(files) {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("below the root")).expect("writable");
            std::fs::write(path, text).expect("writable");
        }
        let root = root.path().into();
        Host { root }.available()
    }

    #[test]
    fn the_machine_alone_says_what_is_free() {
        assert_eq!(available(&[]), 8 * GIB);
    }

    #[test]
    fn limits_of_the_process_leave_what_it_does_not_use() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                      Max data size             unlimited            unlimited            bytes\n\
                      Max address space         3221225472           unlimited            bytes\n";
        let status = (
            "proc/self/status",
            "VmSize:\t 1048576 kB\nVmData:\t 524288 kB\n",
        );
        assert_eq!(available(&[("proc/self/limits", limits), status]), 2 * GIB);
        let data = limits.replace("unlimited            unlimited", "1073741824 unlimited");
        assert_eq!(available(&[("proc/self/limits", &data), status]), GIB / 2);
    }

    #[test]
    fn a_group_of_the_first_version_leaves_its_limit_less_its_usage() {
        let stat = "inactive_file 7\ntotal_inactive_file 1073741824\n";
        let group = "sys/fs/cgroup/memory/pod/app";
        let files = [
            (
                "proc/self/cgroup",
                "5:cpu,cpuacct:/other\n4:hugetlb,memory:/pod/app\n0::/\n",
            ),
            (&format!("{group}/memory.limit_in_bytes"), "5368709120\n"),
            (&format!("{group}/memory.usage_in_bytes"), "2147483648\n"),
            (&format!("{group}/memory.stat"), stat),
            // Above it, no limit.
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
        ];
        assert_eq!(available(&files), 4 * GIB);
    }

    #[test]
    fn the_tightest_group_of_the_second_version_counts_wherever_it_is() {
        let membership = ("proc/self/cgroup", "0::/slice/pod\n");
        let files = [
            membership,
            ("sys/fs/cgroup/slice/memory.max", "3221225472\n"),
            ("sys/fs/cgroup/slice/memory.current", "1073741824\n"),
            ("sys/fs/cgroup/slice/pod/memory.max", "max\n"),
        ];
        assert_eq!(available(&files), 2 * GIB);
        // The container's own group is mounted, and the path is the host's.
        let files = [membership, ("sys/fs/cgroup/memory.max", "1073741824\n")];
        assert_eq!(available(&files), GIB);
    }
}
