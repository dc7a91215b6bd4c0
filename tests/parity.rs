//! Numbers recorded with PyTorch, Transformers and PEFT, and what the harness does with wrong ones.

mod common;

use common::copy_dir;
use ferrotune::core::io::{FileDType, SafetensorsFile, TensorData, write_safetensors};
use ferrotune::core::model::{DecoderConfig, HfConfig};
use ferrotune::kernels::Device;
use ferrotune::parity::{CaseReport, Quantity, run};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Another folder of cases, laid out as `tests/fixtures/golden`.
const MORE_CASES: &str = "FERROTUNE_SHARED_FIXTURES";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden")
}

/// The case folders of `root`, sorted: everything with a case.json.
fn cases(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for group in ["arch", "adapters", "adapters/_bases", "train", "quant"] {
        let entries = std::fs::read_dir(root.join(group)).expect("folder of cases");
        let paths = entries.map(|e| e.expect("readable entry").path());
        found.extend(paths.filter(|p| p.join("case.json").is_file()));
    }
    found.sort();
    found
}

/// Whether this engine has what the case records: the kinds of `tests/fixtures/golden`.
fn is_known(case: &Path) -> bool {
    let name = case
        .file_name()
        .and_then(|n| n.to_str())
        .unwrap_or_default();
    let group = case
        .parent()
        .and_then(Path::file_name)
        .and_then(|n| n.to_str());
    match group {
        Some("arch" | "_bases") => {
            let config = HfConfig::open(case).expect("a model's config");
            DecoderConfig::covers(&config)
        }
        Some("quant") => {
            name.starts_with("hf_")
                || ["bnb_primitives", "_base_llama_bf16", "optim8bit"].contains(&name)
        }
        Some("adapters") => {
            const METHODS: [&str; 16] = [
                "adalora",
                "boft",
                "c3a",
                "delora",
                "fourierft",
                "hira",
                "hra",
                "ia3",
                "loha",
                "lokr",
                "miss",
                "oft",
                "randlora",
                "road",
                "vblora",
                "vera",
            ];
            let of = |method: &&str| name == *method || name.starts_with(&format!("{method}_"));
            let not_yet = [
                "lora_mixtral_attn",
                "lora_mixtral_target_parameters",
                "lora_seqcls_bert",
            ];
            name != "ia3_seqcls_bert" && METHODS.iter().any(of)
                || [
                    "p_tuning_lstm",
                    "p_tuning_mlp",
                    "prefix_tuning",
                    "prefix_tuning_projection",
                    "prompt_tuning",
                    "dora",
                    "multi_weighted",
                    "dora_bias",
                    "dora_rslora_embed",
                    "rslora",
                    "olora",
                    "pissa",
                    "pissa_niter",
                    "ln_tuning",
                    "ln_tuning_saved",
                    "trainable_tokens_only",
                ]
                .contains(&name)
                || name.starts_with("lora_") && !not_yet.contains(&name)
        }
        Some("train") => {
            name.starts_with("lora_ga")
                || [
                    "loraplus_ga1",
                    "lora_fa_ga1",
                    "loraplus_embed_ga1",
                    "lora_bias_all_ga1",
                    "lora_modules_to_save_ga1",
                    "lora_label_smoothing_ga1",
                    "lora_noclip_linear",
                    "lora_big_lr_clipped",
                    "full_ft_ga1",
                    "dora_ga1",
                    "lora_bf16_base_ga1",
                    "schedules",
                    "optimizers",
                ]
                .contains(&name)
        }
        _ => false,
    }
}

fn describe(report: &CaseReport) -> String {
    let worst = report.quantities.iter().filter(|q| !q.passed());
    let lines: Vec<String> = worst
        .map(|q: &Quantity| {
            format!(
                "  {} {}: {:.3e} > {:.3e}",
                q.name, q.worst, q.error, q.tolerance
            )
        })
        .collect();
    format!(
        "{}: {}\n{}",
        report.case.display(),
        report.error.as_deref().unwrap_or("compared"),
        lines.join("\n")
    )
}

fn assert_all_pass(cases: &[PathBuf], device: &Device) {
    let reports: Vec<CaseReport> = cases.iter().map(|case| run(case, device)).collect();
    let failed: Vec<String> = reports.iter().filter(|r| !r.passed).map(describe).collect();
    assert!(
        failed.is_empty(),
        "{} of {} cases failed:\n{}",
        failed.len(),
        cases.len(),
        failed.join("\n")
    );
}

/// Data preparation; nothing of it runs on a device.
#[test]
fn every_recorded_preparation_is_reproduced() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/core/fixtures/sft");
    let shared = std::env::var_os(MORE_CASES).map(|root| Path::new(&root).join("sft"));
    for root in std::iter::once(repository).chain(shared) {
        let entries = std::fs::read_dir(root.join("tokenizers")).expect("folder of tokenizers");
        let mut cases: Vec<PathBuf> = entries.map(|e| e.expect("readable entry").path()).collect();
        assert!(cases.len() >= 6, "a tokenizer was lost: {cases:#?}");
        cases.extend(["chat_templates", "packing", "prepare"].map(|group| root.join(group)));
        assert_all_pass(&cases, &Device::Cpu);
        let renderings = run(&root.join("chat_templates"), &Device::Cpu).quantities;
        let count = |name: &str| -> usize {
            let found = renderings.iter().find(|q| q.name == name);
            found.map_or(0, |q| q.tensors)
        };
        assert!(count("rendered text") >= 468 && count("errors") >= 50);
        assert!(
            count("assistant masks") >= 100,
            "{}",
            count("assistant masks")
        );
    }
}

#[test]
fn every_recorded_case_is_reproduced() {
    let cases = cases(&golden());
    assert_eq!(cases.len(), 158, "a case was lost or added: {cases:#?}");
    assert_all_pass(&cases, &Device::Cpu);
}

/// On the GPU that `FERROTUNE_TEST_DEVICE=cuda` asks for, else on the stand-in that runs the same
/// kernels, products and copies on the host.
#[test]
fn every_recorded_case_is_reproduced_on_a_gpu() {
    let device = Device::Cuda(ferrotune::kernels::host_cuda::device());
    assert_all_pass(&cases(&golden()), &device);
}

#[test]
fn cases_of_another_folder_are_reproduced_where_one_is_named() {
    let Some(root) = std::env::var_os(MORE_CASES) else {
        eprintln!("{MORE_CASES} is not set: only the cases of this repository were compared");
        return;
    };
    let cases: Vec<PathBuf> = cases(Path::new(&root))
        .into_iter()
        .filter(|c| is_known(c))
        .collect();
    assert!(
        !cases.is_empty(),
        "{MORE_CASES} holds no case of a known kind"
    );
    eprintln!("{} cases of {MORE_CASES}", cases.len());
    assert_all_pass(&cases, &Device::Cpu);
}

#[test]
fn a_case_of_an_unknown_kind_fails_and_says_so() {
    let directory = tempfile::tempdir().expect("temporary directory");
    std::fs::write(
        directory.path().join("case.json"),
        r#"{"kind": "horoscope"}"#,
    )
    .expect("writable");
    let report = run(directory.path(), &Device::Cpu);
    assert!(!report.passed);
    let error = report.error.expect("an error");
    assert!(
        error.contains("horoscope") && error.contains("causal_lm"),
        "{error}"
    );
}

#[test]
fn a_case_without_numbers_does_not_pass() {
    let directory = copy_of("arch", "llama_packed");
    let file = directory
        .path()
        .join("arch/llama_packed/expected.safetensors");
    write_safetensors(&file, &BTreeMap::new(), &BTreeMap::new()).expect("writable");
    assert!(!run(&directory.path().join("arch/llama_packed"), &Device::Cpu).passed);
}

/// One case with the bases beside it, to be damaged.
fn copy_of(group: &str, case: &str) -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("temporary directory");
    let to = root.path();
    copy_dir(
        &golden().join("adapters/_bases"),
        &to.join("adapters/_bases"),
    );
    let quantised = "quant/_base_llama_bf16";
    copy_dir(&golden().join(quantised), &to.join(quantised));
    copy_dir(&golden().join(group).join(case), &to.join(group).join(case));
    root
}

/// A file without one of its tensors.
fn lose(file: &Path, name: &str) {
    let read = SafetensorsFile::open(file).expect("recorded file");
    let tensors: BTreeMap<_, _> = read
        .names()
        .filter(|tensor| *tensor != name)
        .map(|tensor| {
            let meta = read.meta(tensor).expect("listed");
            let data = TensorData {
                dtype: meta.dtype,
                shape: meta.shape.clone(),
                bytes: Cow::Owned(read.read_bytes(tensor).expect("readable")),
            };
            (tensor.to_owned(), data)
        })
        .collect();
    assert!(read.meta(name).is_some(), "{name} was never there");
    write_safetensors(file, &tensors, &BTreeMap::new()).expect("writable");
}

#[test]
fn a_case_that_lost_a_merged_weight_does_not_pass() {
    let file = golden().join("adapters/lora_qv/expected.safetensors");
    let names: Vec<String> = SafetensorsFile::open(&file)
        .expect("recorded file")
        .names()
        .filter(|name| name.starts_with("merged."))
        .map(str::to_owned)
        .collect();
    assert_eq!(names.len(), 3);
    for name in names {
        let root = copy_of("adapters", "lora_qv");
        let case = root.path().join("adapters/lora_qv");
        lose(&case.join("expected.safetensors"), &name);
        let report = run(&case, &Device::Cpu);
        let error = report.error.unwrap_or_default();
        assert!(!report.passed && error.contains(&name), "{name}: {error}");
    }
}

/// Adds `relative` times its largest value to the largest element of a recorded tensor.
fn perturb(file: &Path, name: &str, relative: f32) {
    let read = SafetensorsFile::open(file).expect("recorded file");
    assert!(
        read.meta(name).is_some(),
        "{name} is not in {}",
        file.display()
    );
    let mut tensors = BTreeMap::new();
    for tensor in read.names() {
        let meta = read.meta(tensor).expect("listed");
        let mut bytes = read.read_bytes(tensor).expect("readable");
        if tensor == name {
            assert_eq!(meta.dtype, FileDType::F32);
            let values = read.read_f32(tensor).expect("readable");
            let largest = (0..values.len())
                .max_by(|a, b| values[*a].abs().total_cmp(&values[*b].abs()))
                .expect("not empty");
            let changed = values[largest] * (1.0 + relative);
            bytes[largest * 4..largest * 4 + 4].copy_from_slice(&changed.to_le_bytes());
        }
        let data = TensorData {
            dtype: meta.dtype,
            shape: meta.shape.clone(),
            bytes: Cow::Owned(bytes),
        };
        tensors.insert(tensor.to_owned(), data);
    }
    write_safetensors(file, &tensors, &BTreeMap::new()).expect("writable");
}

#[test]
fn a_recorded_tensor_off_by_a_thousandth_fails_its_case() {
    let down = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight";
    let rows = [
        ("arch", "llama_gqa_untied", "expected.safetensors", "logits"),
        ("arch", "llama_gqa_untied", "expected.safetensors", "loss"),
        (
            "arch",
            "llama_gqa_untied",
            "expected.safetensors",
            "grad.model.norm.weight",
        ),
        ("adapters", "lora_qv", "expected.safetensors", "logits"),
        (
            "train",
            "lora_ga1",
            "final_adapter/adapter_model.safetensors",
            down,
        ),
        (
            "train",
            "optimizers",
            "expected.safetensors",
            "hf_adafactor_fixed.after2.p2",
        ),
        (
            "quant",
            "optim8bit",
            "expected.safetensors",
            "lion8bit.after4.p",
        ),
        (
            "quant",
            "hf_nf4_fp32compute",
            "expected.safetensors",
            "qlora.logits",
        ),
        (
            "quant",
            "hf_nf4_fp32compute",
            "expected.safetensors",
            "dequant.model.layers.0.self_attn.q_proj.weight",
        ),
    ];
    for (group, case, file, tensor) in rows {
        let root = copy_of(group, case);
        let directory = root.path().join(group).join(case);
        assert!(
            run(&directory, &Device::Cpu).passed,
            "{group}/{case} fails before it is damaged"
        );
        perturb(&directory.join(file), tensor, 1e-3);
        assert!(
            !run(&directory, &Device::Cpu).passed,
            "{group}/{case} passes with a wrong {tensor}"
        );
    }
}
