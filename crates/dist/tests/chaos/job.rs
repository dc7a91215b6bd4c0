//! A job of several processes, and what became of them.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Silence after which a peer counts as lost here.
pub(crate) const DEAD_AFTER: Duration = Duration::from_millis(1500);
/// Until all ranks must be there, where it matters.
pub(crate) const RENDEZVOUS: Duration = Duration::from_secs(20);

/// What the ranks of a job are told.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) world: usize,
    pub(crate) port: u16,
    pub(crate) rendezvous: Duration,
    pub(crate) steps: u64,
}

impl Job {
    /// A job of three ranks that step until something happens.
    pub(crate) fn new() -> Self {
        Self {
            world: 3,
            port: free_port(),
            rendezvous: RENDEZVOUS,
            steps: u64::MAX,
        }
    }

    /// Starts a rank; `more` overrides what it is told.
    pub(crate) fn start(&self, rank: usize, more: &[String]) -> Rank {
        let millis = |time: Duration| time.as_millis();
        let mut words = vec![
            "rank".to_owned(),
            format!("rank={rank}"),
            format!("world={}", self.world),
            format!("port={}", self.port),
            format!("rendezvous={}", millis(self.rendezvous)),
            format!("dead_after={}", millis(DEAD_AFTER)),
            format!("steps={}", self.steps),
            "token=secret".into(),
            "job=chaos".into(),
            "attempt=1".into(),
        ];
        words.extend_from_slice(more);
        let this = std::env::current_exe().expect("the path of this program");
        let mut child = Command::new(this)
            .args(words)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a process more");
        let said = child.stdout.take().map(BufReader::new);
        Rank { rank, child, said }
    }

    pub(crate) fn start_all(&self) -> Vec<Rank> {
        (0..self.world).map(|rank| self.start(rank, &[])).collect()
    }
}

/// One process.
pub(crate) struct Rank {
    pub(crate) rank: usize,
    child: Child,
    said: Option<BufReader<std::process::ChildStdout>>,
}

/// How a process ended.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) rank: usize,
    pub(crate) code: Option<i32>,
    pub(crate) error: String,
}

impl Rank {
    /// Waits until it says that it is where it should be.
    pub(crate) fn wait_until_ready(&mut self) -> Result<(), String> {
        let mut line = String::new();
        if let Some(said) = &mut self.said {
            said.read_line(&mut line).map_err(|e| e.to_string())?;
        }
        match line.trim() {
            "ready" => Ok(()),
            other => Err(format!("rank {} said {other:?}", self.rank)),
        }
    }

    pub(crate) fn kill(&mut self) {
        // SIGKILL; waited for, so that no zombie is left.
        self.child.kill().expect("a child of this process");
        self.child.wait().expect("a child of this process");
    }

    pub(crate) fn freeze(&self) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-STOP", &pid]).status();
        assert!(status.is_ok_and(|s| s.success()), "kill -STOP works");
    }

    /// How it ended, if it does so before `deadline`.
    pub(crate) fn end(mut self, deadline: Instant) -> Result<End, String> {
        loop {
            if let Some(status) = self.child.try_wait().map_err(|e| e.to_string())? {
                let mut error = String::new();
                if let Some(stderr) = &mut self.child.stderr {
                    stderr
                        .read_to_string(&mut error)
                        .map_err(|e| e.to_string())?;
                }
                return Ok(End {
                    rank: self.rank,
                    code: status.code(),
                    error,
                });
            }
            if Instant::now() > deadline {
                return Err(format!("rank {} is still there", self.rank));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Rank {
    /// Nothing outlives its test.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl End {
    /// Whether it ended with this code, and words that its error says.
    pub(crate) fn expect(&self, code: i32, words: &[&str]) -> Result<(), String> {
        let Self { rank, error, .. } = self;
        if self.code != Some(code) {
            return Err(format!("rank {rank} ended with {:?}: {error}", self.code));
        }
        match words.iter().find(|word| !error.contains(**word)) {
            None => Ok(()),
            Some(word) => Err(format!("rank {rank} does not say {word:?}: {error}")),
        }
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").port()
}
