//! The control plane: one server, in the process of global rank 0, and one connection to it from every
//! rank, rank 0 included.
//!
//! Over it go: who takes part ([`Announcement`], [`Table`]), signs of life both ways, the agreement on the
//! step before which the run ends, and the first failure, which every rank learns. A connection that ends
//! without a word, or is silent for [`Timing::dead_after`](crate::Timing), means that its rank is lost.

mod client;
mod link;
mod message;
mod roster;
mod server;

pub(crate) use client::{Control, JoinError};
pub(crate) use message::{Announcement, Member, Refusal, RefusalKind};
pub(crate) use server::{Server, subject as store_subject};
