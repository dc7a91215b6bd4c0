//! Every program in `examples/` runs to its end, on the model in this repository.

use std::path::{Path, PathBuf};
use std::process::Command;

const EXAMPLES: [&str; 5] = [
    "01_lora_in_30_lines",
    "02_own_data_iterator",
    "03_own_training_loop",
    "04_own_adapter_method",
    "05_merge_and_generate",
];

/// `cargo test` builds examples beside the binary.
fn program(name: &str) -> PathBuf {
    let binary = Path::new(env!("CARGO_BIN_EXE_ferrotune"));
    let folder = binary.parent().expect("a binary lies in a folder");
    folder.join("examples").join(name)
}

#[test]
fn every_example_runs() {
    for name in EXAMPLES {
        let run = Command::new(program(name))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap_or_else(|e| panic!("{name}: {e}; `cargo build --examples` makes it"));
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success(), "{name}: {}\n{said}", run.status);
    }
}
