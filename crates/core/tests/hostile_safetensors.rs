//! Files that lie about themselves are refused without a panic and without believing their sizes.

use ferrotune_core::ExitCode;
use ferrotune_core::io::SafetensorsFile;
use proptest::prelude::{any, prop_assert, proptest};
use std::path::Path;

/// Length, header, data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 1);
    bytes
}

fn one(info: &str, data: usize) -> Vec<u8> {
    file(&format!("{{\"a\":{{{info}}}}}"), data)
}

fn two(first: &str, second: &str, data: usize) -> Vec<u8> {
    let info = |name: &str, offsets: &str| {
        format!("\"{name}\":{{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[{offsets}]}}")
    };
    file(
        &format!("{{{},{}}}", info("a", first), info("b", second)),
        data,
    )
}

fn with_length(length: u64) -> Vec<u8> {
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend_from_slice(b"{}      ");
    bytes
}

const F32: &str = "\"dtype\":\"F32\",\"shape\"";

fn lying_lengths() -> Vec<(&'static str, Vec<u8>)> {
    let mut flipped = one(&format!("{F32}:[2],\"data_offsets\":[0,8]"), 8);
    flipped.truncate(flipped.len() - 1);
    vec![
        ("empty file", Vec::new()),
        ("seven bytes", vec![0; 7]),
        ("header of no bytes", vec![0; 8]),
        ("header length 2^63", with_length(1 << 63)),
        ("header length 2^64 - 1", with_length(u64::MAX)),
        ("header length 2^64 - 8", with_length(u64::MAX - 7)),
        (
            "header length 100 MB in a small file",
            with_length(100_000_000),
        ),
        ("header one byte longer than the file", with_length(9)),
        ("header above the cap", file(&" ".repeat((16 << 20) + 1), 0)),
        ("last byte missing", flipped),
        (
            "no data at all",
            one(&format!("{F32}:[2],\"data_offsets\":[0,8]"), 0),
        ),
        (
            "one byte too many",
            one(&format!("{F32}:[2],\"data_offsets\":[0,8]"), 9),
        ),
        ("data without tensors", file("{}", 8)),
    ]
}

fn lying_json() -> Vec<(&'static str, Vec<u8>)> {
    let deep = "[".repeat(100_000);
    let deep_object = "{\"a\":".repeat(100_000);
    let tensor = format!("\"a\":{{{F32}:[0],\"data_offsets\":[0,0]}}");
    let zeros = "0,".repeat(4_000_000);
    let mut not_utf8 = file("{\"a_\":{}}", 0);
    not_utf8[11] = 0xff;
    vec![
        ("not JSON", file("hello, world!   ", 0)),
        ("an array", file("[]", 0)),
        ("blank before the brace", file(" {}", 0)),
        ("cut JSON", file("{\"a\":{\"dtype\":\"F32\"", 0)),
        ("two objects", file("{}{}", 0)),
        ("not UTF-8", not_utf8),
        ("nested arrays", file(&deep, 0)),
        (
            "nested arrays for a tensor",
            file(&format!("{{\"a\":{deep}"), 0),
        ),
        (
            "nested arrays for an unknown field",
            one(&format!("\"x\":{deep}"), 0),
        ),
        ("nested objects", file(&deep_object, 0)),
        (
            "nested metadata",
            file(&format!("{{\"__metadata__\":{deep_object}"), 0),
        ),
        (
            "metadata that is no text",
            file("{\"__metadata__\":{\"a\":1}}", 0),
        ),
        (
            "metadata twice",
            file("{\"__metadata__\":{},\"__metadata__\":{}}", 0),
        ),
        (
            "metadata with a key twice",
            file("{\"__metadata__\":{\"a\":\"\",\"a\":\"\"}}", 0),
        ),
        ("a tensor twice", file(&format!("{{{tensor},{tensor}}}"), 0)),
        (
            "a field twice",
            one(
                &format!("{F32}:[0],\"shape\":[0],\"data_offsets\":[0,0]"),
                0,
            ),
        ),
        ("a tensor that is null", file("{\"a\":null}", 0)),
        (
            "millions of dimensions",
            one(&format!("{F32}:[{zeros}0],\"data_offsets\":[0,0]"), 0),
        ),
        ("no dtype", one("\"shape\":[0],\"data_offsets\":[0,0]", 0)),
        (
            "no shape",
            one("\"dtype\":\"F32\",\"data_offsets\":[0,0]", 0),
        ),
        ("no offsets", one(&format!("{F32}:[0]"), 0)),
        (
            "unknown dtype",
            one("\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,4]", 4),
        ),
    ]
}

fn lying_tensors() -> Vec<(&'static str, Vec<u8>)> {
    let sized = |shape: &str, offsets: &str, data| {
        one(&format!("{F32}:{shape},\"data_offsets\":{offsets}"), data)
    };
    vec![
        ("range shorter than the shape", sized("[3]", "[0,8]", 8)),
        ("range longer than the shape", sized("[1]", "[0,8]", 8)),
        (
            "shape of 2^62 elements",
            sized("[4611686018427387904]", "[0,8]", 8),
        ),
        (
            "shape whose product is 2^64",
            sized("[4294967296,4294967296]", "[0,0]", 0),
        ),
        (
            "shape whose bytes are 2^64",
            sized("[2305843009213693952,2]", "[0,0]", 0),
        ),
        (
            "dimension above 2^64",
            sized("[18446744073709551616]", "[0,0]", 0),
        ),
        ("negative dimension", sized("[-1]", "[0,4]", 4)),
        ("fractional dimension", sized("[1.5]", "[0,6]", 6)),
        ("range that ends before it starts", sized("[1]", "[8,4]", 8)),
        (
            "range at the end of memory",
            sized("[1]", "[18446744073709551612,18446744073709551615]", 4),
        ),
        (
            "true size, but beyond the file",
            sized("[1073741824]", "[0,4294967296]", 8),
        ),
        ("three offsets", sized("[1]", "[0,4,8]", 8)),
        ("one offset", sized("[1]", "[4]", 4)),
        ("overlap", two("0,4", "2,6", 6)),
        ("same range twice", two("0,4", "0,4", 4)),
        ("hole between", two("0,4", "8,12", 12)),
        ("hole before", two("4,8", "8,12", 12)),
        (
            "half a byte",
            one("\"dtype\":\"F4\",\"shape\":[1],\"data_offsets\":[0,1]", 1),
        ),
    ]
}

/// Highest resident set of this process since the last [`forget_peak`], in bytes.
#[cfg(target_os = "linux")]
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))
        .expect("VmHWM");
    let kib: u64 = line
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("a number");
    kib << 10
}

#[cfg(target_os = "linux")]
fn forget_peak() {
    std::fs::write("/proc/self/clear_refs", "5").expect("Linux");
}

#[cfg(not(target_os = "linux"))]
fn peak_bytes() -> u64 {
    0
}

#[cfg(not(target_os = "linux"))]
fn forget_peak() {}

fn refusal(path: &Path) -> String {
    let error = SafetensorsFile::open(path).expect_err("a lie");
    assert_eq!(error.exit_code(), ExitCode::BadInput, "{error}");
    error.to_string()
}

#[test]
fn crafted_files_are_refused_by_name_quickly_and_in_little_memory() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let cases: Vec<_> = [lying_lengths(), lying_json(), lying_tensors()].concat();
    assert!(cases.len() >= 50);
    for (i, (what, bytes)) in cases.iter().enumerate() {
        let path = dir.path().join(format!("case-{i}.safetensors"));
        std::fs::write(&path, bytes).expect("writable");
        forget_peak();
        let (before, start) = (peak_bytes(), std::time::Instant::now());
        let text = refusal(&path);
        assert!(
            start.elapsed().as_secs_f64() < 1.0,
            "{what} took {:?}",
            start.elapsed()
        );
        assert!(
            text.contains(&format!("case-{i}.safetensors: ")),
            "{what}: {text}"
        );
        assert!(text.len() < 500, "{what}: message of {} bytes", text.len());
        let grown = peak_bytes() - before;
        let allowed = bytes.len() as u64 + (4 << 20);
        assert!(
            grown <= allowed,
            "{what}: {grown} bytes for a file of {}",
            bytes.len()
        );
    }
}

#[test]
fn what_is_not_a_file_is_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    assert!(refusal(dir.path()).contains("not a regular file"));
    assert!(refusal(&dir.path().join("none")).contains("none"));
}

/// A sound file of two tensors and metadata.
fn sound() -> Vec<u8> {
    let header = "{\"__metadata__\":{\"format\":\"pt\"},\
        \"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},\
        \"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[16,22]}}";
    file(header, 22)
}

#[test]
fn the_sound_file_that_the_mutations_start_from_is_accepted() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("x.safetensors");
    std::fs::write(&path, sound()).expect("writable");
    let file = SafetensorsFile::open(&path).expect("sound");
    assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b"]);
}

proptest! {
    #[test]
    fn mutated_files_are_read_or_refused_but_never_panic(
        edits in proptest::collection::vec((any::<u16>(), any::<u8>(), 0..3_u8), 1..4),
    ) {
        let mut bytes = sound();
        for (at, value, kind) in edits {
            let at = usize::from(at) % bytes.len().max(1);
            match kind {
                0 => bytes.truncate(at),
                1 => bytes.insert(at.min(bytes.len()), value),
                _ => if let Some(b) = bytes.get_mut(at) { *b = value },
            }
        }
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("x.safetensors");
        std::fs::write(&path, &bytes).expect("writable");
        if let Ok(file) = SafetensorsFile::open(&path) {
            let mut total = 0;
            for name in file.names() {
                total += file.read_bytes(name).expect("checked at opening").len();
            }
            prop_assert!(total <= bytes.len());
        }
    }
}

#[test]
fn a_dtype_that_is_not_known_names_its_tensor() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("model.safetensors");
    let header = "\"dtype\":\"F7\",\"shape\":[2],\"data_offsets\":[0,8]";
    std::fs::write(&path, one(header, 8)).expect("writable");
    let error = SafetensorsFile::open(&path)
        .expect_err("refused")
        .to_string();
    assert!(
        error.contains("tensor `a`") && error.contains("F7"),
        "{error}"
    );
}
