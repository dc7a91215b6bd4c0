//! The texts beside the code say what the code says.

use ferrotune::core::EXIT_CODES;
use ferrotune::core::config::markdown_reference;
use ferrotune::core::optimizer::OPTIMIZERS;
use std::path::Path;

const TEXTS: [&str; 13] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/adding-a-model.md",
    "docs/config.md",
    "docs/data.md",
    "docs/gpu.md",
    "docs/launchers.md",
    "docs/outputs.md",
    "docs/checkpoints.md",
    "docs/optimizers.md",
    "docs/parity.md",
];

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn the_configuration_reference_is_current() {
    assert!(
        read("docs/config.md").trim_end() == markdown_reference().trim_end(),
        "docs/config.md is old; run: cargo run -- config-schema --markdown > docs/config.md"
    );
}

#[test]
fn the_readme_lists_every_exit_code() {
    let readme = read("README.md");
    for (code, meaning) in EXIT_CODES {
        let row = format!("| {} | {meaning} |", code as u8);
        assert!(readme.contains(&row), "README.md lacks the row `{row}`");
    }
}

#[test]
fn links_lead_to_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in TEXTS {
        let folder = root.join(name);
        let folder = folder.parent().unwrap_or(root);
        for target in read(name).split("](").skip(1) {
            let target = target.split([')', '#']).next().unwrap_or_default();
            let elsewhere = target.is_empty() || target.contains("://");
            assert!(
                elsewhere || folder.join(target).exists(),
                "{name}: `{target}` does not exist"
            );
        }
    }
}

#[test]
fn every_optimizer_is_in_its_table() {
    let text = read("docs/optimizers.md");
    let rows: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    for entry in OPTIMIZERS {
        let name = format!("`{}`", entry.name);
        let named = |row: &&&str| {
            row.split(" | ")
                .next()
                .is_some_and(|cell| cell.contains(&name))
        };
        assert_eq!(rows.iter().filter(named).count(), 1, "{name}");
    }
}
