//! One rank, as a process of its own: joins, steps until something happens, exits as `ferrotune` would.

use ferrotune_core::Result;
use ferrotune_core::params::{FlatBuffer, ParamLayoutBuilder, ParamSpec};
use ferrotune_core::process_group::ProcessGroup;
use ferrotune_dist::{JobToken, Membership, Tcp, Timing, Work};
use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpStream;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

/// What a rank is told, as `key=value` words.
pub(crate) struct Settings(BTreeMap<String, String>);

impl Settings {
    pub(crate) fn new(words: impl Iterator<Item = String>) -> Self {
        let pairs = words.filter_map(|word| {
            let (key, value) = word.split_once('=')?;
            Some((key.to_owned(), value.to_owned()))
        });
        Self(pairs.collect())
    }

    fn text(&self, key: &str) -> &str {
        self.0.get(key).map_or("", String::as_str)
    }

    fn number(&self, key: &str) -> u64 {
        self.text(key).parse().unwrap_or(0)
    }

    fn time(&self, key: &str) -> Duration {
        Duration::from_millis(self.number(key))
    }
}

pub(crate) fn main(settings: &Settings) -> ExitCode {
    // Warnings on standard error, as the binary has them.
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .init();
    match run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code() as u8)
        }
    }
}

fn run(settings: &Settings) -> Result<()> {
    let rank = settings.number("rank") as usize;
    let world = settings.number("world") as usize;
    let port = settings.number("port") as u16;
    if settings.text("pause") == "handshake" {
        // The beginning of a frame, and no more.
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the store listens");
        stream.write_all(b"FTRN\x01\0").expect("it accepts");
        say("ready");
        sleep_for_good();
    }
    let mut membership =
        Membership::on_one_machine(rank, world, port, JobToken::new(settings.text("token")));
    membership.restart_attempt = settings.number("attempt");
    membership.job_id = settings.text("job").to_owned();
    let work = Work {
        device: "cpu".into(),
        config_digest: settings.text("digest").to_owned(),
    };
    let timing = Timing {
        rendezvous: settings.time("rendezvous"),
        refusals: Duration::from_millis(300),
        dead_after: settings.time("dead_after"),
        heartbeat: settings.time("dead_after") / 8,
        ..Timing::default()
    };
    if settings.text("pause") == "waiting" {
        // Said before it is so; whoever listens allows for it.
        say("ready");
    }
    let mut group = Tcp::join(&membership, &work, &timing, &AtomicBool::new(false))?;
    if settings.text("pause") == "joined" {
        say("ready");
        sleep_for_good();
    }
    let mut layout = ParamLayoutBuilder::new();
    layout.add(ParamSpec::new("w", [10_000], 0));
    let mut buffer = FlatBuffer::zeros(&layout.build()?);
    let steps = settings.number("steps");
    for step in 0.. {
        if group.begin_step(step, step == steps)? {
            return Ok(());
        }
        buffer.as_mut_slice().fill(1.0);
        let mut totals = [1.0];
        group.all_reduce(&mut buffer, &mut totals)?;
        assert_eq!(totals, [world as f64]);
        assert!(
            buffer.as_slice()[..10_000]
                .iter()
                .all(|v| *v == world as f32)
        );
        if step == 3 {
            say("ready");
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn say(word: &str) {
    println!("{word}");
    // The reader waits for it.
    std::io::stdout().flush().expect("someone listens");
}

fn sleep_for_good() -> ! {
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}
