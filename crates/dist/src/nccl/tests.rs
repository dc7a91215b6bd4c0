//! The group against a library that sums between threads, and misbehaves on demand.

use super::communicator::{Communicator, Shared};
use super::testing::{FakeLibrary, buffer, gpu, join, on_each_rank, values};
use super::{Nccl, NcclOptions};
use crate::{Local, Tcp, Timing};
use ferrotune_core::params::FlatBuffer;
use ferrotune_core::process_group::ProcessGroup;
use ferrotune_core::{Error, ExitCode, Result};
use ferrotune_kernels::Device;
use std::sync::{Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

/// Longer than anything here takes on a busy machine.
const PATIENT: Duration = Duration::from_secs(60);
/// The deadline of tests that run into it.
const SHORT: Duration = Duration::from_millis(500);
/// How long after a deadline an error may come.
const SLACK: Duration = Duration::from_secs(1);
/// Elements of a bucket, and of the buffers: no multiple of it.
const BUCKET: usize = 1000;
const LEN: usize = 4321;

/// Waits until the thread of a communicator is gone.
fn assert_thread_ends(shared: &Weak<Shared>, within: Duration) {
    let begin = Instant::now();
    while shared.strong_count() > 0 {
        assert!(begin.elapsed() < within, "the thread is still there");
        thread::sleep(Duration::from_millis(1));
    }
}

fn shared(group: &Nccl) -> Weak<Shared> {
    std::sync::Arc::downgrade(group.communicator().shared())
}

/// Drops `group`, which has to take less than a second, and waits for its thread.
fn assert_ends(group: Nccl, thread_within: Duration) {
    let (thread, begin) = (shared(&group), Instant::now());
    drop(group);
    assert!(begin.elapsed() < SLACK, "dropped in {:?}", begin.elapsed());
    assert_thread_ends(&thread, thread_within);
}

fn transient(error: &Error) -> String {
    assert_eq!(error.exit_code(), ExitCode::Transient, "{error}");
    error.to_string()
}

#[test]
fn sums_and_broadcasts_are_the_same_on_every_rank_over_many_rounds() {
    for (world, wishes) in [(1, ""), (2, "in_progress 2"), (3, "")] {
        let library = FakeLibrary::new(wishes);
        let results = on_each_rank(world, |host, device| {
            let mut group = join(host, &device, &library, PATIENT, BUCKET).expect("peers live");
            let rank = group.rank();
            let mut sums = Vec::new();
            for step in 0..5 {
                assert!(!group.begin_step(step, false).expect("peers live"));
                let mut gradients = buffer(&device, &values(rank + step as usize, LEN));
                let mut totals = [rank as f64, 1.0];
                group
                    .all_reduce(&mut gradients, &mut totals)
                    .expect("peers live");
                let ranks = world as f64;
                assert_eq!(totals, [ranks * (ranks - 1.0) / 2.0, ranks]);
                let mut params = buffer(&device, &values(rank, 10));
                group.broadcast(&mut params).expect("peers live");
                assert_eq!(params.as_slice()[..10], values(0, 10));
                let gathered = group.all_gather(&[rank as u8]).expect("peers live");
                assert_eq!(gathered.len(), world);
                group.barrier().expect("peers live");
                sums.push(gradients.as_slice().to_vec());
            }
            assert_ends(group, SLACK);
            sums
        });
        assert!(results.iter().all(|sums| sums == &results[0]));
        for (step, sums) in results[0].iter().enumerate() {
            for (i, &sum) in sums[..LEN].iter().enumerate() {
                let each = (0..world).map(|rank| f64::from(values(rank + step, LEN)[i]));
                let expected: f64 = each.sum();
                assert!(
                    (f64::from(sum) - expected).abs() < 1e-3,
                    "{i}: {sum}, not {expected}"
                );
            }
        }
    }
}

/// The sum of three ranks' values, said to be ready in pieces that end at `ends`, each rank its own.
fn overlapped(ends: &[Vec<usize>], bucket: usize) -> (Vec<f32>, FakeLibrary) {
    let library = FakeLibrary::new("log");
    let sums = on_each_rank(3, |host, device| {
        let mut group = join(host, &device, &library, PATIENT, bucket).expect("peers live");
        let rank = group.rank();
        let mut gradients = buffer(&device, &values(rank, LEN));
        let mut begin = 0;
        for &end in &ends[rank] {
            group
                .reduce_ready(&mut gradients, begin..end)
                .expect("peers live");
            begin = end;
        }
        group
            .all_reduce(&mut gradients, &mut [])
            .expect("peers live");
        gradients.as_slice().to_vec()
    });
    assert!(sums.iter().all(|sum| sum == &sums[0]));
    (sums[0].clone(), library)
}

#[test]
fn what_is_ready_early_is_summed_once_in_the_same_buckets_with_the_same_bits() {
    let nothing_early = vec![Vec::new(); 3];
    let (plain, library) = overlapped(&nothing_early, BUCKET);
    // A rank without a micro-batch says nothing, the others speak of layers of their own sizes.
    let pieces = [vec![10, 1000, 2500, LEN], vec![], vec![3999]];
    let (early, early_library) = overlapped(&pieces, BUCKET);
    assert!(
        plain
            .iter()
            .zip(&early)
            .all(|(a, b)| a.to_bits() == b.to_bits())
    );
    for library in [library, early_library] {
        for rank in 0..3 {
            let calls = library.calls(rank);
            let names: Vec<&str> = calls.iter().map(|(name, _)| name.as_str()).collect();
            let reduce = ["all_reduce"; 5];
            assert_eq!(names[0], "init");
            assert_eq!(names[1..6], reduce);
            assert_eq!(names[6..], ["finalize", "destroy"]);
            // Every element once, from the front.
            let start = calls[1].1[0];
            let mut next = start;
            for (_, numbers) in &calls[1..6] {
                assert_eq!(numbers[0], next);
                next += numbers[1] * 4;
            }
            assert_eq!(next - start, LEN.next_multiple_of(4) as u64 * 4);
        }
    }
    // Other buckets give other bits, so the comparison above can fail.
    let (other, _) = overlapped(&nothing_early, BUCKET - 7);
    assert_ne!(plain, other);
}

#[test]
fn buckets_begin_while_backward_goes_on() {
    let library = FakeLibrary::new("log");
    on_each_rank(1, |host, device| {
        let mut group = join(host, &device, &library, PATIENT, BUCKET).expect("alone");
        let mut gradients = buffer(&device, &values(0, LEN));
        group.reduce_ready(&mut gradients, 0..2500).expect("alone");
        let begin = Instant::now();
        // init, and the two buckets that are complete.
        while library.calls(0).len() < 3 {
            assert!(
                begin.elapsed() < PATIENT,
                "they did not begin by themselves"
            );
            thread::sleep(Duration::from_millis(1));
        }
        group.all_reduce(&mut gradients, &mut []).expect("alone");
    });
}

#[test]
fn buffers_at_home_on_the_cpu_go_through_the_host_group() {
    let library = FakeLibrary::new("log");
    on_each_rank(2, |host, device| {
        let mut group = join(host, &device, &library, PATIENT, BUCKET).expect("peers live");
        let rank = group.rank();
        let mut floats = buffer(&Device::Cpu, &[rank as f32, 1.0]);
        group.reduce_ready(&mut floats, 0..2).expect("peers live");
        let mut totals = [1.0];
        group
            .all_reduce(&mut floats, &mut totals)
            .expect("peers live");
        assert_eq!(
            (floats.as_slice()[..2].to_vec(), totals),
            (vec![1.0, 2.0], [2.0])
        );
        let mut same = buffer(&Device::Cpu, &[rank as f32]);
        group.broadcast(&mut same).expect("peers live");
        assert_eq!(same.as_slice()[0], 0.0);
    });
    let names: Vec<String> = library.calls(0).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["init", "finalize", "destroy"]);
}

/// The errors of both ranks of a group that does not come to be, and how long that took.
fn failed_joins(wishes: &str) -> Vec<(String, Duration)> {
    let library = FakeLibrary::new(wishes);
    on_each_rank(2, |host, device| {
        let begin = Instant::now();
        let error = join(host, &device, &library, SHORT, BUCKET).expect_err("it does not start");
        (transient(&error), begin.elapsed())
    })
}

#[test]
fn a_communicator_that_never_starts_is_an_error_in_time() {
    for (wishes, part) in [
        ("init hang", "not done after 0.5 s"),
        (
            "init block\nblock 2500",
            "must not block has not returned in 0.5 s",
        ),
        ("init fail", "unhandled system error (ncclSystemError)"),
    ] {
        for (rank, (message, took)) in failed_joins(wishes).into_iter().enumerate() {
            assert!(took < SHORT + SLACK, "{wishes}: {took:?}");
            assert!(
                message.starts_with(&format!("rank {rank} of 2: ncclCommInit")),
                "{message}"
            );
            assert!(message.contains(part), "{message}");
        }
    }
}

#[test]
fn a_rank_that_cannot_use_nccl_is_named_by_all_and_nobody_waits() {
    let library = FakeLibrary::new("");
    let old = FakeLibrary::new("version 21000");
    let newer = FakeLibrary::new("version 23007");
    let outcome = |other: &FakeLibrary| {
        on_each_rank(2, |host, device| {
            let library = if host.rank() == 1 { other } else { &library };
            let begin = Instant::now();
            let error = join(host, &device, library, PATIENT, BUCKET).expect_err("rank 1 cannot");
            assert_eq!(error.exit_code(), ExitCode::BadConfig);
            assert!(begin.elapsed() < PATIENT);
            error.to_string()
        })
    };
    let [first, second] = &outcome(&old)[..] else {
        panic!("two ranks")
    };
    assert!(
        first.contains("rank 1 cannot use NCCL: ") && first.contains("2.10.0"),
        "{first}"
    );
    assert!(second.contains("2.10.0, at least 2.18.0"), "{second}");
    for message in outcome(&newer) {
        assert!(
            message.contains("2.27.5") && message.contains("2.30.7"),
            "{message}"
        );
    }
    let on_cpu = on_each_rank(1, |host, _| {
        Nccl::new(Box::new(host), &Device::Cpu, NcclOptions::default())
            .expect_err("there is no GPU")
            .exit_code()
    });
    assert_eq!(on_cpu, [ExitCode::BadConfig]);
}

/// What rank 0 and 1 get from sums until one fails, and how long the last one took; the groups end in
/// time, and their threads within `thread_within`.
fn failing(wishes: &str, thread_within: Duration) -> (Vec<(String, Duration)>, FakeLibrary) {
    let library = FakeLibrary::new(wishes);
    let errors = on_each_rank(2, |host, device| {
        let mut group = join(host, &device, &library, SHORT, BUCKET).expect("it starts");
        let mut gradients = buffer(&device, &values(group.rank(), LEN));
        for step in 7..10 {
            group.begin_step(step, false).expect("peers live");
            let begin = Instant::now();
            if let Err(error) = group.all_reduce(&mut gradients, &mut []) {
                let took = begin.elapsed();
                // From now on every call fails, at once.
                let begin = Instant::now();
                let again = group.broadcast(&mut gradients);
                assert!(again.is_err() && begin.elapsed() < PATIENT);
                assert_ends(group, thread_within);
                return (transient(&error), took);
            }
        }
        panic!("every sum went well");
    });
    (errors, library)
}

#[test]
fn an_error_that_nccl_learns_of_names_rank_number_step_and_its_words() {
    let (errors, library) = failing("log\nasync_error 6", SLACK);
    for (rank, (message, took)) in errors.into_iter().enumerate() {
        assert!(took < SHORT + SLACK, "{took:?}");
        for part in [
            &format!("rank {rank} of 2: all_reduce of 1000 values (number "),
            "step 8)",
            "ncclRemoteError",
            "socket: connection closed by remote peer",
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    let calls = library.calls(0);
    assert_eq!(calls.last().map(|(name, _)| name.as_str()), Some("abort"));
    assert!(
        calls
            .iter()
            .all(|(name, _)| name != "finalize" && name != "destroy")
    );
}

#[test]
fn a_collective_that_never_ends_is_aborted_at_its_deadline() {
    let (errors, library) = failing("log\nstuck 7", SLACK);
    for (rank, (message, took)) in errors.into_iter().enumerate() {
        assert!(SHORT <= took && took < SHORT + SLACK, "{took:?}");
        let begin =
            format!("rank {rank} of 2: all_reduce of 1000 values (number 7, step 8): not done");
        assert!(message.starts_with(&begin), "{message}");
        assert!(
            message.contains("NCCL itself reports no error"),
            "{message}"
        );
    }
    assert_eq!(
        library.calls(1).last().map(|(name, _)| name.as_str()),
        Some("abort")
    );
}

#[test]
fn a_slow_abort_delays_neither_the_error_nor_the_end() {
    let (errors, _) = failing("stuck 2\nabort_ms 2000", Duration::from_secs(10));
    for (message, took) in errors {
        assert!(took < SHORT + SLACK, "{took:?}: {message}");
    }
}

#[test]
fn a_communicator_that_does_not_finalize_is_aborted() {
    let library = FakeLibrary::new("log\nfinalize hang");
    on_each_rank(1, |host, device| {
        let group = join(host, &device, &library, SHORT, BUCKET).expect("alone");
        assert_ends(group, SLACK);
    });
    let names: Vec<String> = library.calls(0).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["init", "finalize", "abort"]);
}

#[test]
fn another_thread_can_abort() {
    let library = FakeLibrary::new("stuck 0");
    let errors = on_each_rank(2, |host, device| {
        let mut group = join(host, &device, &library, PATIENT, BUCKET).expect("it starts");
        let handle = group.abort_handle();
        let mut gradients = buffer(&device, &values(0, LEN));
        let killed = thread::spawn(move || {
            thread::sleep(SHORT);
            handle.abort("rank 5 was lost");
        });
        let begin = Instant::now();
        let error = group
            .all_reduce(&mut gradients, &mut [])
            .expect_err("it is aborted");
        assert!(begin.elapsed() < SHORT + SLACK, "{:?}", begin.elapsed());
        killed.join().expect("it only asks");
        assert_ends(group, SLACK);
        transient(&error)
    });
    for message in errors {
        assert!(
            message.contains("number 0") && message.contains("rank 5 was lost"),
            "{message}"
        );
    }
}

#[test]
fn a_loss_that_the_host_group_learns_of_ends_a_stuck_collective() {
    let library = FakeLibrary::new("stuck 0");
    let hosts = Tcp::local_group(2, &Timing::default()).expect("loopback");
    let ranks: Vec<_> = hosts
        .into_iter()
        .map(|host| {
            let peers = host.abort_handle();
            let options = NcclOptions {
                library: Some(library.path()),
                timeout: PATIENT,
                peers: Some(peers.clone()),
                ..NcclOptions::default()
            };
            thread::spawn(move || {
                let device = gpu();
                let rank = host.rank();
                let mut group = Nccl::new(Box::new(host), &device, options).expect("it starts");
                let mut gradients = buffer(&device, &values(rank, LEN));
                let lost = thread::spawn(move || {
                    thread::sleep(SHORT);
                    if rank == 0 {
                        peers.abort("rank 7 is lost");
                    }
                });
                let begin = Instant::now();
                let error = group.all_reduce(&mut gradients, &mut []);
                let took = begin.elapsed();
                lost.join().expect("it only asks");
                (transient(&error.expect_err("it is stuck")), took)
            })
        })
        .collect();
    for rank in ranks {
        let (message, took) = rank.join().expect("no panic");
        assert!(message.contains("rank 7 is lost"), "{message}");
        assert!(took < SHORT + SLACK, "{took:?}");
    }
}

#[test]
fn ranks_that_diverge_are_an_error_on_all_sides() {
    let check = |ask: &(dyn Fn(&mut Nccl, &Device, usize) -> Result<()> + Sync),
                 parts: [&str; 2]| {
        let library = FakeLibrary::new("");
        for error in on_each_rank(2, |host, device| {
            let mut group = join(host, &device, &library, PATIENT, BUCKET).expect("it starts");
            let rank = group.rank();
            let error = ask(&mut group, &device, rank).expect_err("they ask for two things");
            assert_ends(group, SLACK);
            transient(&error)
        }) {
            for part in parts {
                assert!(error.contains(part), "{part}: {error}");
            }
        }
    };
    let lengths = |group: &mut Nccl, device: &Device, rank: usize| {
        group.all_reduce(&mut buffer(device, &values(0, 8 + 8 * rank)), &mut [])
    };
    check(
        &lengths,
        ["all_reduce of 8 values", "all_reduce of 16 values"],
    );
    let operations = |group: &mut Nccl, device: &Device, rank: usize| {
        let mut values = buffer(device, &values(0, 8));
        match rank {
            0 => group.broadcast(&mut values),
            _ => group.all_reduce(&mut values, &mut []),
        }
    };
    check(&operations, ["broadcast of 8", "all_reduce of 8"]);
}

#[test]
fn another_buffer_than_the_one_begun_is_refused() {
    let library = FakeLibrary::new("");
    on_each_rank(1, |host, device| {
        let mut group = join(host, &device, &library, PATIENT, BUCKET).expect("alone");
        let mut one = buffer(&device, &values(0, LEN));
        let mut other = buffer(&device, &values(0, LEN));
        group.reduce_ready(&mut one, 0..LEN).expect("alone");
        let error = group.all_reduce(&mut other, &mut []).expect_err("refused");
        assert!(error.to_string().contains("another buffer"), "{error}");
        assert_ends(group, SLACK);
    });
}

#[test]
fn a_group_dropped_in_the_middle_aborts_and_a_peer_learns_of_it() {
    let library = FakeLibrary::new("log");
    let peer = Mutex::new(None::<String>);
    on_each_rank(2, |host, device| {
        let mut group = join(host, &device, &library, SHORT, BUCKET).expect("it starts");
        let mut gradients: FlatBuffer = buffer(&device, &values(0, LEN));
        if group.rank() == 0 {
            group
                .reduce_ready(&mut gradients, 0..2000)
                .expect("it begins");
        } else {
            let error = group
                .all_reduce(&mut gradients, &mut [])
                .expect_err("alone");
            *peer.lock().expect("whole") = Some(transient(&error));
        }
        assert_ends(group, SLACK);
    });
    let message = peer.lock().expect("whole").take().expect("it was told");
    assert!(message.contains("rank 0 left the group"), "{message}");
    assert_eq!(
        library.calls(0).last().map(|(name, _)| name.as_str()),
        Some("abort")
    );
}

#[test]
fn a_fault_of_the_gpu_is_reported_and_nothing_hangs() {
    let library = FakeLibrary::new("");
    let host = Local::group(1, PATIENT).remove(0);
    let device = gpu();
    let mut group = join(host, &device, &library, SHORT, BUCKET).expect("alone");
    let Device::Cuda(cuda) = &device else {
        panic!("it is a GPU")
    };
    // More than the stand-in has: the failure sticks to the device.
    drop(cuda.alloc(1 << 45));
    let mut gradients = FlatBuffer::zeros_on(&std::sync::Arc::default(), &device);
    let error = group
        .all_reduce(&mut gradients, &mut [])
        .expect_err("it is reported");
    assert_eq!(error.exit_code(), ExitCode::OutOfMemory);
    assert_ends(group, SLACK);
}

/// Nothing of a communicator needs the group it is in.
#[test]
fn a_communicator_can_be_sent_to_another_thread() {
    fn is_send<T: Send>() {}
    is_send::<Communicator>();
    is_send::<Nccl>();
}
