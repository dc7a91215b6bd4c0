//! Flags about ranks, which `env`, `launch` and `train` share.

use super::Failure;
use ferrotune::core::config::Device;
use ferrotune::dist::env::Flags;
use ferrotune::dist::env::own::{MASTER_ADDR, MASTER_PORT};

/// What the command line says about ranks; goes before every variable of a launcher.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct LaunchFlags {
    /// Ranks on this machine: a number, or auto for one per GPU [default: as the launcher says]
    #[arg(long, alias = "nproc-per-node", value_name = "N")]
    nproc: Option<String>,
    /// Machines of the run
    #[arg(long, value_name = "N")]
    nnodes: Option<String>,
    /// This machine, from 0
    #[arg(long, value_name = "N")]
    node_rank: Option<String>,
    /// The machine of rank 0
    #[arg(long, alias = "master", value_name = "HOST[:PORT]")]
    master_addr: Option<String>,
    /// Where rank 0 listens
    #[arg(long, value_name = "PORT")]
    master_port: Option<String>,
    /// This machine alone, whatever the variables of a launcher say
    #[arg(long, conflicts_with_all = ["nnodes", "node_rank", "master_addr"])]
    standalone: bool,
}

impl LaunchFlags {
    /// For detection, on `device`.
    pub(super) fn on(&self, device: Device) -> Flags {
        Flags {
            nproc: self.nproc.clone(),
            nnodes: self.nnodes.clone(),
            node_rank: self.node_rank.clone(),
            master_addr: self.master_addr.clone(),
            master_port: self.master_port.clone(),
            standalone: self.standalone,
            cpu: device == Device::Cpu,
        }
    }

    /// Those that hold for a rank of another launcher too, as the variables that say the same.
    pub(super) fn master_variables(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let addr = self.master_addr.as_deref().map(|addr| (MASTER_ADDR, addr));
        let port = self.master_port.as_deref().map(|port| (MASTER_PORT, port));
        addr.into_iter().chain(port)
    }

    /// Takes these flags out of words that also hold configuration keys.
    pub(super) fn take(words: &[String]) -> Result<(Self, Vec<String>), Failure> {
        let mut flags = Self::default();
        let mut rest = Vec::new();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let (name, inline) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (word.as_str(), None),
            };
            if name == "--standalone" && inline.is_none() {
                flags.standalone = true;
                continue;
            }
            let Some(value) = flags.slot(name) else {
                rest.push(word.clone());
                continue;
            };
            let given = inline.or_else(|| words.next().cloned());
            let Some(given) = given else {
                return Err(Failure::Usage(format!("{name} needs a value")));
            };
            *value = Some(given);
        }
        Ok((flags, rest))
    }

    fn slot(&mut self, name: &str) -> Option<&mut Option<String>> {
        match name.strip_prefix("--")?.replace('_', "-").as_str() {
            "nproc" | "nproc-per-node" => Some(&mut self.nproc),
            "nnodes" => Some(&mut self.nnodes),
            "node-rank" => Some(&mut self.node_rank),
            "master-addr" | "master" => Some(&mut self.master_addr),
            "master-port" => Some(&mut self.master_port),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotune::core::config::TrainConfig;

    #[test]
    fn flags_about_ranks_are_told_from_configuration_keys() {
        let words = [
            "--lora_r",
            "8",
            "--nnodes",
            "2",
            "--master=a:1",
            "--standalone",
            "--bf16",
        ];
        let words = words.map(str::to_owned);
        let (flags, rest) = LaunchFlags::take(&words).expect("well formed");
        assert_eq!(flags.nnodes.as_deref(), Some("2"));
        assert_eq!(flags.master_addr.as_deref(), Some("a:1"));
        assert!(flags.standalone);
        assert_eq!(rest, ["--lora_r", "8", "--bf16"]);
        assert!(LaunchFlags::take(&["--nproc".to_owned()]).is_err());
    }

    #[test]
    fn no_configuration_key_has_the_name_of_such_a_flag() {
        for key in [
            "nproc",
            "nnodes",
            "node_rank",
            "master",
            "master_addr",
            "master_port",
            "standalone",
        ] {
            assert!(TrainConfig::arity(key).is_none(), "{key}");
        }
    }
}
