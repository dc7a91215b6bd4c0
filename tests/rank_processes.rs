//! Ranks as processes: what they train, and how they end when one of them does.
#![cfg(unix)]

mod common;

use common::{Finished, Workbench, command, entries, read, read_json, text};
use ferrotune::kernels::host_cuda;
use serde_json::{Value, json};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").port()
}

/// A process in which no launcher has said anything.
fn plain(arguments: &[&str]) -> Command {
    let mut command = command(arguments);
    for (name, _) in std::env::vars() {
        let said = [
            "FERROTUNE_",
            "OMPI_",
            "PMI",
            "SLURM_",
            "PET_",
            "TORCHELASTIC_",
        ];
        let named = [
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "MASTER_ADDR",
            "MASTER_PORT",
        ];
        if said.iter().any(|p| name.starts_with(p)) || named.contains(&name.as_str()) {
            command.env_remove(name);
        }
    }
    command
        .env("RAYON_NUM_THREADS", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// The processes of one run, each killed with the value.
struct Ranks(Vec<Option<Child>>);

impl Ranks {
    /// One process per configuration, joined on one port.
    fn start(configs: &[&Path]) -> Self {
        Self::start_with(configs, |_, _| {})
    }

    fn start_with(configs: &[&Path], change: impl Fn(usize, &mut Command)) -> Self {
        let port = free_port().to_string();
        let world = configs.len().to_string();
        let start = |(rank, config): (usize, &&Path)| {
            let mut command = plain(&["train", text(config)]);
            let number = rank.to_string();
            for (name, value) in [
                ("RANK", number.as_str()),
                ("LOCAL_RANK", &number),
                ("WORLD_SIZE", &world),
                ("LOCAL_WORLD_SIZE", &world),
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", &port),
                ("TOKEN", "secret of this test"),
            ] {
                command.env(format!("FERROTUNE_{name}"), value);
            }
            change(rank, &mut command);
            Some(command.spawn().expect("the binary starts"))
        };
        Self(configs.iter().enumerate().map(start).collect())
    }

    fn signal(&self, rank: usize, signal: &str) {
        let child = self.0[rank].as_ref().expect("still there");
        let pid = child.id().to_string();
        let status = Command::new("kill").args([signal, &pid]).status();
        assert!(status.expect("kill runs").success());
    }

    /// How `rank` ended.
    fn end(&mut self, rank: usize) -> Finished {
        let mut child = self.0[rank].take().expect("waited for once");
        let begin = Instant::now();
        while child.try_wait().expect("a child").is_none() {
            if begin.elapsed() > PATIENCE {
                child.kill().expect("killed");
                let output = child.wait_with_output().expect("a child");
                panic!(
                    "rank {rank} did not end: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        child.wait_with_output().expect("a child").into()
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in self.0.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The same micro-batches a step, in the same order, on `ranks`.
fn on(ranks: usize, more: &Value) -> Value {
    let mut changes = json!({
        "deterministic_reduction": true,
        "gradient_accumulation_steps": 2 / ranks,
        "lora_dropout": 0.1,
        "max_steps": 6,
    });
    let more = more.as_object().expect("an object").clone();
    changes.as_object_mut().expect("an object").extend(more);
    changes
}

/// A run that goes on until it is ended.
fn endless() -> Value {
    let steps = json!({"max_steps": 1_000_000, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 2});
    on(2, &steps)
}

/// Waits until the run in `output` has saved a checkpoint.
fn wait_for_checkpoint(output: &Path) {
    let begin = Instant::now();
    while !entries(output).iter().any(|n| n.starts_with("checkpoint-")) {
        assert!(
            begin.elapsed() < PATIENCE,
            "no checkpoint in {}",
            output.display()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn processes_train_what_one_process_trains() {
    let bench = Workbench::new(21);
    bench.train("one", &on(1, &json!({}))).expect(0);
    let config = bench.config("two", &on(2, &json!({})));
    let mut ranks = Ranks::start(&[&config, &config]);
    let first = ranks.end(0).expect(0);
    let second = ranks.end(1).expect(0);
    let adapter = |name: &str| read(&bench.path(name).join("adapter_model.safetensors"));
    assert!(adapter("one") == adapter("two"));
    assert_eq!(
        read_json(&bench.path("two").join("run.json"))["world_size"],
        2
    );
    assert!(
        first.stdout.contains("\"world_size\":2"),
        "{}",
        first.stdout
    );
    assert_eq!(second.stdout, "", "rank 0 speaks for all");
}

#[test]
fn the_launcher_starts_ranks_that_train_the_same() {
    let bench = Workbench::new(21);
    bench.train("one", &on(1, &json!({}))).expect(0);
    let config = bench.config("two", &on(2, &json!({})));
    let output = plain(&["launch", "--nproc", "2", "--", "train", text(&config)]).output();
    let finished = Finished::from(output.expect("the binary starts")).expect(0);
    let adapter = |name: &str| read(&bench.path(name).join("adapter_model.safetensors"));
    assert!(adapter("one") == adapter("two"));
    assert!(
        finished.stdout.contains("\"world_size\":2"),
        "{}",
        finished.stdout
    );
}

/// Their gradients are summed by NCCL's stand-in: `deterministic_reduction` keeps the order of one process.
#[test]
fn processes_with_a_gpu_each_train_what_one_process_trains() {
    let bench = Workbench::new(21);
    let train = |name: &str, ranks: usize, more: Value| {
        let config = bench.config(name, &on(ranks, &more));
        let number = ranks.to_string();
        let mut command = plain(&["launch", "--nproc", &number, "--", "train", text(&config)]);
        command
            .env("FERROTUNE_CUDA_LIBRARIES", host_cuda::libraries())
            .env("FERROTUNE_HOST_DEVICES", &number);
        Finished::from(command.output().expect("the binary starts")).expect(0)
    };
    let adapter = |name: &str| read(&bench.path(name).join("adapter_model.safetensors"));
    train("one", 1, json!({"device": "cuda"}));
    let two = json!({"device": "cuda", "ddp_backend": "nccl", "ddp_timeout": 60});
    let finished = train("two", 2, two.clone());
    assert!(
        finished.stdout.contains("\"world_size\":2"),
        "{}",
        finished.stdout
    );
    assert!(adapter("one") == adapter("two"));
    // Without it NCCL sums buckets while backward goes on.
    let mut buckets = two;
    buckets["deterministic_reduction"] = json!(false);
    train("buckets", 2, buckets);
    let losses =
        |name: &str| read_json(&bench.path(name).join("trainer_state.json"))["log_history"].clone();
    let (one, buckets) = (losses("one"), losses("buckets"));
    let pairs = one
        .as_array()
        .expect("steps")
        .iter()
        .zip(buckets.as_array().expect("steps"));
    for (one, two) in pairs {
        let [one, two] = [one, two].map(|step| step["loss"].as_f64());
        if let (Some(one), Some(two)) = (one, two) {
            assert!((one - two).abs() < 1e-4, "{one} and {two}");
        }
    }
}

#[test]
fn a_pod_with_two_processes_is_its_own_launcher() {
    let bench = Workbench::new(21);
    bench.train("one", &on(1, &json!({}))).expect(0);
    let config = bench.config("two", &on(2, &json!({"device": "cpu"})));
    let mut command = plain(&["train", text(&config)]);
    let port = free_port().to_string();
    for (name, value) in [
        ("PET_NNODES", "1"),
        ("PET_NODE_RANK", "0"),
        ("PET_NPROC_PER_NODE", "2"),
        ("PET_MASTER_ADDR", "127.0.0.1"),
        ("PET_MASTER_PORT", &port),
    ] {
        command.env(name, value);
    }
    Finished::from(command.output().expect("the binary starts")).expect(0);
    let adapter = |name: &str| read(&bench.path(name).join("adapter_model.safetensors"));
    assert!(adapter("one") == adapter("two"));
}

#[test]
fn a_killed_rank_ends_the_others_with_175_and_its_number() {
    let bench = Workbench::new(21);
    for victim in [0, 2] {
        let name = format!("victim_{victim}");
        let config = bench.config(&name, &endless());
        let mut ranks = Ranks::start(&[&config, &config, &config]);
        wait_for_checkpoint(&bench.path(&name));
        ranks.signal(victim, "-KILL");
        let begin = Instant::now();
        for survivor in (0..3).filter(|r| *r != victim) {
            let finished = ranks.end(survivor).expect(175);
            let lost = format!("rank {victim}");
            assert!(finished.stderr.contains(&lost), "{}", finished.stderr);
        }
        // A second each on a quiet machine; this one may be busy.
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "{:?}",
            begin.elapsed()
        );
    }
}

/// The one that is left waits within NCCL for the other.
#[test]
fn a_killed_rank_on_a_gpu_ends_the_other() {
    let bench = Workbench::new(21);
    let mut changes = endless();
    for (key, value) in [("device", "cuda"), ("ddp_backend", "nccl")] {
        changes[key] = json!(value);
    }
    let config = bench.config("killed", &changes);
    let mut ranks = Ranks::start_with(&[&config, &config], |_, command| {
        command
            .env("FERROTUNE_CUDA_LIBRARIES", host_cuda::libraries())
            .env("FERROTUNE_HOST_DEVICES", "2");
    });
    wait_for_checkpoint(&bench.path("killed"));
    ranks.signal(1, "-KILL");
    let finished = ranks.end(0).expect(175);
    assert!(finished.stderr.contains("rank 1"), "{}", finished.stderr);
}

#[test]
fn a_frozen_rank_ends_the_others_with_175() {
    let bench = Workbench::new(21);
    let mut changes = endless();
    changes["peer_timeout"] = json!(2);
    let config = bench.config("frozen", &changes);
    let mut ranks = Ranks::start(&[&config, &config]);
    wait_for_checkpoint(&bench.path("frozen"));
    ranks.signal(1, "-STOP");
    let finished = ranks.end(0).expect(175);
    assert!(finished.stderr.contains("rank 1"), "{}", finished.stderr);
    ranks.signal(1, "-CONT");
    ranks.end(1).expect(175);
}

#[test]
fn a_signal_to_one_rank_is_a_checkpoint_and_143_on_all() {
    let bench = Workbench::new(21);
    let config = bench.config("stopped", &endless());
    let mut ranks = Ranks::start(&[&config, &config]);
    wait_for_checkpoint(&bench.path("stopped"));
    ranks.signal(1, "-TERM");
    ranks.end(0).expect(143);
    ranks.end(1).expect(143);
}

#[test]
fn a_signal_to_the_launcher_is_a_checkpoint_and_143() {
    let bench = Workbench::new(21);
    let config = bench.config("stopped", &endless());
    let child = plain(&["launch", "--nproc", "2", "--", "train", text(&config)]).spawn();
    let mut launcher = Ranks(vec![Some(child.expect("the binary starts"))]);
    wait_for_checkpoint(&bench.path("stopped"));
    launcher.signal(0, "-TERM");
    launcher.end(0).expect(143);
}

#[test]
fn ranks_that_train_different_things_are_refused_by_what_differs() {
    let bench = Workbench::new(21);
    let here = bench.config("here", &on(2, &json!({})));
    let other = bench.config("other", &on(2, &json!({"learning_rate": 0.02})));
    let mut ranks = Ranks::start(&[&here, &other]);
    let second = ranks.end(1).expect(78);
    assert!(second.stderr.contains("optimizer"), "{}", second.stderr);
    assert!(!second.stderr.contains("schedule"), "what differs alone");
    assert_eq!(entries(&bench.path("other")), Vec::<String>::new());
    // It waits for one that fits, which a pod that was started again may be.
    ranks.signal(0, "-TERM");
    let first = ranks.end(0).expect(174);
    assert!(first.stderr.contains("optimizer"), "{}", first.stderr);
    assert!(
        first.stderr.contains("waiting for other ranks"),
        "{}",
        first.stderr
    );
}

/// Processes that `pid` has started.
fn children_of(pid: u32) -> Vec<String> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = std::fs::read_to_string(path).expect("the process is there");
    children.split_whitespace().map(str::to_owned).collect()
}

fn kill(signal: &str, pids: &[String]) {
    let status = Command::new("kill").arg(signal).args(pids).status();
    assert!(status.expect("kill runs").success());
}

#[test]
fn a_signal_to_all_processes_at_once_is_one_request() {
    let bench = Workbench::new(21);
    // As systemd and Slurm do: the launcher and its ranks, which get it from the launcher once more.
    for whom in ["everyone", "rank 0"] {
        let config = bench.config(whom, &endless());
        let child = plain(&["launch", "--nproc", "2", "--", "train", text(&config)]).spawn();
        let child = child.expect("the binary starts");
        let launcher = child.id();
        let mut group = Ranks(vec![Some(child)]);
        wait_for_checkpoint(&bench.path(whom));
        let mut pids = children_of(launcher);
        assert_eq!(pids.len(), 2);
        if whom == "everyone" {
            pids.push(launcher.to_string());
        } else {
            pids.truncate(1);
        }
        kill("-TERM", &pids);
        group.end(0).expect(143);
    }
}

#[test]
fn two_jobs_of_torchrun_on_one_host_do_not_mix() {
    let bench = Workbench::new(21);
    // Their stores look for a port among the sixteen above the master's: the same ones, nearly.
    let port = loop {
        let port = free_port();
        let taken = |p: u16| TcpListener::bind(("127.0.0.1", p)).is_err();
        if port < 60000 && !(port..port + 24).any(taken) {
            break port;
        }
    };
    let start = |job: u16, rank: usize, config: &Path| {
        let mut command = plain(&["train", text(config)]);
        for (name, value) in [
            ("TORCHELASTIC_RUN_ID", "none".to_owned()),
            ("TORCHELASTIC_USE_AGENT_STORE", "True".to_owned()),
            ("RANK", rank.to_string()),
            ("LOCAL_RANK", rank.to_string()),
            ("GROUP_RANK", "0".to_owned()),
            ("WORLD_SIZE", "2".to_owned()),
            ("LOCAL_WORLD_SIZE", "2".to_owned()),
            ("MASTER_ADDR", "127.0.0.1".to_owned()),
            ("MASTER_PORT", (port + 3 * job).to_string()),
        ] {
            command.env(name, value);
        }
        command.spawn().expect("the binary starts")
    };
    let configs = [0, 1].map(|job| {
        let more = json!({"learning_rate": ([0.01, 0.02][job]), "device": "cpu"});
        bench.config(&format!("job_{job}"), &on(2, &more))
    });
    let one = bench.path("one").join("adapter_model.safetensors");
    bench
        .train("one", &on(1, &json!({"learning_rate": 0.01})))
        .expect(0);
    let expected = [read(&one), {
        bench
            .train("other", &on(1, &json!({"learning_rate": 0.02})))
            .expect(0);
        read(&bench.path("other").join("adapter_model.safetensors"))
    }];
    // The follower of the first comes when only the second's store is there.
    let mut first = Ranks(vec![None, Some(start(0, 1, &configs[0]))]);
    let mut second = Ranks(vec![Some(start(1, 0, &configs[1])), None]);
    std::thread::sleep(Duration::from_millis(500));
    first.0[0] = Some(start(0, 0, &configs[0]));
    second.0[1] = Some(start(1, 1, &configs[1]));
    for rank in [0, 1] {
        first.end(rank).expect(0);
        second.end(rank).expect(0);
    }
    for job in [0, 1] {
        let adapter = bench
            .path(&format!("job_{job}"))
            .join("adapter_model.safetensors");
        assert!(read(&adapter) == expected[job], "job {job}");
    }
}

#[test]
fn ranks_with_other_rows_to_evaluate_are_refused() {
    let bench = Workbench::new(21);
    let rows = std::fs::read_to_string(bench.path("rows.jsonl")).expect("rows");
    let lines: Vec<&str> = rows.lines().collect();
    let evaluate = |name: &str, count: usize| {
        let file = bench.path(&format!("{name}.jsonl"));
        std::fs::write(&file, lines[..count].join("\n")).expect("writable");
        bench.config(
            name,
            &on(2, &json!({"eval_file": file, "eval_strategy": "epoch"})),
        )
    };
    let mut ranks = Ranks::start(&[&evaluate("a", 8), &evaluate("b", 3)]);
    let second = ranks.end(1).expect(78);
    assert!(second.stderr.contains("eval_data"), "{}", second.stderr);
}

#[test]
fn ranks_of_one_machine_share_its_memory() {
    let bench = Workbench::new(21);
    let config = bench.config("plan", &json!({"device": "cpu"}));
    let available = |ranks: &str| {
        let output = plain(&["plan", text(&config), "--nproc", ranks, "--json"]).output();
        let plan = Finished::from(output.expect("the binary starts")).expect(0);
        let plan: Value = serde_json::from_str(&plan.stdout).expect("a document");
        plan["available_memory_bytes"].as_f64().expect("a number")
    };
    let share = available("4") / available("1");
    // Others use memory meanwhile.
    assert!((0.15..0.35).contains(&share), "{share}");
}
