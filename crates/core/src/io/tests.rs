use super::{FileDType, ModelFiles, SafetensorsFile, TensorData, find_pickle, write_safetensors};
use crate::{Error, ExitCode};
use ferrotune_kernels::{DType, Element, Tensor};
use half::{bf16, f16};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn tensor(dtype: FileDType, shape: &[usize], bytes: Vec<u8>) -> TensorData<'static> {
    TensorData {
        dtype,
        shape: shape.to_vec(),
        bytes: Cow::Owned(bytes),
    }
}

/// One tensor of each dtype that weights come in, the same values in all: exact in f16 and bf16.
fn sample(rows: usize, cols: usize) -> (Vec<f32>, BTreeMap<String, TensorData<'static>>) {
    let values: Vec<f32> = (0..rows * cols).map(|i| (i % 255) as f32 - 127.0).collect();
    let bf: Vec<u8> = values
        .iter()
        .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
        .collect();
    let half: Vec<u8> = values
        .iter()
        .flat_map(|&v| f16::from_f32(v).to_le_bytes())
        .collect();
    let tensors = BTreeMap::from([
        (
            "z.f32".into(),
            tensor(FileDType::F32, &[rows, cols], f32_bytes(&values)),
        ),
        ("a.bf16".into(), tensor(FileDType::BF16, &[rows, cols], bf)),
        ("m.f16".into(), tensor(FileDType::F16, &[rows, cols], half)),
        (
            "ids".into(),
            tensor(
                FileDType::I64,
                &[2],
                [7_i64, -1].iter().flat_map(|v| v.to_le_bytes()).collect(),
            ),
        ),
    ]);
    (values, tensors)
}

fn write(path: &Path, tensors: &BTreeMap<String, TensorData<'_>>) {
    write_safetensors(path, tensors, &BTreeMap::new()).expect("writable");
}

fn message(error: &Error) -> String {
    assert_eq!(error.exit_code(), ExitCode::BadInput, "{error}");
    error.to_string()
}

#[test]
fn what_is_written_is_read_back_in_every_dtype_and_pitch() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("model.safetensors");
    // Several pieces of 1 MiB, and a last piece that is not full.
    let (rows, cols) = (1031, 771);
    let (values, tensors) = sample(rows, cols);
    write(&path, &tensors);
    let file = SafetensorsFile::open(&path).expect("sound");
    assert_eq!(
        file.names().collect::<Vec<_>>(),
        ["a.bf16", "ids", "m.f16", "z.f32"]
    );
    assert_eq!(file.read_i64("ids").expect("i64"), [7, -1]);
    for name in ["a.bf16", "m.f16", "z.f32"] {
        assert_eq!(file.read_f32(name).expect("float"), values, "{name}");
        assert_eq!(file.read_bytes(name).expect("bytes"), *tensors[name].bytes);
        for dtype in [DType::F32, DType::Bf16] {
            let mut packed = Tensor::zeros(dtype, rows, cols);
            file.read_rows_into(name, packed.view_mut())
                .expect("packed");
            assert_eq!(packed.to_f32_vec(), values, "{name} to {dtype}");
            let mut wide = Tensor::zeros(dtype, rows, cols + 5);
            wide.view_mut().fill(-1.0);
            file.read_rows_into(name, wide.view_mut().columns(2..2 + cols))
                .expect("pitched");
            assert_eq!(wide.view().columns(2..2 + cols).to_f32_vec(), values);
            let outside = [
                wide.view().columns(0..2),
                wide.view().columns(cols + 2..cols + 5),
            ];
            assert!(
                outside
                    .iter()
                    .all(|v| v.to_f32_vec().iter().all(|&x| x == -1.0))
            );
        }
    }
}

#[test]
fn f32_to_bf16_rounds_to_nearest_even_and_equal_dtypes_keep_every_bit() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("x.safetensors");
    let bits: Vec<u32> = (0..=u32::MAX).step_by(65_537 * 7).collect();
    let values: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
    let signalling = [0x7f81_u16, 0xff85, 0x3f80];
    let bf: Vec<u8> = signalling.iter().flat_map(|b| b.to_le_bytes()).collect();
    let tensors = BTreeMap::from([
        (
            "f".into(),
            tensor(FileDType::F32, &[values.len()], f32_bytes(&values)),
        ),
        ("b".into(), tensor(FileDType::BF16, &[3, 1], bf)),
    ]);
    write(&path, &tensors);
    let file = SafetensorsFile::open(&path).expect("sound");
    let back: Vec<u32> = file
        .read_f32("f")
        .expect("f32")
        .iter()
        .map(|v| v.to_bits())
        .collect();
    assert_eq!(back, bits);
    let mut rounded = Tensor::zeros(DType::Bf16, 1, values.len());
    file.read_rows_into("f", rounded.view_mut())
        .expect("vector is one row");
    let expected: Vec<u32> = values
        .iter()
        .map(|&v| <bf16 as Element>::from_f32(v).to_f32().to_bits())
        .collect();
    let got: Vec<u32> = rounded.to_f32_vec().iter().map(|v| v.to_bits()).collect();
    assert_eq!(got, expected);
    let mut wide = Tensor::zeros(DType::Bf16, 3, 2);
    file.read_rows_into("b", wide.view_mut().columns(1..2))
        .expect("pitched");
    let rows = wide.view().typed::<bf16>().expect("bf16");
    let got: Vec<u16> = (0..3).map(|r| rows.row(r)[1].to_bits()).collect();
    assert_eq!(got, signalling);
}

#[test]
fn tensors_of_no_elements_are_legal() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("x.safetensors");
    let tensors = BTreeMap::from([
        ("none".into(), tensor(FileDType::F32, &[0, 4], vec![])),
        (
            "scalar".into(),
            tensor(FileDType::F32, &[], f32_bytes(&[2.5])),
        ),
    ]);
    write(&path, &tensors);
    let file = SafetensorsFile::open(&path).expect("sound");
    assert!(file.read_f32("none").expect("empty").is_empty());
    file.read_rows_into("none", Tensor::zeros(DType::Bf16, 0, 4).view_mut())
        .expect("empty");
    assert_eq!(file.read_f32("scalar").expect("scalar"), [2.5]);
    write(&path, &BTreeMap::new());
    assert_eq!(
        SafetensorsFile::open(&path)
            .expect("no tensors")
            .names()
            .count(),
        0
    );
}

#[test]
fn writer_makes_the_same_bytes_twice_and_those_of_the_safetensors_library() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (_, tensors) = sample(3, 5);
    let pairs = [
        ("format", "pt"),
        ("b", "2"),
        ("a", "\"quoted\"\n"),
        ("ü", "ß"),
    ];
    let metadata: BTreeMap<String, String> = pairs
        .iter()
        .map(|(k, v)| ((*k).into(), (*v).into()))
        .collect();
    let paths = [dir.path().join("1"), dir.path().join("2")];
    for path in &paths {
        write_safetensors(path, &tensors, &metadata).expect("writable");
    }
    let bytes = fs::read(&paths[0]).expect("readable");
    assert_eq!(bytes, fs::read(&paths[1]).expect("readable"));
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
    assert_eq!(header % 8, 0);
    assert_eq!(
        SafetensorsFile::open(&paths[0]).expect("sound").metadata(),
        &metadata
    );
    assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());

    let one: BTreeMap<String, String> = BTreeMap::from([("format".into(), "pt".into())]);
    write_safetensors(&paths[0], &tensors, &one).expect("writable");
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, t)| {
            let view = safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), &t.bytes);
            (name, view.expect("sizes fit"))
        })
        .collect();
    let theirs = safetensors::serialize(views, Some(HashMap::from_iter(one))).expect("sound");
    assert_eq!(fs::read(&paths[0]).expect("readable"), theirs);
}

#[test]
fn writer_refuses_bytes_that_do_not_fit_the_shape_and_keeps_the_old_file() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("x.safetensors");
    fs::write(&path, "old").expect("writable");
    for (name, shape) in [
        ("t", vec![3]),
        ("t", vec![usize::MAX, 2]),
        ("__metadata__", vec![1]),
    ] {
        let tensors = BTreeMap::from([(name.into(), tensor(FileDType::F32, &shape, vec![0; 4]))]);
        let error = write_safetensors(&path, &tensors, &BTreeMap::new()).expect_err(name);
        assert!(error.to_string().contains(name), "{error}");
    }
    assert_eq!(fs::read(&path).expect("readable"), b"old");
    assert_eq!(fs::read_dir(dir.path()).expect("directory").count(), 1);
}

#[test]
fn a_missing_tensor_a_wrong_shape_and_a_wrong_dtype_are_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("x.safetensors");
    write(&path, &sample(2, 3).1);
    let file = SafetensorsFile::open(&path).expect("sound");
    let text = message(&file.read_f32("z.f33").expect_err("missing"));
    assert!(
        text.contains("did you mean `z.f32`") && text.contains("x.safetensors"),
        "{text}"
    );
    let mut other = Tensor::zeros(DType::F32, 3, 2);
    let text = message(
        &file
            .read_rows_into("z.f32", other.view_mut())
            .expect_err("shape"),
    );
    assert!(text.contains("[2, 3], expected [3, 2]"), "{text}");
    let text = message(&file.read_f32("ids").expect_err("dtype"));
    assert!(
        text.contains("`ids` is I64, expected F32, F16 or BF16"),
        "{text}"
    );
    assert!(message(&file.read_i64("z.f32").expect_err("dtype")).contains("expected I64"));
}

#[test]
fn a_file_cut_short_after_opening_is_an_error_not_a_crash() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("x.safetensors");
    write(&path, &sample(700, 700).1);
    let file = SafetensorsFile::open(&path).expect("sound");
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|f| f.set_len(5000))
        .expect("cut");
    let text = message(&file.read_f32("z.f32").expect_err("cut"));
    assert!(text.contains("cut short while it was being read"), "{text}");
    assert!(file.read_bytes("a.bf16").is_err());
}

#[test]
fn only_pickle_is_refused_with_the_way_out() {
    for name in [
        "pytorch_model.bin",
        "model.PT",
        "consolidated.00.pth",
        "last.ckpt",
    ] {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::write(dir.path().join(name), b"\x80\x02").expect("writable");
        fs::write(dir.path().join("config.json"), "{}").expect("writable");
        let text = message(&ModelFiles::open(dir.path()).expect_err(name));
        assert!(
            text.contains("pickle is never read") && text.contains(name),
            "{text}"
        );
        assert!(find_pickle(dir.path()).is_some());
    }
    let dir = tempfile::tempdir().expect("temporary directory");
    let text = message(&ModelFiles::open(dir.path()).expect_err("empty"));
    assert!(text.contains("expected model.safetensors"), "{text}");
    let text = message(&ModelFiles::open(dir.path().join("no")).expect_err("missing"));
    assert!(text.contains("no such directory"), "{text}");
}

fn one(value: f32) -> TensorData<'static> {
    tensor(FileDType::F32, &[1], f32_bytes(&[value]))
}

fn sharded(shards: &[(&str, &[&str])], weight_map: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (file, names) in shards {
        let tensors = names
            .iter()
            .map(|&n| (n.to_owned(), one(n.len() as f32)))
            .collect();
        write(&dir.path().join(file), &tensors);
    }
    let pairs: Vec<String> = weight_map
        .iter()
        .map(|(t, f)| format!("{t:?}:{f:?}"))
        .collect();
    let index = format!(
        r#"{{"metadata":{{"total_size":8}},"weight_map":{{{}}}}}"#,
        pairs.join(",")
    );
    fs::write(dir.path().join("model.safetensors.index.json"), index).expect("writable");
    dir
}

#[test]
fn shards_are_found_through_the_index() {
    let (s1, s2) = (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    );
    let dir = sharded(
        &[(s1, &["a", "ccc"]), (s2, &["bb"])],
        &[("a", s1), ("bb", s2), ("ccc", s1)],
    );
    let files = ModelFiles::open(dir.path()).expect("sound");
    assert_eq!(files.names().collect::<Vec<_>>(), ["a", "bb", "ccc"]);
    assert_eq!(files.shards().len(), 2);
    assert_eq!(files.file_of("bb"), dir.path().join(s2));
    assert_eq!(files.read_f32("bb").expect("there"), [2.0]);
    assert_eq!(files.meta("ccc").expect("there").shape, [1]);
    let mut place = Tensor::zeros(DType::Bf16, 1, 1);
    files
        .read_rows_into("ccc", place.view_mut())
        .expect("there");
    assert_eq!(place.to_f32_vec(), [3.0]);
    let text = message(&files.read_f32("bbb").expect_err("missing"));
    assert!(text.contains("no tensor `bbb`"), "{text}");
}

#[test]
fn an_index_that_does_not_fit_its_shards_is_refused() {
    let (s1, s2) = ("s1.safetensors", "s2.safetensors");
    type Case<'a> = (
        &'a [(&'a str, &'a [&'a str])],
        &'a [(&'a str, &'a str)],
        &'a str,
    );
    let cases: [Case<'_>; 7] = [
        (
            &[(s1, &["a"])],
            &[("a", s1), ("b", s2)],
            "s2.safetensors: shard is missing",
        ),
        (
            &[(s1, &["a"])],
            &[("a", s1), ("b", s1)],
            "places tensor `b` here, but the shard lacks it",
        ),
        (
            &[(s1, &["a"]), (s2, &["a", "b"])],
            &[("a", s1), ("b", s2)],
            "tensor `a` is also in",
        ),
        (
            &[(s1, &["a", "c"]), (s2, &["b"])],
            &[("a", s2), ("c", s1), ("b", s2)],
            "places tensor `a` here, but it is in",
        ),
        (
            &[(s1, &["a"])],
            &[("a", s1), ("a", s1)],
            "`a` appears twice",
        ),
        (&[(s1, &["a"])], &[], "`weight_map` is empty"),
        (
            &[(s1, &["a"])],
            &[("a", "pytorch_model.bin")],
            "expected a .safetensors file",
        ),
    ];
    for (shards, weight_map, expected) in cases {
        let dir = sharded(shards, weight_map);
        let text = message(&ModelFiles::open(dir.path()).expect_err(expected));
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn an_index_cannot_lead_out_of_its_directory() {
    let outside = tempfile::tempdir().expect("temporary directory");
    write(
        &outside.path().join("x.safetensors"),
        &BTreeMap::from([("a".into(), one(1.0))]),
    );
    let absolute = outside.path().join("x.safetensors");
    for name in [
        "../x.safetensors",
        absolute.to_str().expect("UTF-8"),
        "a/../x.safetensors",
        "",
        "..",
    ] {
        let dir = sharded(&[], &[("a", name)]);
        let text = message(&ModelFiles::open(dir.path()).expect_err(name));
        assert!(text.contains("expected one plain name"), "{text}");
    }
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_not_replaced_by_one() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let pipe = directory.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.expect("mkfifo runs").success());
    let error = crate::io::write_file(&pipe, b"x").expect_err("a pipe");
    assert_eq!(error.exit_code(), crate::ExitCode::CannotWrite, "{error}");
    assert!(error.to_string().contains("no regular file"), "{error}");
    let kind = std::fs::symlink_metadata(&pipe)
        .expect("it is there")
        .file_type();
    assert!(!kind.is_file());
    assert_eq!(
        std::fs::read_dir(directory.path())
            .expect("readable")
            .count(),
        1
    );
}
