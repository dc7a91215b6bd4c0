//! How many ranks a machine has, and which GPU is whose.

use super::reader::{Flag, Reader};
use super::{Code, EnvError, address};

/// More than any machine has GPUs, and few enough that starting them does not bring a machine down.
const MAX_LOCAL_RANKS: usize = 256;

impl Reader<'_> {
    /// Ranks on this machine: the flag, else `name` (a number, `auto` or `gpu`), else one per GPU.
    pub(super) fn nproc(&mut self, name: Option<&str>) -> Result<usize, EnvError> {
        let by_flag = self.flag(Flag::Nproc);
        let by_variable = name.and_then(|name| Some((name, self.variable(name)?)));
        let Some((name, text)) = by_flag.or(by_variable) else {
            return self.one_per_gpu();
        };
        let joint = if name.starts_with("--") { ' ' } else { '=' };
        self.said("local_world_size", format!("{name}{joint}{text}"));
        if address::is_decimal(text) {
            return self.counted(name, text);
        }
        let cpu = self.around.flags.cpu;
        match text {
            "auto" | "gpu" | "cpu" if cpu => {
                self.said("local_world_size", "the CPU device, one rank by default");
                Ok(1)
            }
            "auto" | "gpu" => {
                let gpus = self.around.host.gpus;
                if gpus == 0 {
                    return Err(self.no_gpus(name));
                }
                self.said(
                    "local_world_size",
                    format!("{name}{joint}{text}, visible GPUs: {gpus}"),
                );
                Ok(gpus)
            }
            "cpu" | "xpu" => Err(self.bad_nproc(
                name,
                text,
                "a number, `auto` or `gpu`: ranks are counted by GPU",
                "say `auto`; for ranks on the CPU give a number with --device cpu",
            )),
            _ => Err(self.bad_nproc(
                name,
                text,
                "a number from 1 on, `auto` or `gpu`",
                "correct the number of processes per machine",
            )),
        }
    }

    fn counted(&mut self, name: &str, text: &str) -> Result<usize, EnvError> {
        let count: usize = text.parse().unwrap_or(usize::MAX);
        if count == 0 || count > MAX_LOCAL_RANKS {
            let expected = format!("1 to {MAX_LOCAL_RANKS} ranks on one machine");
            let fix = "ask for one rank per GPU, or on CPUs for a few";
            return Err(self.bad_nproc(name, text, expected, fix));
        }
        if self.around.flags.cpu {
            return Ok(count);
        }
        let gpus = self.around.host.gpus;
        if gpus == 0 {
            return Err(self.no_gpus(name));
        }
        if count > gpus {
            return Err(self.bad_nproc(
                name,
                text,
                format!("at most one rank per visible GPU, of which there are {gpus}"),
                "ask for as many GPUs as ranks in the pod's resources, or lower the number",
            ));
        }
        self.note_idle_gpus(Some(count));
        Ok(count)
    }

    fn one_per_gpu(&mut self) -> Result<usize, EnvError> {
        if self.around.flags.cpu {
            self.said("local_world_size", "the CPU device, one rank by default");
            return Ok(1);
        }
        let gpus = self.around.host.gpus;
        if gpus == 0 {
            return Err(self.no_gpus("--nproc"));
        }
        self.said("local_world_size", format!("visible GPUs: {gpus}"));
        Ok(gpus)
    }

    /// The device of a rank that a launcher started: GPU `local_rank`, or the only one it can see.
    pub(super) fn device_of(
        &self,
        name: &str,
        local_rank: usize,
    ) -> Result<Option<usize>, EnvError> {
        match self.around.host.gpus {
            _ if self.on_cpu() => Ok(None),
            0 => Err(self.no_gpus(name)),
            1 => Ok(Some(0)),
            gpus if local_rank < gpus => Ok(Some(local_rank)),
            gpus => Err(self.error(
                Code::Nproc,
                name,
                format!("a number below {gpus}, the visible GPUs; or exactly one visible GPU"),
                "start one rank per GPU, or let the launcher give each rank a GPU of its own",
            )),
        }
    }

    /// Ranks compute on the CPU: it was asked for, or ferrotune's own launcher found no GPU.
    pub(super) fn on_cpu(&self) -> bool {
        let own = matches!(self.launcher, "ferrotune" | "standalone" | "flags");
        self.around.flags.cpu || (own && self.around.host.gpus == 0)
    }

    pub(super) fn note_idle_gpus(&mut self, local_world_size: Option<usize>) {
        let gpus = self.around.host.gpus;
        if let Some(ranks) = local_world_size
            && ranks < gpus
            && !self.around.flags.cpu
        {
            self.warn(
                "W_IDLE_GPUS",
                format!("{ranks} ranks on {gpus} GPUs: {} stay idle", gpus - ranks),
            );
        }
    }

    fn no_gpus(&self, name: &str) -> EnvError {
        let note = self.around.host.gpu_note.as_deref();
        let note = note.map(|note| format!(" ({note})")).unwrap_or_default();
        self.error(
            Code::Nproc,
            name,
            format!("a visible GPU for each rank, but there is none{note}"),
            "ask for GPUs in the pod's resources; to train on CPUs say --device cpu",
        )
    }

    fn bad_nproc(
        &self,
        name: &str,
        text: &str,
        expected: impl Into<String>,
        fix: &str,
    ) -> EnvError {
        EnvError {
            value: Some(text.to_owned()),
            ..self.error(Code::Nproc, name, expected, fix)
        }
    }
}
