//! A cable that can be cut: forwards a port to another, until told to stop without a word.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

pub(crate) struct Proxy {
    pub(crate) port: u16,
    cut: Arc<AtomicBool>,
}

impl Proxy {
    /// Forwards to `port` of this host.
    pub(crate) fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let own = listener.local_addr().expect("bound").port();
        let cut = Arc::new(AtomicBool::new(false));
        let for_thread = Arc::clone(&cut);
        thread::spawn(move || {
            for inside in listener.incoming().flatten() {
                // Not there yet: the caller tries again.
                let Ok(outside) = TcpStream::connect(("127.0.0.1", port)) else {
                    continue;
                };
                for (from, to) in [(&inside, &outside), (&outside, &inside)] {
                    let (from, to) = (from.try_clone(), to.try_clone());
                    let cut = Arc::clone(&for_thread);
                    thread::spawn(move || {
                        forward(from.expect("a descriptor"), to.expect("a descriptor"), &cut);
                    });
                }
            }
        });
        Self { port: own, cut }
    }

    /// From now on nothing comes through, and neither side is told.
    pub(crate) fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, cut: &AtomicBool) {
    let timeout = Some(Duration::from_millis(20));
    from.set_read_timeout(timeout)
        .expect("a timeout above zero");
    let mut bytes = [0; 4096];
    loop {
        if cut.load(Ordering::SeqCst) {
            // Keeps both sockets open, as a cable does that is cut somewhere.
            thread::sleep(Duration::from_secs(30));
            return;
        }
        match from.read(&mut bytes) {
            Ok(0) => break,
            Ok(n) if to.write_all(&bytes[..n]).is_err() => break,
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => break,
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}
