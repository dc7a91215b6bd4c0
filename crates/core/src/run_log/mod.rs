//! What a run reports while it goes: events, and observers that write them down.
//!
//! The trainer emits an [`Event`]; each [`Observer`] makes its own file or line of it. Numbers that
//! are not finite are written as the strings `NaN`, `Infinity` and `-Infinity`, so every file stays
//! valid JSON and none of them hides a diverging loss.

mod event;
mod json;
mod json_lines;
mod log_window;
mod results;
mod selection;
mod trainer_log;
mod trainer_state;

pub use event::{
    CheckpointSaved, Evaluated, Event, LogRow, Observer, RunFinished, RunStarted, emit,
};
pub use json::{json_number, number_from_json};
pub use json_lines::JsonLines;
pub use log_window::{LogWindow, StepReport};
pub use results::{all_results, eval_results, train_results};
pub use selection::{METRICS, Selection};
pub use trainer_log::{TrainerLogJsonl, rows_up_to};
pub use trainer_state::TrainerState;
