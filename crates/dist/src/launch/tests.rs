//! What needs no process. Processes are in the root's `tests/launch_cli.rs`.

use super::output::copy_lines;
use super::ranks::shared_variables;
use super::verdict::{End, How, verdict};
use crate::env::{Flags, Host, LaunchEnv, Surroundings, detect, own};
use signal_hook::consts::{SIGKILL, SIGSEGV, SIGTERM};
use std::collections::BTreeMap;
use std::io::Cursor;

fn end(rank: usize, how: How) -> End {
    End {
        rank,
        how,
        told: false,
    }
}

fn told(rank: usize, how: How) -> End {
    End {
        told: true,
        ..end(rank, how)
    }
}

fn ends(codes: &[u8]) -> Vec<End> {
    let codes = codes.iter().enumerate();
    codes
        .map(|(rank, code)| end(rank, How::Code(*code)))
        .collect()
}

#[test]
fn the_rank_that_failed_first_gives_the_code() {
    assert_eq!(verdict(&ends(&[0, 0]), None), 0);
    assert_eq!(verdict(&ends(&[0, 65, 78]), None), 65);
    let killed = [end(1, How::Signal(SIGSEGV)), told(0, How::Code(143))];
    assert_eq!(verdict(&killed, None), 175);
    let oom = [end(0, How::Signal(SIGKILL)), told(1, How::Code(73))];
    assert_eq!(verdict(&oom, None), 175);
}

#[test]
fn a_cause_goes_before_a_lost_peer() {
    assert_eq!(verdict(&ends(&[175, 65]), None), 65);
    assert_eq!(verdict(&ends(&[175, 175]), None), 175);
}

#[test]
fn a_stopped_run_is_saved_only_if_every_rank_says_so() {
    assert_eq!(verdict(&ends(&[143, 143]), Some(SIGTERM)), 143);
    assert_eq!(verdict(&ends(&[143, 174]), Some(SIGTERM)), 174);
    assert_eq!(verdict(&ends(&[143, 0]), Some(SIGTERM)), 143);
    assert_eq!(verdict(&ends(&[143, 73]), Some(SIGTERM)), 73);
    let no_handler_yet = [end(0, How::Signal(SIGTERM)), end(1, How::Code(143))];
    assert_eq!(verdict(&no_handler_yet, Some(SIGTERM)), 174);
    assert_eq!(verdict(&no_handler_yet, None), 175);
    let too_slow = [end(0, How::Code(143)), told(1, How::Signal(SIGKILL))];
    assert_eq!(verdict(&too_slow, Some(SIGTERM)), 174);
}

#[test]
fn lines_are_whole_and_say_their_rank() {
    let mut lines = Vec::new();
    let text = format!("a\n\nb{}\nend", "x".repeat(1 << 16));
    copy_lines(3, Cursor::new(text), |line| lines.push(line.to_vec()));
    assert_eq!(lines[0], b"[rank 3] a\n");
    assert_eq!(lines[1], b"[rank 3] \n");
    assert_eq!(lines[2].len(), "[rank 3] ".len() + (1 << 16) + 1);
    assert_eq!(lines[3], b"[rank 3] x\n");
    assert_eq!(lines[4], b"[rank 3] end\n");
    assert_eq!(lines.len(), 5);
}

fn two_ranks_in(variables: &[(&str, &str)]) -> LaunchEnv {
    let variables = variables
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    let around = Surroundings {
        variables: variables.collect(),
        host: Host::default(),
        flags: Flags {
            nproc: Some("2".into()),
            cpu: true,
            ..Flags::default()
        },
        ..Surroundings::default()
    };
    detect(&around).expect("a complete environment")
}

#[test]
fn a_rank_reads_what_its_launcher_wrote() {
    let pod = two_ranks_in(&[
        ("PET_NNODES", "2"),
        ("PET_NODE_RANK", "1"),
        ("PET_MASTER_ADDR", "[fd00::1]"),
        ("PET_MASTER_PORT", "4711"),
        ("FERROTUNE_JOB_ID", "j"),
        ("FERROTUNE_RESTART_ATTEMPT", "3"),
    ]);
    let shared = shared_variables(&pod, true).expect("a pod");
    assert!(!shared.contains_key(own::TOKEN), "pods cannot agree on it");
    let mut variables: BTreeMap<String, String> =
        shared.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    variables.insert(own::RANK.into(), "3".into());
    variables.insert(own::LOCAL_RANK.into(), "1".into());
    let around = Surroundings {
        variables,
        ..Surroundings::default()
    };
    let rank = detect(&around).expect("a rank");
    assert_eq!((rank.launcher, rank.world_size), ("ferrotune", 4));
    assert_eq!((rank.ranks, rank.local_ranks), (vec![3], vec![1]));
    assert_eq!((rank.nnodes, rank.node_rank), (Some(2), Some(1)));
    assert_eq!(
        (rank.master_addr.as_str(), rank.master_port),
        ("fd00::1", Some(4711))
    );
    assert_eq!(
        (rank.job_id.as_deref(), rank.restart_count),
        (Some("j"), Some(3))
    );
}

#[test]
fn ranks_of_one_machine_share_a_fresh_token_and_the_cores() {
    let alone = two_ranks_in(&[]);
    let one = shared_variables(&alone, false).expect("alone");
    let other = shared_variables(&alone, false).expect("alone");
    assert_eq!(one[own::TOKEN].len(), 64);
    assert_ne!(one[own::TOKEN], other[own::TOKEN]);
    assert_ne!(one[own::MASTER_PORT], "0");
    assert!(
        one["RAYON_NUM_THREADS"]
            .parse::<usize>()
            .is_ok_and(|n| n > 0)
    );
    assert!(
        !shared_variables(&alone, true)
            .expect("alone")
            .contains_key("RAYON_NUM_THREADS")
    );
}
