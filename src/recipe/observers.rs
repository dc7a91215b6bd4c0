//! Who hears of a run.

use ferrotune_core::Result;
use ferrotune_core::run_log::{Event, Observer, emit};

/// The log file first, so that it has the event whatever the others do with it.
pub(super) struct Tee<'a, 'o> {
    pub(super) log: &'a mut dyn Observer,
    pub(super) others: &'a mut [Box<dyn Observer + 'o>],
}

impl Observer for Tee<'_, '_> {
    fn on(&mut self, event: &Event) -> Result<()> {
        self.log.on(event)?;
        emit(self.others, event)
    }
}

/// Ranks other than 0 say nothing.
pub(super) struct Silent;

impl Observer for Silent {
    fn on(&mut self, _: &Event) -> Result<()> {
        Ok(())
    }
}
