//! The thread that calls MPI.

use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::topology::{Color, SimpleCommunicator};
use mpi::traits::{Communicator, CommunicatorCollectives, Root};
use std::sync::mpsc::{Receiver, Sender};

/// What the rank asks for, with values to work on.
pub(super) enum Request {
    /// Sums over all ranks.
    Sum(Vec<f32>),
    /// Rank 0's values.
    Broadcast(Vec<f32>),
}

/// Serves until the rank hangs up. The first answer is empty, and says that MPI has the same ranks.
pub(super) fn run(
    (rank, world_size): (usize, usize),
    requests: &Receiver<Request>,
    answers: &Sender<Result<Vec<f32>, String>>,
) {
    // Finalized with this value, after the last request.
    let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
        let _ = answers.send(Err("MPI has been initialized before in this process".into()));
        return;
    };
    let world = universe.world();
    let theirs = world.size();
    if usize::try_from(theirs) != Ok(world_size) {
        let _ = answers.send(Err(format!(
            "mpirun started {theirs} ranks, and {world_size} have met; start every rank by one mpirun"
        )));
        return;
    }
    // Their order is the launcher's, which need not be ours.
    let key = i32::try_from(rank).unwrap_or(i32::MAX);
    let Some(ranks) = world.split_by_color_with_key(Color::with_value(0), key) else {
        let _ = answers.send(Err("MPI gives no communicator".into()));
        return;
    };
    // If nobody listens any more, there is nobody to tell.
    if answers.send(Ok(Vec::new())).is_err() {
        return;
    }
    for request in requests {
        if answers.send(Ok(serve(&ranks, request))).is_err() {
            return;
        }
    }
}

fn serve(ranks: &SimpleCommunicator, request: Request) -> Vec<f32> {
    match request {
        Request::Sum(values) => {
            let mut sums = vec![0.0; values.len()];
            ranks.all_reduce_into(&values[..], &mut sums[..], SystemOperation::sum());
            sums
        }
        Request::Broadcast(mut values) => {
            ranks.process_at_rank(0).broadcast_into(&mut values[..]);
            values
        }
    }
}
