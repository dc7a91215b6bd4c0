//! Every module, compiled for every architecture asked for.

use super::super::print_error_line;
use ferrotune::core::{Error, Result};
use ferrotune::kernels::cuda::{self, Compiled, Module, compile_cached, compiler_version, modules};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A compilation that takes longer is reported as it ends.
const NOTICEABLE: Duration = Duration::from_millis(500);

/// One module on one architecture.
pub(super) struct Built {
    pub(super) module: &'static Module,
    pub(super) arch: String,
    pub(super) compiled: Compiled,
}

/// All of them, by module, then by architecture.
pub(super) struct Build {
    /// Version of the compiler, like `13.0`.
    pub(super) compiler: String,
    pub(super) architectures: Vec<String>,
    pub(super) modules: Vec<Built>,
}

impl Build {
    /// Compiles what the cache does not have, on all cores.
    pub(super) fn new(architectures: Vec<String>) -> Result<Self> {
        let (major, minor) = compiler_version()?;
        let pairs: Vec<(&'static Module, &String)> = modules()
            .iter()
            .flat_map(|&module| architectures.iter().map(move |arch| (module, arch)))
            .filter(|(module, arch)| module.is_for(arch))
            .collect();
        let modules: Result<Vec<Built>> = pairs
            .into_par_iter()
            .map(|(module, arch)| Built::new(module, arch))
            .collect();
        Ok(Self {
            compiler: format!("{major}.{minor}"),
            modules: modules?,
            architectures,
        })
    }

    /// Writes every cubin into `folder`, and returns the paths.
    pub(super) fn save(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let save = |built: &Built| {
            let saved = cuda::save(folder, built.module, &built.arch, &built.compiled);
            saved.map_err(|error| Error::Write {
                path: folder.into(),
                source: io::Error::other(error),
            })
        };
        self.modules.iter().map(save).collect()
    }

    /// What each kernel takes of a multiprocessor, one line each.
    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "{:<44} {:<11} {:>9} {:>13} {:>6} {:>7}\n",
            "kernel", "arch", "registers", "spills st/ld", "stack", "shared"
        );
        for built in &self.modules {
            for kernel in &built.compiled.resources {
                let name = format!("{}/{}", built.module.name, kernel.kernel);
                let spills = format!("{}/{}", kernel.spill_stores, kernel.spill_loads);
                let _ = writeln!(
                    text,
                    "{name:<44} {:<11} {:>9} {spills:>13} {:>6} {:>7}",
                    built.arch, kernel.registers, kernel.stack, kernel.shared
                );
            }
        }
        text
    }

    pub(super) fn json(&self) -> Value {
        let kernels: Vec<Value> = self.modules.iter().flat_map(Built::json).collect();
        json!({
            "compiler": self.compiler,
            "architectures": self.architectures,
            "kernels": kernels,
        })
    }
}

impl Built {
    fn new(module: &'static Module, arch: &str) -> Result<Self> {
        let begin = Instant::now();
        let compiled = compile_cached(module, arch)?;
        let seconds = begin.elapsed();
        if seconds > NOTICEABLE {
            let seconds = seconds.as_secs_f64();
            print_error_line(&format!("{} for {arch}: {seconds:.1} s", module.name));
        }
        Ok(Self {
            module,
            arch: arch.to_owned(),
            compiled,
        })
    }

    fn json(&self) -> Vec<Value> {
        let kernels = self.compiled.resources.iter();
        kernels
            .map(|kernel| {
                json!({
                    "module": self.module.name,
                    "kernel": kernel.kernel,
                    "arch": self.arch,
                    "registers": kernel.registers,
                    "spill_stores": kernel.spill_stores,
                    "spill_loads": kernel.spill_loads,
                    "stack": kernel.stack,
                    "shared": kernel.shared,
                })
            })
            .collect()
    }
}
