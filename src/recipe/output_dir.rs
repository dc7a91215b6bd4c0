//! The output directory, before anything is written to it.

use ferrotune_core::checkpoint;
use ferrotune_core::config::{Resume, TrainConfig};
use ferrotune_core::io::probe_writable;
use ferrotune_core::{Error, Result};
use std::path::Path;

/// Checks that a run may write to its output directory, and can. Leaves no new directory behind.
///
/// # Errors
/// [`Error::Config`] if it is the base's own directory or holds an earlier run, [`Error::Write`].
pub(super) fn check(config: &TrainConfig, base: &Path) -> Result<()> {
    let output = Path::new(&config.output.output_dir);
    refuse_a_file(output)?;
    refuse_the_base(output, base)?;
    probe(output)?;
    refuse_to_overwrite(config, output)
}

fn refuse_a_file(output: &Path) -> Result<()> {
    if output.is_dir() || !output.exists() {
        return Ok(());
    }
    let message = "it is a file, and output_dir must be a directory; choose another output_dir";
    Err(Error::write(output)(std::io::Error::other(message)))
}

/// The base must outlive the run: neither its weights nor the checkpoint it lies in may go.
fn refuse_the_base(output: &Path, base: &Path) -> Result<()> {
    let Ok(canonical) = output.canonicalize() else {
        // What does not exist yet holds no base.
        return Ok(());
    };
    let base = base.canonicalize().map_err(Error::read(base))?;
    let message = if canonical == base {
        "is the directory of the base model, which the run would overwrite"
    } else if checkpoint::list(&canonical)?
        .iter()
        .any(|(_, path)| base.starts_with(path))
    {
        "holds the base model among its checkpoints, which the run may delete"
    } else {
        return Ok(());
    };
    Err(Error::config(
        "output_dir",
        format!("`{}` {message}; choose another directory", output.display()),
    ))
}

fn refuse_to_overwrite(config: &TrainConfig, output: &Path) -> Result<()> {
    let fresh = config.output.resume_from_checkpoint == Resume::Never;
    let has_checkpoints = !checkpoint::list(output)?.is_empty();
    if fresh && has_checkpoints && !config.output.overwrite_output_dir {
        return Err(Error::config(
            "output_dir",
            format!(
                "`{}` holds checkpoints of an earlier run; go on with resume_from_checkpoint: auto, start over \
                 with overwrite_output_dir: true, or choose another directory",
                output.display()
            ),
        ));
    }
    Ok(())
}

/// Writes a file there and removes it; directories that were made for it go again.
fn probe(output: &Path) -> Result<()> {
    let made: Vec<&Path> = output
        .ancestors()
        .take_while(|path| !path.as_os_str().is_empty() && !path.exists())
        .collect();
    let probed = probe_writable(output);
    for directory in made {
        // Only an empty one can be removed: what another process has put there stays.
        if std::fs::remove_dir(directory).is_err() {
            break;
        }
    }
    probed
}
