//! `ferrotune launch`, and `train` where its environment asks for several ranks: processes, signals,
//! exit codes.

mod common;

use common::{Finished, Workbench, command, entries, text};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Far above what a loaded machine needs, far below a forgotten deadline.
const SECONDS: Duration = Duration::from_secs(60);

/// `ferrotune launch --nproc N FLAGS --program sh -- -c SCRIPT`.
fn launch(ranks: usize, flags: &[&str], script: &str) -> Command {
    let ranks = ranks.to_string();
    let mut words = vec!["launch", "--device", "cpu", "--nproc", &ranks];
    words.extend(flags);
    words.extend(["--program", "sh", "--", "-c", script]);
    let mut command = command(&words);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(ranks: usize, flags: &[&str], script: &str) -> Finished {
    launch(ranks, flags, script)
        .output()
        .expect("the binary starts")
        .into()
}

fn signal(pid: &str, name: &str) {
    let status = Command::new("kill")
        .args([&format!("-{name}"), pid])
        .status();
    assert!(status.expect("kill runs").success());
}

fn alive(pid: &str) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = state.rsplit(')').next().unwrap_or_default().trim_start();
    !after_name.is_empty() && !after_name.starts_with('Z')
}

/// Waits until none of these processes is left.
#[track_caller]
fn gone_within(pids: &[String], limit: Duration) {
    let begin = Instant::now();
    while pids.iter().any(|pid| alive(pid)) {
        assert!(begin.elapsed() < limit, "still there: {pids:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The process ids of all ranks, which the script of each writes as `pid` into its folder.
fn pids_in(folder: &Path, ranks: usize) -> Vec<String> {
    let begin = Instant::now();
    loop {
        let names = entries(folder);
        let pids = names.iter().filter_map(|name| {
            let pid = std::fs::read_to_string(folder.join(name)).ok()?;
            pid.ends_with('\n').then(|| pid.trim().to_owned())
        });
        let pids: Vec<String> = pids.collect();
        if pids.len() == ranks {
            return pids;
        }
        assert!(
            begin.elapsed() < SECONDS,
            "{} of {ranks} ranks started",
            pids.len()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn write_pid(folder: &Path) -> String {
    format!("echo $$ > {}/$FERROTUNE_RANK", folder.display())
}

#[test]
fn each_rank_knows_its_place() {
    let mut command = command(&["launch", "--nproc", "3", "--device", "cpu", "--"]);
    let output = command.args(["env", "--json", "--device", "cpu"]).output();
    let output = Finished::from(output.expect("the binary starts")).expect(0);
    let rank0: Value = serde_json::from_str(&output.stdout).expect("rank 0 alone");
    assert_eq!(rank0["launcher"], "ferrotune");
    assert_eq!(rank0["scope"], "process");
    assert_eq!(rank0["world_size"], 3);
    assert_eq!(rank0["ranks"], json!([0]));
    assert_eq!(rank0["master_addr"], "127.0.0.1");
    for rank in [1, 2] {
        let own: Vec<&str> = output
            .stderr
            .lines()
            .filter_map(|line| line.strip_prefix(&format!("[rank {rank}] ")))
            .collect();
        let own: Value = serde_json::from_str(&own.join("\n")).expect("a whole document");
        assert_eq!(own["ranks"], json!([rank]));
        assert_eq!(own["master_port"], rank0["master_port"]);
        assert_eq!(own["job_id"], rank0["job_id"]);
    }
}

#[test]
fn a_rank_of_another_launcher_becomes_the_command() {
    let words = [
        "launch",
        "--master-addr",
        "n0:77",
        "--device",
        "cpu",
        "--",
        "env",
        "--json",
    ];
    let output = command(&words)
        .args(["--device", "cpu"])
        .envs([("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_SIZE", "4")])
        .envs([("OMPI_COMM_WORLD_LOCAL_RANK", "1")])
        .output();
    let output = Finished::from(output.expect("the binary starts")).expect(0);
    let rank: Value = serde_json::from_str(&output.stdout).expect("one document");
    assert_eq!(
        (&rank["launcher"], &rank["ranks"]),
        (&json!("openmpi"), &json!([3]))
    );
    assert_eq!(
        (&rank["master_addr"], &rank["master_port"]),
        (&json!("n0"), &json!(77))
    );
    assert!(output.stderr.contains("as rank 3"), "{}", output.stderr);
}

#[test]
fn rank_0_speaks_and_the_others_are_marked() {
    let output = run(
        2,
        &[],
        "echo out$FERROTUNE_RANK; echo err$FERROTUNE_RANK >&2",
    )
    .expect(0);
    assert_eq!(output.stdout, "out0\n");
    let mut lines: Vec<&str> = output.stderr.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["[rank 1] err1", "[rank 1] out1", "err0"]);
}

#[test]
fn ranks_share_token_and_cores_and_differ_in_rank() {
    let script = "echo $FERROTUNE_TOKEN $RAYON_NUM_THREADS $FERROTUNE_LOCAL_WORLD_SIZE";
    let output = run(2, &[], script).expect(0);
    let (zero, one) = (output.stdout.trim(), output.stderr.trim());
    assert_eq!(one.strip_prefix("[rank 1] "), Some(zero));
    let words: Vec<&str> = zero.split(' ').collect();
    assert_eq!(words[0].len(), 64);
    assert!(words[1].parse::<usize>().is_ok_and(|threads| threads > 0));
    assert_eq!(words[2], "2");
}

#[test]
fn the_first_failure_ends_the_others_and_gives_the_code() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pid = write_pid(folder.path());
    // Rank 0 would go on for an hour, and leave a child that is not its group's leader.
    let script = format!(
        "{pid}; [ $FERROTUNE_RANK = 1 ] && {{ while [ $(ls {0} | wc -l) -lt 3 ]; do sleep 0.05; done; \
         exit 65; }}; sleep 3600 & sleep 3600",
        folder.path().display()
    );
    let begin = Instant::now();
    let output = run(3, &[], &script).expect(65);
    assert!(begin.elapsed() < SECONDS);
    assert!(
        output.stderr.contains("rank 1 ended with exit code 65"),
        "{}",
        output.stderr
    );
    gone_within(&pids_in(folder.path(), 3), Duration::from_secs(1));
}

#[test]
fn a_rank_that_ignores_sigterm_is_killed_after_the_grace() {
    let script = "[ $FERROTUNE_RANK = 1 ] && { sleep 0.3; exit 71; }; trap '' TERM; \
                  while :; do sleep 0.1; done";
    let output = run(2, &["--grace", "1"], script).expect(71);
    assert!(
        output.stderr.contains("rank 0 does not end; killing it"),
        "{}",
        output.stderr
    );
}

#[test]
fn codes_of_other_programs_are_kept() {
    run(2, &[], "exit 0").expect(0);
    run(1, &[], "exit 3").expect(3);
    run(
        2,
        &[],
        "[ $FERROTUNE_RANK = 0 ] && { sleep 0.2; exit 175; }; sleep 0.3; exit 65",
    )
    .expect(65);
}

#[test]
fn a_rank_killed_by_a_signal_is_a_transient_failure() {
    let output = run(
        2,
        &[],
        "[ $FERROTUNE_RANK = 1 ] && kill -SEGV $$; sleep 3600",
    )
    .expect(175);
    let line = "rank 1 was killed by signal 11 (SIGSEGV)";
    assert!(output.stderr.contains(line), "{}", output.stderr);
}

/// Starts ranks that end with `code` on `name`, sends it to the launcher once, and waits.
fn stopped(name: &str, trap: &str) -> Finished {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pid = write_pid(folder.path());
    let script = format!("{trap}; {pid}; while :; do sleep 0.05; done");
    let child = launch(2, &[], &script).spawn().expect("the binary starts");
    let ranks = pids_in(folder.path(), 2);
    signal(&child.id().to_string(), name);
    let finished = Finished::from(child.wait_with_output().expect("it ends"));
    gone_within(&ranks, Duration::from_secs(1));
    finished
}

#[test]
fn signals_are_passed_on_and_the_ranks_code_is_kept() {
    for name in ["TERM", "INT", "HUP", "QUIT"] {
        stopped(name, &format!("trap 'exit 143' {name}")).expect(143);
    }
    // One that dies of the signal has saved nothing.
    stopped("TERM", ":").expect(174);
}

#[test]
fn a_stop_is_passed_on_once_only() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pid = write_pid(folder.path());
    // Rank 1 saves for a second after rank 0 has gone: a second SIGTERM would end it with 9.
    let script = format!(
        "trap 'trap \"exit 9\" TERM; [ $FERROTUNE_RANK = 0 ] || sleep 1; exit 143' TERM; {pid}; \
         while :; do sleep 0.05; done"
    );
    let child = launch(2, &[], &script).spawn().expect("the binary starts");
    pids_in(folder.path(), 2);
    signal(&child.id().to_string(), "TERM");
    Finished::from(child.wait_with_output().expect("it ends")).expect(143);
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let output = command(&[
        "launch",
        "--nproc",
        "2",
        "--device",
        "cpu",
        "--program",
        "no-such",
        "--",
        "x",
    ])
    .output()
    .expect("the binary starts");
    let output = Finished::from(output).expect(70);
    assert!(
        output.stderr.contains("cannot start rank 0 (no-such)"),
        "{}",
        output.stderr
    );
}

#[test]
fn a_command_that_is_none_is_refused_once() {
    let output = command(&["launch", "--nproc", "2", "--", "trian"]).output();
    let output = Finished::from(output.expect("the binary starts")).expect(2);
    assert_eq!(
        output.stderr.matches("unrecognized subcommand").count(),
        1,
        "{}",
        output.stderr
    );
}

/// A run that goes on for longer than any test waits.
fn endless(bench: &Workbench) -> Value {
    json!({"max_steps": 1_000_000, "dataset_name": bench.path("rows.jsonl"), "device": "cpu"})
}

/// Waits for the first step on standard output; the rest of it is left unread.
fn wait_for_step(child: &mut Child) -> BufReader<std::process::ChildStdout> {
    let mut reader = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    while reader.read_line(&mut line).expect("readable") > 0 {
        if line.contains("\"loss\"") {
            return reader;
        }
        line.clear();
    }
    panic!("the run ended before its first step");
}

fn launch_train(bench: &Workbench, name: &str) -> Child {
    let config = bench.config(name, &endless(bench));
    command(&["launch", "--nproc", "1", "--", "train", text(&config)])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts")
}

fn children_of(pid: u32) -> Vec<String> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = std::fs::read_to_string(path).expect("the process is there");
    children.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn training_stops_with_a_checkpoint_through_the_launcher() {
    let bench = Workbench::new(16);
    let mut child = launch_train(&bench, "stopped");
    let mut reader = wait_for_step(&mut child);
    signal(&child.id().to_string(), "TERM");
    let mut rest = String::new();
    reader.read_to_string(&mut rest).expect("readable");
    Finished::from(child.wait_with_output().expect("it ends")).expect(143);
    let saved = entries(&bench.path("stopped"));
    assert!(
        saved.iter().any(|name| name.starts_with("checkpoint-")),
        "{saved:?}"
    );
}

#[test]
fn ranks_end_with_a_launcher_that_is_killed() {
    let bench = Workbench::new(16);
    let mut child = launch_train(&bench, "orphaned");
    let _reader = wait_for_step(&mut child);
    let ranks = children_of(child.id());
    assert_eq!(ranks.len(), 1);
    child.kill().expect("killed");
    child.wait().expect("it ends");
    gone_within(&ranks, Duration::from_secs(1));
}

#[test]
fn an_environment_that_cannot_be_believed_stops_train_before_the_model() {
    let bench = Workbench::new(16);
    let config = bench.config("never", &json!({}));
    let output = command(&["train", text(&config)])
        .env("K_MPI_JOB_ROLE", "worker")
        .output();
    let output = Finished::from(output.expect("the binary starts")).expect(78);
    assert!(output.stderr.contains("E_WRONG_ROLE"), "{}", output.stderr);
    assert!(!bench.path("never").exists());
}

/// As PID 1 of a namespace of its own, where the kernel allows that here.
#[test]
fn pid_1_reaps_orphans_and_passes_signals_on() {
    let unshared = |words: &[String]| {
        let mut command = Command::new("unshare");
        command
            .args(["-r", "-p", "-f", "--mount-proc", "--kill-child"])
            .args(words);
        command
    };
    let possible = unshared(&["true".to_owned()])
        .output()
        .is_ok_and(|output| output.status.success());
    if !possible {
        eprintln!("NOT RUN: this machine gives no PID namespace (unshare -r -p -f)");
        return;
    }
    // Rank 0 leaves three orphans in sessions of their own; rank 1 counts the dead that nobody reaped.
    let script = "if [ $FERROTUNE_RANK = 0 ]; then \
                    for i in 1 2 3; do setsid sleep 0.2 & done; exit 0; \
                  fi; \
                  sleep 1.5; echo zombies: $(cat /proc/[0-9]*/stat | grep -c ') Z ') >&2; \
                  echo parent: $PPID >&2";
    let output = unshared(&words_of(&launch(2, &[], script))).output();
    let output = Finished::from(output.expect("unshare starts")).expect(0);
    assert!(
        output.stderr.contains("[rank 1] zombies: 0"),
        "{}",
        output.stderr
    );
    assert!(
        output.stderr.contains("[rank 1] parent: 1"),
        "{}",
        output.stderr
    );

    let folder = tempfile::tempdir().expect("a temporary folder");
    let pid = write_pid(folder.path());
    let script = format!("trap 'exit 143' TERM; {pid}; while :; do sleep 0.05; done");
    let mut command = unshared(&words_of(&launch(2, &[], &script)));
    let child = command
        .stderr(Stdio::piped())
        .spawn()
        .expect("unshare starts");
    // Numbers in the files are of the namespace; that of its PID 1 out here is unshare's child.
    pids_in(folder.path(), 2);
    signal(&children_of(child.id())[0], "TERM");
    Finished::from(child.wait_with_output().expect("it ends")).expect(143);
}

fn words_of(command: &Command) -> Vec<String> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect()
}
