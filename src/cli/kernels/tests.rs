use super::architecture;
use super::build::{Build, Built};
use super::table::{Table, write};
use ferrotune::kernels::cuda::{Compiled, KernelResources, modules};
use std::path::{Path, PathBuf};

const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90a"];

/// Every kernel takes 30 registers on sm_80, 31 on sm_90a, and 128 bytes of shared memory.
fn build() -> Build {
    let pairs = modules()
        .iter()
        .flat_map(|&module| ARCHITECTURES.map(|arch| (module, arch)))
        .filter(|(module, arch)| module.is_for(arch));
    let built = pairs.map(|(module, arch)| Built {
        module,
        arch: arch.to_owned(),
        compiled: Compiled {
            cubin: Vec::new(),
            resources: module.kernels().map(|name| resources(name, arch)).collect(),
            log: String::new(),
        },
    });
    Build {
        compiler: "13.0".into(),
        architectures: ARCHITECTURES.map(str::to_owned).to_vec(),
        modules: built.collect(),
    }
}

fn resources(kernel: &str, arch: &str) -> KernelResources {
    KernelResources {
        kernel: kernel.to_owned(),
        registers: if arch == "sm_80" { 30 } else { 31 },
        spill_stores: 0,
        spill_loads: 0,
        stack: 0,
        shared: 128,
    }
}

/// The first kernel of `build` on its second architecture, and how violations name it.
fn first(build: &mut Build) -> (&mut KernelResources, String) {
    let built = &mut build.modules[1];
    let kernel = &mut built.compiled.resources[0];
    let name = format!("{}/{} on sm_90a: ", built.module.name, kernel.kernel);
    (kernel, name)
}

/// A written table of [`build`], changed as a person would in an editor.
fn table(edit: impl FnOnce(String) -> String) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("table.json");
    write(&path, &build()).expect("the table is written");
    let text = std::fs::read_to_string(&path).expect("it can be read");
    std::fs::write(&path, edit(text)).expect("it can be changed");
    (folder, path)
}

fn violations(path: &Path, build: &Build) -> Vec<String> {
    Table::read(path)
        .expect("the table is whole")
        .violations(build)
}

#[test]
fn what_was_written_holds_and_growth_within_a_unit_of_registers_too() {
    let (_folder, path) = table(|text| text);
    let mut build = build();
    assert_eq!(violations(&path, &build), Vec::<String>::new());
    first(&mut build).0.registers = 32;
    assert_eq!(violations(&path, &build), Vec::<String>::new());
}

#[test]
fn products_that_wait_for_each_other_are_named() {
    let (_folder, path) = table(|text| text);
    let mut build = build();
    build.modules[1].compiled.log =
        "ptxas info : (C7515) wgmma.mma_async instructions are serialized due to it".into();
    let module = build.modules[1].module.name;
    let found = violations(&path, &build);
    let start = format!("{module} on sm_90a: ptxas info : (C7515) wgmma.mma_async");
    assert!(
        found.len() == 1 && found[0].starts_with(&start),
        "{found:?}"
    );
}

/// Makes a kernel another one.
type Change = fn(&mut KernelResources);

#[test]
fn each_bound_is_held_and_names_its_kernel() {
    let (_folder, path) = table(|text| text);
    let changes: [(Change, &str); 5] = [
        (|k| k.registers = 33, "33 registers, at most 32"),
        (|k| k.spill_stores = 4, "4 bytes of spills, at most 0"),
        (|k| k.spill_loads = 8, "8 bytes of spills, at most 0"),
        (|k| k.stack = 16, "16 bytes of stack, at most 0"),
        (
            |k| k.shared = 256,
            "256 bytes of shared memory, at most 128",
        ),
    ];
    for (change, what) in changes {
        let mut build = build();
        let (kernel, name) = first(&mut build);
        change(kernel);
        assert_eq!(violations(&path, &build), [name + what]);
    }
}

#[test]
fn only_a_kernel_marked_as_not_hot_may_spill_what_was_recorded_and_stays_marked() {
    let mut spilling = build();
    let (kernel, name) = first(&mut spilling);
    kernel.spill_stores = 4;
    let line = format!("\"{}\": {{\"hot\":", kernel.kernel);
    let (_folder, path) = table(|text| text);
    write(&path, &spilling).expect("the table is written");
    let what = "4 bytes of spills, at most 0";
    assert_eq!(violations(&path, &spilling), [name.clone() + what]);

    let text = std::fs::read_to_string(&path).expect("it can be read");
    let marked = text.replacen(&format!("{line}true"), &format!("{line}false"), 1);
    std::fs::write(&path, marked).expect("it can be changed");
    write(&path, &spilling).expect("the table is written again");
    assert_eq!(violations(&path, &spilling), Vec::<String>::new());
    first(&mut spilling).0.spill_stores = 8;
    let what = "8 bytes of spills, at most 4";
    assert_eq!(violations(&path, &spilling), [name + what]);
}

#[test]
fn kernels_without_a_line_and_lines_without_a_kernel_are_named() {
    let mut build = build();
    let (kernel, _) = first(&mut build);
    let name = kernel.kernel.clone();
    let line = format!("\"{name}\": {{\"hot\"");
    let (_folder, path) = table(|text| text.replacen(&line, "\"another\": {\"hot\"", 1));
    let found = violations(&path, &build).join("\n");
    for what in [
        format!("{name} on sm_80: not in the table"),
        format!("{name} on sm_90a: not in the table"),
        "another on sm_80: in the table, but no such kernel".to_owned(),
    ] {
        assert!(found.contains(&what), "{what:?} in\n{found}");
    }
}

#[test]
fn a_kernel_that_the_compiler_says_nothing_about_fails() {
    let (_folder, path) = table(|text| text);
    let mut build = build();
    let name = build.modules[1].compiled.resources.remove(0).kernel;
    let found = violations(&path, &build).join("\n");
    assert!(
        found.contains(&format!("{name} on sm_90a: libnvrtc says nothing")),
        "{found}"
    );
}

#[test]
fn another_compiler_or_architecture_than_the_tables_fails() {
    let (_folder, path) = table(|text| text.replace("13.0", "12.8").replace("sm_80", "sm_86"));
    let found = violations(&path, &build());
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(
        found[0].contains("CUDA 13.0, the table of 12.8"),
        "{found:?}"
    );
    assert_eq!(found[1], "sm_80 is not in the table");
}

#[test]
fn a_damaged_table_is_refused_with_its_place() {
    let (_folder, path) = table(|text| text.replacen("[30,31]", "[30]", 1));
    let error = Table::read(&path)
        .expect_err("a value is missing")
        .to_string();
    assert!(error.contains("does not have 2 values"), "{error}");
    let (_folder, path) = table(|text| text.replacen("\"hot\"", "\"warm\"", 1));
    let error = Table::read(&path).expect_err("an unknown key").to_string();
    assert!(
        error.contains("table.json:7") && error.contains("warm"),
        "{error}"
    );
}

#[test]
fn architectures_are_cubins_or_ptx_and_a_wrong_one_gets_the_nearest_name() {
    for name in ["sm_80", "sm_100a", "compute_90"] {
        assert_eq!(architecture(name).as_deref(), Ok(name));
    }
    let refused = architecture("sm_90").expect_err("sm_90 is not compiled for");
    assert!(refused.contains("did you mean `sm_90a`?"), "{refused}");
    assert!(architecture("").is_err());
}
