//! Models and data sets by their names, from a hub that is a small server of this test.

mod common;

use common::{Finished, Workbench, command, copy_dir, entries, read, read_json, text};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What is answered: a status, a body, and the length that is claimed of it.
#[derive(Clone)]
struct Answer {
    status: u16,
    body: Vec<u8>,
    length: usize,
}

impl Answer {
    fn ok(body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self {
            status: 200,
            length: body.len(),
            body,
        }
    }

    fn status(status: u16) -> Self {
        Self {
            status,
            ..Self::ok("no")
        }
    }
}

type Answers = BTreeMap<String, Answer>;

/// A hub on loopback: what it answers, and what it was asked.
struct Hub {
    address: String,
    answers: Arc<Mutex<Answers>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let (answers, asked) = (
            Arc::<Mutex<Answers>>::default(),
            Arc::<Mutex<Vec<_>>>::default(),
        );
        let (theirs, log) = (Arc::clone(&answers), Arc::clone(&asked));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (answers, log) = (Arc::clone(&theirs), Arc::clone(&log));
                std::thread::spawn(move || serve(stream, &answers, &log));
            }
        });
        Self {
            address,
            answers,
            asked,
        }
    }

    fn answer(&self, path: &str, answer: Answer) {
        self.answers
            .lock()
            .expect("whole")
            .insert(path.to_owned(), answer);
    }

    /// `model/tiny` with the files of a directory.
    fn hold(&self, kind: &str, id: &str, directory: &Path, files: &[&str]) {
        let siblings: Vec<Value> = files.iter().map(|f| json!({"rfilename": f})).collect();
        let listing = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        for revision in ["main", "v1", COMMIT] {
            let path = format!("/api/{kind}/{id}/revision/{revision}");
            self.answer(&path, Answer::ok(listing.clone()));
        }
        let prefix = if kind == "datasets" { "/datasets" } else { "" };
        for file in files {
            let path = format!("{prefix}/{id}/resolve/{COMMIT}/{file}");
            let body = std::fs::read(directory.join(file)).unwrap_or_default();
            self.answer(&path, Answer::ok(body));
        }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().expect("whole"))
    }
}

fn serve(mut stream: TcpStream, answers: &Mutex<Answers>, asked: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().expect("a handle"));
    let mut first = String::new();
    lines.read_line(&mut first).unwrap_or(0);
    let mut line = String::new();
    while lines.read_line(&mut line).is_ok_and(|n| n > 2) {
        line.clear();
    }
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let answer = answers.lock().expect("whole").get(&path).cloned();
    asked.lock().expect("whole").push(path);
    let answer = answer.unwrap_or_else(|| Answer::status(404));
    let head = format!(
        "HTTP/1.1 {} said\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        answer.status, answer.length
    );
    // A client that leaves early is its own affair.
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&answer.body);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = stream.read(&mut [0; 64]);
}

/// A model and rows that a hub holds, and an empty cache.
struct Bench {
    work: Workbench,
    hub: Hub,
}

impl Bench {
    fn new() -> Self {
        let work = Workbench::new(9);
        let hub = Hub::new();
        let base = work.path("base");
        let files = entries(&base);
        let names: Vec<&str> = files
            .iter()
            .map(String::as_str)
            .chain(["pytorch_model.bin", "onnx/model.onnx"])
            .collect();
        hub.hold("models", "tiny/llama", &base, &names);
        let rows = work.path("rows on the hub");
        std::fs::create_dir_all(rows.join("data")).expect("writable");
        for file in [
            "data/train-00000-of-00001.jsonl",
            "data/test-00000-of-00001.jsonl",
        ] {
            std::fs::copy(work.path("rows.jsonl"), rows.join(file)).expect("copied");
        }
        hub.hold(
            "datasets",
            "tiny/rows",
            &rows,
            &[
                "README.md",
                "data/train-00000-of-00001.jsonl",
                "data/test-00000-of-00001.jsonl",
            ],
        );
        Self { work, hub }
    }

    fn train(&self, name: &str, changes: &Value, variables: &[(&str, &str)]) -> Finished {
        let config = self.work.config(name, changes);
        let mut command = self.command(&["train", text(&config)]);
        command.envs(variables.iter().copied());
        command.output().expect("the binary starts").into()
    }

    /// A command that asks this hub alone.
    fn command(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = command(arguments);
        command
            .env("HF_ENDPOINT", &self.hub.address)
            .env("HF_HOME", self.work.path("hf home"))
            .env_remove("HF_HUB_CACHE")
            .env_remove("HF_HUB_OFFLINE")
            .env_remove("HF_TOKEN");
        command
    }

    fn cache(&self) -> PathBuf {
        self.work.path("hf home/hub")
    }
}

fn model(name: &str) -> Value {
    json!({"model_name_or_path": name, "max_steps": 1})
}

#[test]
fn a_model_and_rows_are_fetched_once_and_found_again_without_the_hub() {
    let bench = Bench::new();
    let changes = json!({
        "model_name_or_path": "tiny/llama", "dataset_name": "tiny/rows@v1", "max_steps": 1,
        "eval_strategy": "steps", "eval_steps": 1,
    });
    bench.train("first", &changes, &[]).expect(0);
    let output = bench.work.path("first");
    let config = read_json(&output.join("adapter_config.json"));
    assert_eq!(config["base_model_name_or_path"], "tiny/llama");
    let results = read_json(&output.join("eval_results.json"));
    assert!(
        results["eval_loss"].is_number(),
        "the split test is evaluated on"
    );
    let snapshot = bench
        .cache()
        .join("models--tiny--llama/snapshots")
        .join(COMMIT);
    let weights = "model.safetensors";
    assert!(read(&snapshot.join(weights)) == read(&bench.work.path("base").join(weights)));
    assert_eq!(
        entries(&snapshot),
        entries(&bench.work.path("base")),
        "nothing else is fetched"
    );
    let reference = bench.cache().join("datasets--tiny--rows/refs/v1");
    assert_eq!(read(&reference), COMMIT.as_bytes());

    // Again: a question, and no file.
    bench.hub.asked();
    bench.train("again", &changes, &[]).expect(0);
    let asked = bench.hub.asked();
    assert!(
        asked.iter().all(|path| path.starts_with("/api/")),
        "{asked:?}"
    );
    // Told not to ask, nothing is asked.
    bench
        .train("offline", &changes, &[("HF_HUB_OFFLINE", "1")])
        .expect(0);
    assert_eq!(bench.hub.asked(), Vec::<String>::new());
    // The hub is down, and what was fetched before is there.
    bench
        .hub
        .answer("/api/models/tiny/llama/revision/main", Answer::status(503));
    let finished = bench.train("down", &changes, &[]).expect(0);
    assert!(
        finished.stderr.contains("as it was fetched before"),
        "{}",
        finished.stderr
    );
    let adapter = |run: &str| read(&bench.work.path(run).join("adapter_model.safetensors"));
    assert!(adapter("first") == adapter("offline"));
}

#[test]
fn every_command_takes_names() {
    let bench = Bench::new();
    let local = model(text(&bench.work.path("base")));
    bench.train("adapter", &local, &[]).expect(0);
    let adapter = bench.work.path("adapter");
    let files = ["adapter_config.json", "adapter_model.safetensors"];
    bench.hub.hold("models", "tiny/adapter", &adapter, &files);
    let run = |arguments: &[&str]| -> Finished {
        bench.command(arguments).output().expect("it starts").into()
    };

    let here = [
        text(&bench.work.path("base")).to_owned(),
        text(&adapter).to_owned(),
    ];
    let there = ["tiny/llama".to_owned(), "tiny/adapter@v1".to_owned()];
    let rows = text(&bench.work.path("rows.jsonl")).to_owned();
    let both = |command: &[&str], names: [&str; 2], data: Option<&str>| {
        let mut arguments = command.to_vec();
        arguments.extend(["--model-name-or-path", names[0], "--adapter", names[1]]);
        arguments.extend(data.iter().flat_map(|data| ["--data", data]));
        run(&arguments).expect(0).stdout
    };
    let [here, there] = [&here, &there].map(|names| [names[0].as_str(), names[1].as_str()]);
    let generate = ["generate", "--prompt", "hello", "--max-new-tokens", "4"];
    assert_eq!(both(&generate, here, None), both(&generate, there, None));
    let [asked, named] = [
        both(&["eval"], here, Some(&rows)),
        both(&["eval"], there, Some("tiny/rows")),
    ];
    assert_eq!(asked, named);
    for (output, names) in [("merged here", here), ("merged there", there)] {
        let output = bench.work.path(output);
        both(&["merge", "--output-dir", text(&output)], names, None);
    }
    let merged = |name: &str| read(&bench.work.path(name).join("model.safetensors"));
    assert!(merged("merged here") == merged("merged there"));
    for (what, here, there) in [("model", here[0], there[0]), ("adapter", here[1], there[1])] {
        let inspect = |name: &str| run(&["inspect", what, name, "--json"]).expect(0).stdout;
        assert_eq!(inspect(here), inspect(there));
    }
    let same = run(&["inspect", "diff", here[1], there[1], "--json"]).expect(0);
    assert!(!same.stdout.contains("only_first\":[\""), "{}", same.stdout);

    for (output, name) in [("half here", here[1]), ("half there", there[1])] {
        let output = bench.work.path(output);
        let adapter = format!("{name}=0.5");
        let combine = [
            "combine",
            "--adapter",
            &adapter,
            "--output-dir",
            text(&output),
        ];
        run(&combine).expect(0);
    }
    let half = |name: &str| read(&bench.work.path(name).join("adapter_model.safetensors"));
    assert!(half("half here") == half("half there"));

    // A base is no adapter, and neither is what is not there.
    for (name, part) in [
        ("tiny/llama", "adapter_config.json"),
        ("tiny/unknown", "check the name"),
        ("nowhere", "owner/name"),
    ] {
        let merge = [
            "merge",
            "--model-name-or-path",
            there[0],
            "--output-dir",
            "x",
            "--adapter",
            name,
        ];
        let finished = run(&merge).expect(78);
        assert!(finished.stderr.contains(part), "{}", finished.stderr);
    }
}

#[test]
fn a_cache_that_huggingface_hub_made_is_read() {
    let bench = Bench::new();
    let directory = bench.cache().join("models--other--llama");
    copy_dir(&bench.work.path("base"), &directory.join("blobs"));
    let snapshot = directory.join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&snapshot).expect("writable");
    for name in entries(&directory.join("blobs")) {
        #[cfg(unix)]
        std::os::unix::fs::symlink(format!("../../blobs/{name}"), snapshot.join(&name))
            .expect("linked");
        #[cfg(not(unix))]
        std::fs::copy(directory.join("blobs").join(&name), snapshot.join(&name)).expect("copied");
    }
    std::fs::create_dir_all(directory.join("refs")).expect("writable");
    std::fs::write(directory.join("refs/main"), format!("{COMMIT}\n")).expect("writable");
    let offline = [("HF_HUB_OFFLINE", "yes")];
    bench
        .train("main", &model("other/llama"), &offline)
        .expect(0);
    let mut pinned = model("other/llama");
    pinned["model_revision"] = json!(COMMIT);
    bench.train("pinned", &pinned, &offline).expect(0);
    pinned["model_revision"] = json!("v2");
    let finished = bench.train("missing", &pinned, &offline).expect(78);
    for part in ["model_name_or_path", "other/llama@v2", "HF_HUB_OFFLINE"] {
        assert!(
            finished.stderr.contains(part),
            "{part}: {}",
            finished.stderr
        );
    }
}

#[test]
fn what_the_hub_does_not_have_is_a_bad_configuration() {
    let bench = Bench::new();
    bench
        .hub
        .answer("/api/models/tiny/closed/revision/main", Answer::status(401));
    bench.hub.hold(
        "models",
        "tiny/pickled",
        &bench.work.path("base"),
        &["config.json", "pytorch_model.bin"],
    );
    let mut revision = model("tiny/llama");
    revision["model_revision"] = json!("v9");
    let mut rows = model("tiny/llama");
    rows["dataset_name"] = json!("tiny/rows");
    rows["dataset_train_split"] = json!("validation");
    rows["dataset_test_split"] = json!("validation");
    for (changes, parts) in [
        (model("tiny/unknown"), ["tiny/unknown", "check the name"]),
        (model("tiny/closed"), ["tiny/closed", "HF_TOKEN"]),
        (model("tiny/pickled"), ["tiny/pickled", "safetensors"]),
        (
            model("no such directory"),
            ["no such directory", "owner/name"],
        ),
        (revision, ["tiny/llama@v9", "revision"]),
        (rows, ["tiny/rows", "validation"]),
    ] {
        let finished = bench.train("run", &changes, &[]).expect(78);
        for part in parts {
            assert!(
                finished.stderr.contains(part),
                "{part}: {}",
                finished.stderr
            );
        }
    }
}

#[test]
fn a_hub_that_fails_is_worth_another_try_and_leaves_no_half_of_a_file() {
    let bench = Bench::new();
    // Nobody listens on the port of a server that is gone.
    let gone = TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .expect("an address");
    let gone = format!("http://{gone}");
    let finished = bench
        .train(
            "gone",
            &model("tiny/llama"),
            &[("HF_ENDPOINT", gone.as_str())],
        )
        .expect(175);
    assert!(
        finished.stderr.contains("the hub cannot be reached"),
        "{}",
        finished.stderr
    );

    let weights = format!("/tiny/llama/resolve/{COMMIT}/model.safetensors");
    let whole = read(&bench.work.path("base/model.safetensors"));
    bench.hub.answer(
        &weights,
        Answer {
            length: whole.len(),
            ..Answer::ok(&whole[..whole.len() / 2])
        },
    );
    bench.train("broken", &model("tiny/llama"), &[]).expect(175);
    let snapshot = bench
        .cache()
        .join("models--tiny--llama/snapshots")
        .join(COMMIT);
    let left = entries(&snapshot);
    assert!(
        left.iter()
            .all(|name| !name.contains("safetensors") && !name.contains("tmp")),
        "{left:?}"
    );
    assert_eq!(
        bench
            .hub
            .asked()
            .iter()
            .filter(|path| **path == weights)
            .count(),
        3,
        "it is tried again"
    );
    // Whole again, the run goes on with what was fetched.
    bench.hub.answer(&weights, Answer::ok(whole));
    bench.train("whole", &model("tiny/llama"), &[]).expect(0);
}

#[test]
fn names_that_a_hub_makes_up_become_no_path() {
    let bench = Bench::new();
    let path = "/api/models/tiny/evil/revision/main";
    for (sha, file) in [
        (COMMIT, "../../../evil.safetensors"),
        (COMMIT, "/etc/evil.safetensors"),
        (COMMIT, "a\\evil.safetensors"),
        (COMMIT, ""),
        ("../../../../evil", "config.json"),
        ("", "config.json"),
    ] {
        let listing = json!({"sha": sha, "siblings": [{"rfilename": file}]});
        bench.hub.answer(path, Answer::ok(listing.to_string()));
        bench.train("evil", &model("tiny/evil"), &[]).expect(65);
    }
    bench.hub.answer(path, Answer::ok("<html>"));
    bench.train("evil", &model("tiny/evil"), &[]).expect(65);
    assert!(!bench.cache().exists(), "nothing was written");
}
