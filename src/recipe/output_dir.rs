//! The output directory, before anything is written to it.

use ferrotune_core::checkpoint;
use ferrotune_core::config::{Resume, TrainConfig};
use ferrotune_core::io::probe_writable;
use ferrotune_core::{Error, Result};
use std::path::Path;

/// Files of a result, at the top of the output directory.
const RESULT: [&str; 6] = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "model.safetensors",
    "config.json",
    "run.json",
    "trainer_log.jsonl",
];

/// Checks that a run may write to its output directory, and can. Leaves no new directory behind.
///
/// # Errors
/// [`Error::Config`] if it is the base's own directory or holds an earlier run, [`Error::Write`].
pub(super) fn check(config: &TrainConfig, base: &Path) -> Result<()> {
    let output = Path::new(&config.output.output_dir);
    refuse_a_file(output)?;
    refuse_the_base(output, base)?;
    refuse_what_cannot_be_replaced(output)?;
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

/// A link to a checkpoint, which counts as none, and directories where files are to go: found at the end
/// otherwise, when the training is done.
fn refuse_what_cannot_be_replaced(output: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(output) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let path = entry.path();
        let problem = if name.starts_with("checkpoint-") && path.is_symlink() {
            "is a link, and a checkpoint is a directory; move its target here"
        } else if path.is_dir() && RESULT.contains(&&*name) {
            "is a directory, where a file of the result goes; move it away"
        } else {
            continue;
        };
        return Err(Error::write(&path)(std::io::Error::other(problem)));
    }
    Ok(())
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
