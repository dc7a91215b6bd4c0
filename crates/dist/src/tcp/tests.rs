use super::*;
use crate::measure_all_reduce;
use ferrotune_core::params::{ParamLayoutBuilder, ParamSpec};
use ferrotune_kernels::Device;
use std::time::{Duration, Instant};

/// Short enough for a test, long enough for a busy machine.
pub(crate) fn timing() -> Timing {
    Timing {
        rendezvous: Duration::from_secs(20),
        refusals: Duration::from_millis(500),
        first_call: Duration::from_secs(20),
        call: Duration::from_secs(20),
        ..Timing::default()
    }
}

/// A buffer of one tensor.
fn buffer(values: &[f32]) -> FlatBuffer {
    let mut layout = ParamLayoutBuilder::new();
    let id = layout.add(ParamSpec::new("w", [values.len()], 0));
    let mut buffer = FlatBuffer::zeros(&layout.build().expect("one tensor"));
    buffer.get_mut(id).copy_from_slice(values);
    buffer
}

/// What `body` returns on each rank. A group lives until its rank's `body` ends.
fn on_each_rank<R: Send>(world: usize, timing: &Timing, body: impl Fn(Tcp) -> R + Sync) -> Vec<R> {
    let body = &body;
    let ranks = Tcp::local_group(world, timing).expect("ranks meet");
    thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|rank| scope.spawn(move || body(rank)))
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("rank panicked"))
            .collect()
    })
}

fn message(result: Result<()>) -> String {
    match result {
        Err(Error::Transient { message }) => message,
        other => panic!("expected a transient error, got {other:?}"),
    }
}

#[test]
fn reductions_agree_on_every_rank_over_many_rounds() {
    for world in [2, 3, 5] {
        let results = on_each_rank(world, &timing(), |mut group| {
            let rank = group.rank();
            let mut last = Vec::new();
            for round in 0..20 {
                // More ranks than values, odd lengths, more than one staging area.
                let length = [0, 1, 4097, 300_001][round % 4];
                let values: Vec<f32> = (0..length).map(|i| 0.1 * (i + rank) as f32).collect();
                let mut floats = buffer(&values);
                let mut totals = [rank as f64, 1e15 + rank as f64];
                group
                    .all_reduce(&mut floats, &mut totals)
                    .expect("peers live");
                let ranks = (0..world).map(|r| r as f64);
                assert_eq!(totals[0], ranks.clone().sum::<f64>());
                assert_eq!(totals[1], ranks.map(|r| 1e15 + r).sum::<f64>());
                let mut same = buffer(&vec![rank as f32; length]);
                group.broadcast(&mut same).expect("peers live");
                assert!(same.as_slice()[..length].iter().all(|v| *v == 0.0));
                let all = group
                    .all_gather(&vec![rank as u8; 1000 * rank])
                    .expect("peers live");
                for (peer, bytes) in all.iter().enumerate() {
                    assert_eq!(*bytes, vec![peer as u8; 1000 * peer]);
                }
                last = floats.as_slice().to_vec();
            }
            group.barrier().expect("peers live");
            last
        });
        let bits = |r: &Vec<f32>| r.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(results.iter().all(|r| bits(r) == bits(&results[0])));
        for (i, value) in results[0].iter().take(300_001).enumerate().step_by(1013) {
            let exact: f32 = (0..world).map(|rank| 0.1 * (i + rank) as f32).sum();
            assert!(
                (value - exact).abs() <= 1e-6 * exact,
                "{value} is not {exact}"
            );
        }
    }
}

#[test]
fn totals_are_summed_in_rank_order() {
    // In any other order the small values are lost beside the large one, or not.
    let values = [1e16, 1.0, 1.0, -1e16];
    let in_order: f64 = values.iter().sum();
    let sums = on_each_rank(4, &timing(), |mut group| {
        let mut totals = [values[group.rank()]];
        group
            .all_reduce(&mut buffer(&[0.0]), &mut totals)
            .expect("peers live");
        totals[0]
    });
    assert_eq!(sums, [in_order; 4]);
}

#[test]
fn a_group_of_one_needs_nobody() {
    let mut group = Tcp::local_group(1, &timing()).expect("alone").remove(0);
    let mut floats = buffer(&[1.0, 2.0]);
    let mut totals = [3.0];
    group.all_reduce(&mut floats, &mut totals).expect("alone");
    group.broadcast(&mut floats).expect("alone");
    assert_eq!((floats.as_slice()[1], totals), (2.0, [3.0]));
    assert_eq!(group.all_gather(b"x").expect("alone"), [b"x"]);
    assert!(!group.begin_step(0, false).expect("alone"));
    assert!(group.begin_step(1, true).expect("alone"));
}

#[test]
fn every_rank_ends_before_the_same_step() {
    for asked in 0..3 {
        let ends = on_each_rank(3, &timing(), |mut group| {
            let mut step = 0;
            loop {
                let stop = group.rank() == asked && step >= 5;
                if group.begin_step(step, stop).expect("peers live") {
                    return step;
                }
                group.barrier().expect("peers live");
                step += 1;
            }
        });
        assert!(ends.iter().all(|end| *end == ends[0]), "{ends:?}");
        assert!((5..=6).contains(&ends[0]), "{ends:?}");
    }
}

#[test]
fn a_rank_that_leaves_is_an_error_on_the_others_not_a_hang() {
    for leaver in 0..3 {
        let begin = Instant::now();
        let results = on_each_rank(3, &timing(), |mut group| {
            if group.rank() == leaver {
                Ok(())
            } else {
                group.barrier()
            }
        });
        assert!(begin.elapsed() < Duration::from_secs(5));
        for (rank, result) in results
            .into_iter()
            .enumerate()
            .filter(|(r, _)| *r != leaver)
        {
            let text = message(result);
            let name = format!("rank {leaver} ");
            assert!(text.contains(&name), "rank {rank} of {leaver}: {text}");
        }
    }
}

#[test]
fn a_rank_that_leaves_after_the_last_round_takes_nothing_from_the_others() {
    for _ in 0..10 {
        let results = on_each_rank(3, &timing(), |mut group| {
            let mut sum = [1.0];
            group.sum_totals(&mut sum).map(|()| sum)
        });
        for sum in results {
            assert_eq!(sum.expect("the round was complete"), [3.0]);
        }
    }
}

#[test]
fn diverging_calls_are_an_error_on_every_rank_that_names_both() {
    type Body = fn(&mut Tcp) -> Result<()>;
    let cases: [(Body, [&str; 2]); 4] = [
        (
            |group| group.all_reduce(&mut buffer(&vec![0.0; 4 + 8 * (group.rank() / 2)]), &mut []),
            ["of 4 f32", "of 12 f32"],
        ),
        (
            |group| match group.rank() {
                2 => group.broadcast(&mut buffer(&[])),
                _ => group.barrier(),
            },
            ["all_gather", "broadcast"],
        ),
        (
            |group| group.all_reduce(&mut buffer(&[1.0]), &mut vec![0.0; group.rank() / 2]),
            ["0 totals", "1 totals"],
        ),
        (
            // One rank skips an exchange of the first step.
            |group| {
                for step in 0..2 {
                    group.begin_step(step, false)?;
                    if group.rank() != 2 || step == 1 {
                        group.all_reduce(&mut buffer(&[1.0]), &mut [])?;
                    }
                }
                Ok(())
            },
            ["step 0", "step 1"],
        ),
    ];
    for (body, words) in cases {
        let results = on_each_rank(3, &timing(), |mut group| body(&mut group));
        for result in results {
            let text = message(result);
            let both = words.iter().all(|word| text.contains(word));
            assert!(
                both && text.contains("diverged") && text.contains("rank 2"),
                "{text}"
            );
        }
    }
}

#[test]
fn a_failed_group_stays_failed() {
    on_each_rank(2, &timing(), |mut group| {
        if group.rank() == 0 {
            group.abort_handle().abort("enough");
        }
        // The other may see the end of a connection before it hears why.
        let first = message(group.barrier());
        let aborted = first.contains("enough");
        assert!(
            aborted || (group.rank() == 1 && first.contains("rank 0")),
            "{first}"
        );
        for _ in 0..3 {
            assert_eq!(message(group.barrier()), first);
            assert_eq!(message(group.begin_step(0, false).map(drop)), first);
        }
        // It leaves when the other has heard.
        group
    });
}

#[test]
fn an_abort_from_another_thread_wakes_a_call_on_every_rank() {
    let begin = Instant::now();
    let results = on_each_rank(3, &timing(), |mut group| {
        let handle = group.abort_handle();
        match group.rank() {
            // The one that others wait for; it does not call, so it must not leave before they know.
            0 => {
                while handle.failure().is_none() {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(Error::Transient {
                    message: handle.failure().unwrap_or_default(),
                })
            }
            1 => thread::scope(|scope| {
                scope.spawn(move || {
                    thread::sleep(Duration::from_millis(100));
                    handle.abort("the GPU fell off the bus");
                });
                group.barrier()
            }),
            _ => group.barrier(),
        }
    });
    assert!(begin.elapsed() < Duration::from_secs(5));
    for result in results {
        assert!(message(result).contains("the GPU fell off the bus"));
    }
}

#[test]
fn a_peer_that_is_late_is_named_at_the_deadline() {
    let mut timing = timing();
    timing.first_call = Duration::from_millis(300);
    let begin = Instant::now();
    let results = on_each_rank(2, &timing, |mut group| {
        if group.rank() == 1 {
            // Alive as far as its heartbeats go.
            thread::sleep(Duration::from_millis(900));
        }
        group.barrier()
    });
    assert!(begin.elapsed() < Duration::from_secs(5));
    for result in results {
        let text = message(result);
        assert!(
            text.contains("waited 0.3 s for rank 1 in all_gather"),
            "{text}"
        );
    }
}

#[test]
fn the_measure_checks_its_sums() {
    let times = on_each_rank(2, &timing(), |mut group| {
        measure_all_reduce(&mut group, &Device::Cpu, 4 << 20, 5).expect("peers live")
    });
    assert!(
        times
            .iter()
            .all(|t| t.len() == 5 && t.iter().all(|s| *s > 0.0))
    );
}
