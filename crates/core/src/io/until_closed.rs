use std::io::{ErrorKind, Result, Write};

/// A writer whose reader may go away.
///
/// A reader that has read enough (`ferrotune ... | head -1`) is no failure of what writes: from then on
/// nothing is written, and all is well. Other errors stay errors.
#[derive(Debug)]
pub struct UntilClosed<W> {
    writer: W,
    closed: bool,
}

impl<W: Write> UntilClosed<W> {
    /// Writes to `writer` for as long as somebody reads.
    pub fn new(writer: W) -> Self {
        Self {
            writer,
            closed: false,
        }
    }

    /// `result`, or nothing written because nobody reads any more.
    fn unless_closed(&mut self, result: Result<usize>) -> Result<Option<usize>> {
        match result {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(None)
            }
            result => result.map(Some),
        }
    }
}

impl<W: Write> Write for UntilClosed<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        if self.closed {
            return Ok(bytes.len());
        }
        let written = self.writer.write(bytes);
        Ok(self.unless_closed(written)?.unwrap_or(bytes.len()))
    }

    fn flush(&mut self) -> Result<()> {
        if self.closed {
            return Ok(());
        }
        let flushed = self.writer.flush().map(|()| 0);
        self.unless_closed(flushed).map(|_| ())
    }
}
