//! What there is, and where a run would find it.

use super::super::{Outcome, print_line, print_note};
use super::print_document;
use ferrotune::core::{Error, ExitCode, Result};
use ferrotune::kernels::Error as KernelError;
use ferrotune::kernels::cuda::{Module, Origin, find, modules};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

pub(super) fn run(architectures: &[String], as_json: bool) -> Outcome {
    let mut listed = Vec::new();
    let mut blind = false;
    for &module in modules() {
        listed.push((module, origins(module, architectures, &mut blind)?));
    }
    if as_json {
        let modules: Vec<Value> = listed
            .iter()
            .map(|(module, origins)| as_value(module, architectures, origins))
            .collect();
        print_document(&json!({ "modules": modules }))?;
    } else {
        for (module, origins) in &listed {
            print_module(module, architectures, origins)?;
        }
        print_places(listed.iter().flat_map(|(_, origins)| origins))?;
    }
    if blind {
        print_note(
            "the cache was not looked at: its entries carry the version of libnvrtc, which was not \
             found",
        );
    }
    Ok(ExitCode::Done)
}

/// Where the cubin of each architecture is. `blind` becomes true if the cache cannot be looked at.
fn origins(
    module: &Module,
    architectures: &[String],
    blind: &mut bool,
) -> Result<Vec<Option<Origin>>> {
    let origin = |arch: &String| match find(module, arch) {
        Err(KernelError::Library { .. }) => {
            *blind = true;
            Ok(None)
        }
        found => found.map_err(Error::from),
    };
    architectures.iter().map(origin).collect()
}

fn print_module(
    module: &Module,
    architectures: &[String],
    origins: &[Option<Origin>],
) -> Result<()> {
    let mut line = module.name.to_owned();
    let of_arch = architectures.iter().zip(origins);
    for (arch, origin) in of_arch.filter(|(arch, _)| module.is_for(arch)) {
        line += &format!("  {arch}: {}", kind(origin.as_ref()));
    }
    print_line(line)?;
    module
        .kernels()
        .try_for_each(|kernel| print_line(format_args!("  {kernel}")))
}

/// The folders that the words of the list stand for.
fn print_places<'a>(origins: impl Iterator<Item = &'a Option<Origin>>) -> Result<()> {
    let mut places = BTreeSet::new();
    for origin in origins.flatten() {
        let (Origin::Folder(path) | Origin::Cache(path)) = origin;
        if let Some(folder) = path.parent() {
            places.insert(format!("{}: {}", kind(Some(origin)), folder.display()));
        }
    }
    places.into_iter().try_for_each(print_line)
}

fn kind(origin: Option<&Origin>) -> &'static str {
    match origin {
        None => "none",
        Some(Origin::Folder(_)) => "folder",
        Some(Origin::Cache(_)) => "cache",
    }
}

fn as_value(module: &Module, architectures: &[String], origins: &[Option<Origin>]) -> Value {
    let mut cubins = Map::new();
    let of_arch = architectures.iter().zip(origins);
    for (arch, origin) in of_arch.filter(|(arch, _)| module.is_for(arch)) {
        let path = origin.as_ref().map(|origin| {
            let (Origin::Folder(path) | Origin::Cache(path)) = origin;
            path
        });
        cubins.insert(
            arch.clone(),
            json!({ "from": kind(origin.as_ref()), "path": path }),
        );
    }
    json!({
        "module": module.name,
        "kernels": module.kernels().collect::<Vec<_>>(),
        "cubins": cubins,
    })
}
