use std::collections::BTreeMap;
use std::path::Path;

/// Everything that tells a process which rank it is: read once, then only looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Environment variables.
    pub variables: BTreeMap<String, String>,
    /// What this machine, or this pod, is like.
    pub host: Host,
    /// Contents of the files that launchers write, by path.
    pub files: BTreeMap<String, String>,
    /// What the command line says.
    pub flags: Flags,
}

/// Facts of a machine or pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// GPUs that this process can see.
    pub gpus: usize,
    /// Why GPUs that seem to be there cannot be seen.
    pub gpu_note: Option<String>,
    /// The host name; a pod's name, mostly.
    pub hostname: String,
}

/// What the command line says about ranks. Each one goes before every variable of a launcher, and
/// has a variable of ferrotune's own that says the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// `--nproc`: ranks on this machine; a number, or `auto`.
    pub nproc: Option<String>,
    /// `--nnodes`: machines.
    pub nnodes: Option<String>,
    /// `--node-rank`: this machine, from 0.
    pub node_rank: Option<String>,
    /// `--master-addr`: the machine of rank 0, as `host` or `host:port`.
    pub master_addr: Option<String>,
    /// `--master-port`.
    pub master_port: Option<String>,
    /// `--standalone`: this machine alone, whatever the variables say.
    pub standalone: bool,
    /// Ranks compute on the CPU: GPUs do not count.
    pub cpu: bool,
}

/// Where MPI operators put the list of hosts.
pub(super) const MPI_HOSTFILE: &str = "/etc/mpi/hostfile";
/// Where Volcano puts a list of hosts per task, as `TASK.host`.
pub(super) const VOLCANO_FOLDER: &str = "/etc/volcano";

impl Surroundings {
    /// Those of this process, with what its command line says.
    ///
    /// Variables whose name or value is no UTF-8 are left out; no launcher writes such.
    #[must_use]
    pub fn of_this_process(flags: Flags) -> Self {
        let variables: BTreeMap<String, String> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let host = Host::of_this_machine(&variables, flags.cpu);
        Self {
            variables,
            host,
            files: launcher_files(Path::new(MPI_HOSTFILE), Path::new(VOLCANO_FOLDER)),
            flags,
        }
    }
}

impl Host {
    fn of_this_machine(variables: &BTreeMap<String, String>, cpu: bool) -> Self {
        let (gpus, gpu_note) = if cpu {
            (0, None)
        } else if let Some(hidden) = gpus_hidden(variables) {
            (0, Some(hidden))
        } else {
            count_gpus()
        };
        Self {
            gpus,
            gpu_note,
            hostname: rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
        }
    }
}

/// Why variables leave this process without GPUs, if they do.
fn gpus_hidden(variables: &BTreeMap<String, String>) -> Option<String> {
    let nothing = |name: &str, words: &[&str]| {
        let value = variables.get(name)?;
        let hidden = words.contains(&value.trim());
        hidden.then(|| format!("{name}={value:?} hides every GPU"))
    };
    nothing("CUDA_VISIBLE_DEVICES", &["", "-1", "NoDevFiles", "none"])
        .or_else(|| nothing("NVIDIA_VISIBLE_DEVICES", &["", "void", "none"]))
}

/// GPUs by the driver's count; if it does not answer, why, where there seem to be some.
fn count_gpus() -> (usize, Option<String>) {
    let problem = match ferrotune_kernels::cuda::device_count() {
        Ok(gpus) if gpus > 0 => return (gpus, None),
        Ok(_) => "the driver shows none".to_owned(),
        Err(error) => error.to_string(),
    };
    let files = (0..64).filter(|i| Path::new(&format!("/dev/nvidia{i}")).exists());
    let note = match files.count() {
        0 => None,
        n => Some(format!("/dev/nvidia* has {n} GPUs, but {problem}")),
    };
    (0, note)
}

fn launcher_files(mpi_hostfile: &Path, volcano: &Path) -> BTreeMap<String, String> {
    let hosts = std::fs::read_dir(volcano).into_iter().flatten().flatten();
    let hosts = hosts
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "host"));
    hosts
        .chain([mpi_hostfile.to_path_buf()])
        .filter_map(|path| {
            let text = std::fs::read_to_string(&path).ok()?;
            Some((path.to_str()?.to_owned(), text))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_can_hide_gpus() {
        let hidden = |name: &str, value: &str| {
            gpus_hidden(&BTreeMap::from([(name.to_owned(), value.to_owned())])).is_some()
        };
        assert!(hidden("CUDA_VISIBLE_DEVICES", ""));
        assert!(hidden("CUDA_VISIBLE_DEVICES", "-1"));
        assert!(hidden("NVIDIA_VISIBLE_DEVICES", "void"));
        assert!(hidden("NVIDIA_VISIBLE_DEVICES", ""));
        assert!(!hidden("NVIDIA_VISIBLE_DEVICES", "all"));
        assert!(!hidden("CUDA_VISIBLE_DEVICES", "0,1"));
    }

    #[test]
    fn files_of_launchers_are_found_by_name() {
        let folder = std::env::temp_dir().join(format!("ferrotune-files-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("writable");
        for (name, text) in [
            ("worker.host", "w-0\n"),
            ("other", "x"),
            ("hostfile", "h\n"),
        ] {
            std::fs::write(folder.join(name), text).expect("writable");
        }
        let found = launcher_files(&folder.join("hostfile"), &folder);
        std::fs::remove_dir_all(&folder).expect("writable");
        let names: Vec<_> = found.values().map(String::as_str).collect();
        assert_eq!(names, ["h\n", "w-0\n"]);
        assert!(launcher_files(Path::new("/none"), Path::new("/none")).is_empty());
    }
}
