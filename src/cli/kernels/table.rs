//! The table of what every kernel may take of a multiprocessor, and the comparison with it.

use super::build::Build;
use ferrotune::core::io::write_file;
use ferrotune::core::{Error, Result};
use ferrotune::kernels::cuda::KernelResources;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

/// Registers are given to threads in units of this many, so growth within a unit costs nothing.
const REGISTER_UNIT: u32 = 8;

/// What ptxas says of products that are not under way together, or not as long as they are meant to be.
const WAITING: [&str; 2] = [
    "wgmma.mma_async instructions are serialized",
    "warpgroup.wait is injected",
];

const RULE: &str = "As compiled; written by `ferrotune kernels --write`. Registers may grow to the \
    next multiple of 8, the unit they are allocated in. Bytes of spills (stores and loads), stack and \
    static shared memory may not grow, and a hot kernel spills nothing.";

/// What was recorded of every kernel, by module and name.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Table {
    #[serde(rename = "rule")]
    _rule: String,
    compiler: String,
    architectures: Vec<String>,
    modules: BTreeMap<String, BTreeMap<String, Recorded>>,
}

/// One kernel; each list has a value per architecture of the table, zeros where there is no such kernel.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Recorded {
    /// Whether it may not spill at all. True unless a person wrote false.
    hot: bool,
    registers: Vec<u32>,
    spills: Vec<u32>,
    stack: Vec<u32>,
    shared: Vec<u32>,
}

impl Recorded {
    /// Of no architecture of `count`: zeros.
    fn new(hot: bool, count: usize) -> Self {
        let none = || vec![0; count];
        Self {
            hot,
            registers: none(),
            spills: none(),
            stack: none(),
            shared: none(),
        }
    }

    fn set(&mut self, column: usize, kernel: &KernelResources) {
        self.registers[column] = kernel.registers;
        self.spills[column] = spills(kernel);
        self.stack[column] = kernel.stack;
        self.shared[column] = kernel.shared;
    }

    /// Whether there is such a kernel for this architecture.
    fn exists(&self, column: usize) -> bool {
        self.registers[column] > 0
    }
}

impl Table {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read {
            path: path.into(),
            source,
        })?;
        let table: Self = serde_json::from_str(&text)
            .map_err(|error| Error::data(path, error.line() as u64, error.to_string()))?;
        for (name, kernel) in table.modules.values().flatten() {
            let lists = [
                &kernel.registers,
                &kernel.spills,
                &kernel.stack,
                &kernel.shared,
            ];
            let expected = table.architectures.len();
            if lists.iter().any(|list| list.len() != expected) {
                let message =
                    format!("{name}: a list does not have {expected} values, one per arch");
                return Err(Error::data(path, None, message));
            }
        }
        Ok(table)
    }

    /// What is beyond the bounds, missing, or not in the table, one sentence each.
    pub(super) fn violations(&self, build: &Build) -> Vec<String> {
        let mut found = Vec::new();
        if build.compiler != self.compiler {
            found.push(format!(
                "libnvrtc is of CUDA {}, the table of {}: ci/install-nvrtc.sh installs that one",
                build.compiler, self.compiler
            ));
        }
        for (at, arch) in build.architectures.iter().enumerate() {
            match self.architectures.iter().position(|known| known == arch) {
                Some(column) => self.compare(build, at, column, &mut found),
                None => found.push(format!("{arch} is not in the table")),
            }
        }
        found
    }

    /// Compares the architecture at `at` of the build with a column of the table.
    fn compare(&self, build: &Build, at: usize, column: usize, found: &mut Vec<String>) {
        let arch = &build.architectures[at];
        let mut left: Vec<(&str, &str)> = Vec::new();
        for (module, kernels) in &self.modules {
            let there = kernels
                .iter()
                .filter(|(_, recorded)| recorded.exists(column));
            left.extend(there.map(|(kernel, _)| (module.as_str(), kernel.as_str())));
        }
        for built in build.modules.iter().filter(|built| built.arch == *arch) {
            let module = built.module.name;
            // Products of warpgroups that wait for each other are right and slow, and no register says so.
            let mut lines = built.compiled.log.lines();
            let waits = |line: &&str| WAITING.iter().any(|words| line.contains(words));
            if let Some(line) = lines.find(waits) {
                found.push(format!("{module} on {arch}: {}", line.trim()));
            }
            for name in built.module.kernels() {
                if !built.compiled.resources.iter().any(|k| k.kernel == name) {
                    found.push(format!(
                        "{module}/{name} on {arch}: libnvrtc says nothing about it"
                    ));
                }
            }
            for kernel in &built.compiled.resources {
                let name = kernel.kernel.as_str();
                left.retain(|&listed| listed != (module, name));
                if !built.module.kernels().any(|listed| listed == name) {
                    found.push(format!(
                        "{module}/{name} on {arch}: no line `KERNEL({name}, ...)`"
                    ));
                }
                match self.modules.get(module).and_then(|m| m.get(name)) {
                    Some(recorded) => {
                        let beyond = beyond(kernel, recorded, column);
                        found.extend(
                            beyond.map(|what| format!("{module}/{name} on {arch}: {what}")),
                        );
                    }
                    None => found.push(format!("{module}/{name} on {arch}: not in the table")),
                }
            }
        }
        for (module, name) in left {
            found.push(format!(
                "{module}/{name} on {arch}: in the table, but no such kernel"
            ));
        }
    }
}

/// What of `kernel` is beyond its bounds.
fn beyond(
    kernel: &KernelResources,
    recorded: &Recorded,
    column: usize,
) -> impl Iterator<Item = String> {
    let spill_bound = if recorded.hot {
        0
    } else {
        recorded.spills[column]
    };
    let bounds = [
        (
            "registers",
            kernel.registers,
            recorded.registers[column].next_multiple_of(REGISTER_UNIT),
        ),
        ("bytes of spills", spills(kernel), spill_bound),
        ("bytes of stack", kernel.stack, recorded.stack[column]),
        (
            "bytes of shared memory",
            kernel.shared,
            recorded.shared[column],
        ),
    ];
    bounds
        .into_iter()
        .filter(|&(_, got, bound)| got > bound)
        .map(|(what, got, bound)| format!("{got} {what}, at most {bound}"))
}

fn spills(kernel: &KernelResources) -> u32 {
    kernel.spill_stores + kernel.spill_loads
}

/// Writes the table of `build` to `path`, keeping which kernels the one there says are not hot.
pub(super) fn write(path: &Path, build: &Build) -> Result<()> {
    let before = if path.exists() {
        Table::read(path)?
    } else {
        Table::default()
    };
    write_file(path, format(&record(build, &before), build).as_bytes())
}

fn record(build: &Build, before: &Table) -> BTreeMap<String, BTreeMap<String, Recorded>> {
    let mut modules: BTreeMap<String, BTreeMap<String, Recorded>> = BTreeMap::new();
    let architectures = &build.architectures;
    for built in &build.modules {
        let column = architectures.iter().position(|arch| *arch == built.arch);
        let module = modules.entry(built.module.name.to_owned()).or_default();
        for kernel in &built.compiled.resources {
            let known = before.modules.get(built.module.name);
            let known = known.and_then(|module| module.get(&kernel.kernel));
            let entry = module.entry(kernel.kernel.clone());
            let hot = known.is_none_or(|known| known.hot);
            let recorded = entry.or_insert_with(|| Recorded::new(hot, architectures.len()));
            if let Some(column) = column {
                recorded.set(column, kernel);
            }
        }
    }
    modules
}

/// JSON with one line per kernel, so that a change shows which one changed.
fn format(modules: &BTreeMap<String, BTreeMap<String, Recorded>>, build: &Build) -> String {
    let mut text = format!(
        "{{\n  \"rule\": {},\n  \"compiler\": {},\n  \"architectures\": {},\n  \"modules\": {{",
        serde_json::json!(RULE),
        serde_json::json!(build.compiler),
        serde_json::json!(build.architectures),
    );
    let mut comma = "";
    for (module, kernels) in modules {
        let _ = write!(text, "{comma}\n    \"{module}\": {{");
        comma = "";
        for (name, recorded) in kernels {
            let line = serde_json::json!(recorded);
            let _ = write!(text, "{comma}\n      \"{name}\": {line}");
            comma = ",";
        }
        text.push_str("\n    }");
        comma = ",";
    }
    text.push_str("\n  }\n}\n");
    text
}
