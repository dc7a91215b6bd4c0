//! Ranks as real processes that are killed, frozen, cut off and pestered.
//!
//! ```text
//! cargo test -p ferrotune-dist --test chaos                       # each case a few times
//! cargo test -p ferrotune-dist --test chaos -- --times 50 killed  # a case as often as one likes
//! ```
//! Prints one line per case: how often it held, and the longest time until every survivor had ended.

mod job;
mod proxy;
mod rank;

use job::{DEAD_AFTER, Job, Rank};
use proxy::Proxy;
use std::io::Write;
use std::net::TcpStream;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

/// Time until every survivor had ended, or what went wrong.
type Outcome = Result<Duration, String>;
type Case = fn(u64) -> Outcome;

/// A killed peer is noticed within this. More for a machine that has other things to do, unless the times
/// are what is asked for (`--times`).
const NOTICE: Duration = Duration::from_secs(1);
const BUSY: Duration = Duration::from_secs(9);
const TRANSIENT: i32 = 175;
const BAD_CONFIG: i32 = 78;

const CASES: [(&str, Case); 10] = [
    ("killed in a step", killed_in_a_step),
    (
        "killed before the first exchange",
        killed_before_the_first_exchange,
    ),
    (
        "killed while others are missing",
        killed_while_others_are_missing,
    ),
    ("killed in the handshake", killed_in_the_handshake),
    ("frozen in a step", frozen_in_a_step),
    ("cut off from the store", cut_off_from_the_store),
    (
        "left over from an earlier attempt",
        left_over_from_an_earlier_attempt,
    ),
    ("two processes of one rank", two_processes_of_one_rank),
    ("refused for what differs", refused_for_what_differs),
    ("pestered by strangers", pestered_by_strangers),
];

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1).peekable();
    if words.peek().is_some_and(|word| word == "rank") {
        return rank::main(&rank::Settings::new(words));
    }
    let mut times = None;
    let mut filters = Vec::new();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--times" => times = words.next().and_then(|n| n.parse().ok()),
            "--list" => return ExitCode::SUCCESS,
            flag if flag.starts_with('-') => {}
            filter => filters.push(filter.to_owned()),
        }
    }
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(f));
    let mut failed = false;
    for (name, case) in CASES.iter().filter(|(name, _)| wanted(name)) {
        failed |= !repeat(name, *case, times.unwrap_or(1));
    }
    ExitCode::from(u8::from(failed))
}

/// Runs a case `times` times; true if it held each time.
fn repeat(name: &str, case: Case, times: u64) -> bool {
    let mut longest = Duration::ZERO;
    let mut held = 0;
    for seed in 0..times {
        match case(seed) {
            Ok(time) => {
                held += 1;
                longest = longest.max(time);
            }
            Err(problem) => eprintln!("{name}, number {seed}: {problem}"),
        }
    }
    println!(
        "{name}: {held} of {times}, longest {:.3} s",
        longest.as_secs_f64()
    );
    held == times
}

/// Time that survivors have, where it should take `goal`.
fn patience(goal: Duration) -> Duration {
    let measured = std::env::args().any(|word| word == "--times");
    if measured { goal } else { goal + BUSY }
}

/// Waits until all survivors have ended with 175 and named `lost`. Returns how long that took.
fn survivors_name(lost: usize, ranks: Vec<Rank>, begin: Instant, goal: Duration) -> Outcome {
    let name = format!("rank {lost}");
    for rank in ranks {
        rank.end(begin + patience(goal))?
            .expect(TRANSIENT, &[&name])?;
    }
    Ok(begin.elapsed())
}

/// Lets all ranks get into their steps, and a while more that differs from seed to seed.
fn let_run(ranks: &mut [Rank], seed: u64) -> Result<(), String> {
    for rank in ranks {
        rank.wait_until_ready()?;
    }
    thread::sleep(Duration::from_millis(seed * 7919 % 50));
    Ok(())
}

fn killed_in_a_step(seed: u64) -> Outcome {
    let mut ranks = Job::new().start_all();
    let_run(&mut ranks, seed)?;
    let lost = seed as usize % ranks.len();
    let begin = Instant::now();
    ranks.remove(lost).kill();
    survivors_name(lost, ranks, begin, NOTICE)
}

fn killed_before_the_first_exchange(seed: u64) -> Outcome {
    let job = Job::new();
    let lost = seed as usize % job.world;
    let pause = |rank| {
        if rank == lost {
            vec!["pause=joined".to_owned()]
        } else {
            vec![]
        }
    };
    let mut ranks: Vec<Rank> = (0..job.world).map(|r| job.start(r, &pause(r))).collect();
    ranks[lost].wait_until_ready()?;
    let begin = Instant::now();
    ranks.remove(lost).kill();
    survivors_name(lost, ranks, begin, NOTICE)
}

/// Rank 1 dies while rank 2 has not even started: nobody can go on, and the deadline ends it.
fn killed_while_others_are_missing(_: u64) -> Outcome {
    let mut job = Job::new();
    job.rendezvous = Duration::from_secs(2);
    let begin = Instant::now();
    let store = job.start(0, &[]);
    let mut lost = job.start(1, &["pause=waiting".into()]);
    lost.wait_until_ready()?;
    thread::sleep(Duration::from_millis(300));
    lost.kill();
    let end = store.end(begin + patience(job.rendezvous + NOTICE))?;
    end.expect(TRANSIENT, &["1 of 3 ranks are there, missing: 1-2"])?;
    Ok(begin.elapsed())
}

fn killed_in_the_handshake(_: u64) -> Outcome {
    let job = Job::new();
    let mut ranks = vec![job.start(0, &[]), job.start(1, &[])];
    // The store has to listen before half a handshake can begin.
    while TcpStream::connect(("127.0.0.1", job.port)).is_err() {
        thread::sleep(Duration::from_millis(10));
    }
    let mut lost = job.start(2, &["pause=handshake".into()]);
    lost.wait_until_ready()?;
    lost.kill();
    // Its successor takes its place.
    let begin = Instant::now();
    ranks.push(job.start(2, &[]));
    let_run(&mut ranks, 0)?;
    let time = begin.elapsed();
    if time > patience(Duration::from_secs(2)) {
        return Err(format!("{time:?} until its successor ran"));
    }
    Ok(time)
}

fn frozen_in_a_step(seed: u64) -> Outcome {
    let mut ranks = Job::new().start_all();
    let_run(&mut ranks, seed)?;
    let lost = seed as usize % ranks.len();
    let begin = Instant::now();
    let frozen = ranks.remove(lost);
    frozen.freeze();
    survivors_name(lost, ranks, begin, DEAD_AFTER + NOTICE)
}

/// The connection of rank 2 to the store goes silent, both ways, and nobody closes it.
fn cut_off_from_the_store(seed: u64) -> Outcome {
    let job = Job::new();
    let cable = Proxy::to(job.port);
    let port = format!("port={}", cable.port);
    let mut ranks = vec![job.start(0, &[]), job.start(1, &[]), job.start(2, &[port])];
    let_run(&mut ranks, seed)?;
    let begin = Instant::now();
    cable.cut();
    let deadline = begin + patience(DEAD_AFTER + NOTICE);
    for rank in ranks {
        // From either end of the cable, the other is lost. Who notices first, rank 2 or the store, is chance.
        let other = if rank.rank == 2 { "rank " } else { "rank 2 " };
        rank.end(deadline)?.expect(TRANSIENT, &[other])?;
    }
    Ok(begin.elapsed())
}

/// Starts a job, then a process that must be refused: both it and rank 0 say why, and the job goes on.
fn refused(more: &[String], rank: usize, code: i32, words: &[&str]) -> Outcome {
    let mut job = Job::new();
    job.steps = 400;
    let mut ranks = job.start_all();
    let_run(&mut ranks, 0)?;
    let begin = Instant::now();
    let end = job
        .start(rank, more)
        .end(begin + patience(Duration::from_secs(3)))?;
    end.expect(code, words)?;
    let time = begin.elapsed();
    for rank in ranks {
        let says: &[&str] = if rank.rank == 0 { &["refused"] } else { &[] };
        rank.end(begin + Duration::from_secs(60))?.expect(0, says)?;
    }
    Ok(time)
}

fn left_over_from_an_earlier_attempt(_: u64) -> Outcome {
    let words = [
        "rank 1",
        "restart attempt 0",
        "rank 0 of attempt 1",
        "left over",
    ];
    refused(&["attempt=0".into()], 1, TRANSIENT, &words)
}

fn two_processes_of_one_rank(_: u64) -> Outcome {
    refused(&[], 1, BAD_CONFIG, &["rank 1", "is taken by rank 1"])
}

fn refused_for_what_differs(seed: u64) -> Outcome {
    let cases = [
        ("token=other", "wrong token"),
        ("job=other", "wrong job"),
        ("digest=other", "configuration other"),
        ("world=4", "4 ranks"),
    ];
    let (more, word) = cases[seed as usize % cases.len()];
    refused(&[more.into()], 1, BAD_CONFIG, &[word])
}

/// Idle connections, random bytes, frames that announce too much: the run completes.
fn pestered_by_strangers(seed: u64) -> Outcome {
    let mut job = Job::new();
    job.steps = 600;
    let begin = Instant::now();
    let mut ranks = vec![job.start(0, &[])];
    let connect = || TcpStream::connect(("127.0.0.1", job.port));
    while connect().is_err() {
        thread::sleep(Duration::from_millis(10));
    }
    // They come first, so that the ranks have to get past them.
    let idle: Vec<_> = (0..500).filter_map(|_| connect().ok()).collect();
    if idle.len() < 400 {
        return Err(format!("only {} connections accepted", idle.len()));
    }
    ranks.extend((1..job.world).map(|rank| job.start(rank, &[])));
    let_run(&mut ranks, seed)?;
    for i in 0..100_u64 {
        let Ok(mut stream) = connect() else { continue };
        let noise: Vec<u8> = (0..256)
            .map(|j| (((i * 31 + j) * 2_654_435_761) >> 7) as u8)
            .collect();
        let oversize = *b"FTRN\x01\0\0\0\xff\xff\xff\x7f";
        let bytes: &[u8] = if i % 2 == 0 { &noise } else { &oversize };
        // It may be dropped already.
        let _ = stream.write_all(bytes);
    }
    for rank in ranks {
        let end = rank.end(begin + Duration::from_secs(60))?;
        let says: &[&str] = if end.rank == 0 {
            &["garbage", "many unknown"]
        } else {
            &[]
        };
        end.expect(0, says)?;
        // However many there are, a line each kind.
        if end.error.lines().count() > 8 {
            return Err(format!("too much is said: {}", end.error));
        }
    }
    drop(idle);
    Ok(begin.elapsed())
}
