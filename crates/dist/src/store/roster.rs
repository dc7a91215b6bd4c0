//! Who is there, who may join, and what was agreed: the store's state, without any socket.

use super::message::{Announcement, Progress, Refusal, RefusalKind, Table};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

/// One rank that has announced itself.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) connection: u64,
    pub(super) announcement: Announcement,
    pub(super) progress: Progress,
    pub(super) heard: Instant,
    /// It said goodbye.
    pub(super) left: bool,
}

/// What the store knows.
#[derive(Debug)]
pub(super) struct Roster {
    /// Rank 0's own view, which the others must share.
    host: Announcement,
    meeting: String,
    pub(super) seats: BTreeMap<usize, Seat>,
    complete: bool,
    /// The last refusals, for whoever waits in vain.
    refused: Vec<(usize, Refusal)>,
    next_step: u64,
    stop_before: Option<u64>,
    pub(super) failure: Option<String>,
}

/// What came of an announcement.
#[derive(Debug)]
pub(super) enum Seated {
    /// Others are missing.
    Waiting,
    /// Everyone is there.
    Complete(Table),
}

impl Roster {
    pub(super) fn new(host: Announcement, meeting: String) -> Self {
        Self {
            host,
            meeting,
            seats: BTreeMap::new(),
            complete: false,
            refused: Vec::new(),
            next_step: 0,
            stop_before: None,
            failure: None,
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Takes a rank in, or says why not.
    pub(super) fn seat(
        &mut self,
        connection: u64,
        announcement: Announcement,
    ) -> Result<Seated, Refusal> {
        if let Some(refusal) = self.objection(&announcement) {
            tracing::warn!("refused: {}", refusal.message);
            self.refused.retain(|(_, r)| r != &refusal);
            self.refused.push((announcement.rank, refusal.clone()));
            // The newest few say what is wrong.
            let surplus = self.refused.len().saturating_sub(8);
            self.refused.drain(..surplus);
            return Err(refusal);
        }
        // What kept it out before is settled.
        self.refused.retain(|(rank, _)| *rank != announcement.rank);
        let seat = Seat {
            connection,
            progress: Progress::default(),
            heard: Instant::now(),
            left: false,
            announcement,
        };
        self.seats.insert(seat.announcement.rank, seat);
        if self.seats.len() < self.host.world_size {
            return Ok(Seated::Waiting);
        }
        self.complete = true;
        Ok(Seated::Complete(Table {
            meeting: self.meeting.clone(),
            members: self
                .seats
                .values()
                .map(|s| s.announcement.member())
                .collect(),
        }))
    }

    fn objection(&self, new: &Announcement) -> Option<Refusal> {
        let who = new.member();
        let refuse = |kind, message| Some(Refusal { kind, message });
        let (theirs, ours) = (new.restart_attempt, self.host.restart_attempt);
        if theirs < ours {
            let message = format!(
                "{who} is of restart attempt {theirs}, rank 0 of attempt {ours}: a process left over from \
                 an earlier attempt"
            );
            return refuse(RefusalKind::Stale, message);
        }
        if theirs > ours {
            let message = format!(
                "{who} is of restart attempt {theirs}, the store of rank 0 (host {}, pid {}) still of \
                 attempt {ours}",
                self.host.host, self.host.pid
            );
            return refuse(RefusalKind::Ahead, message);
        }
        if let Some((key, theirs, ours)) = difference(new, &self.host) {
            let host = self.host.member();
            let message =
                format!("{who} says {theirs:?}, {host} says {ours:?}: both must be the same");
            return refuse(RefusalKind::Mismatch(key.into()), message);
        }
        if new.rank >= self.host.world_size {
            let message = format!("{who}: expected a rank below {}", self.host.world_size);
            return refuse(RefusalKind::Mismatch("rank".into()), message);
        }
        let taken = self.seats.get(&new.rank)?;
        let holder = taken.announcement.member();
        refuse(
            RefusalKind::Duplicate,
            format!("{who}: that rank is taken by {holder}; each rank needs a number of its own"),
        )
    }

    /// Rank and seat of a connection.
    pub(super) fn of_connection(&mut self, connection: u64) -> Option<(usize, &mut Seat)> {
        let mut seats = self.seats.iter_mut();
        seats
            .find(|(_, seat)| seat.connection == connection)
            .map(|(rank, seat)| (*rank, seat))
    }

    /// A rank is about to begin `step`. Returns the step before which all end, if one is agreed, and
    /// whether it was agreed just now.
    pub(super) fn begin_step(&mut self, step: u64, stop: bool) -> (Option<u64>, bool) {
        let agreed_now = stop && self.stop_before.is_none();
        if agreed_now {
            self.stop_before = Some(self.next_step.max(step));
        }
        if self.stop_before.is_none_or(|end| step < end) {
            self.next_step = self.next_step.max(step + 1);
        }
        (self.stop_before, agreed_now)
    }

    /// What was heard of `rank` last, for a message.
    pub(super) fn last_heard(&self, rank: usize) -> String {
        let Some(seat) = self.seats.get(&rank) else {
            return format!("rank {rank}");
        };
        let ago = seat.heard.elapsed().as_secs_f64();
        let member = seat.announcement.member();
        let left = if seat.left { ", then it left" } else { "" };
        format!(
            "{member}, last heard of {ago:.1} s ago: {}{left}",
            seat.progress
        )
    }

    /// Who is missing, and who was refused.
    pub(super) fn missing(&self) -> String {
        let missing: Vec<usize> = (0..self.host.world_size)
            .filter(|rank| !self.seats.contains_key(rank))
            .collect();
        let mut text = format!(
            "{} of {} ranks are there, missing: {}",
            self.seats.len(),
            self.host.world_size,
            ranges(&missing)
        );
        for (_, refusal) in &self.refused {
            let _ = write!(text, "; refused: {}", refusal.message);
        }
        text
    }

    /// The refusal that keeps the run from beginning, if trying again would not help.
    pub(super) fn lasting_refusal(&self) -> Option<&Refusal> {
        let lasting = |(rank, refusal): &&(usize, Refusal)| match refusal.kind {
            // Of a rank that is there, it was somebody else's.
            RefusalKind::Mismatch(_) => !self.seats.contains_key(rank),
            RefusalKind::Duplicate => true,
            RefusalKind::Stale | RefusalKind::Ahead => false,
        };
        self.refused.iter().rev().find(lasting).map(|(_, r)| r)
    }
}

/// The first value that two ranks of one job may not differ in: name, theirs, ours.
fn difference(
    theirs: &Announcement,
    ours: &Announcement,
) -> Option<(&'static str, String, String)> {
    let of = |a: &Announcement| {
        let Announcement {
            world_size,
            nnodes,
            local_world_size,
            ..
        } = a;
        [
            ("launcher", a.launcher.clone()),
            ("job_id", a.job_id.clone()),
            ("version", format!("ferrotune {}", a.version)),
            ("nnodes", format!("{nnodes} nodes")),
            (
                "world_size",
                format!("{world_size} ranks ({local_world_size} on this node, {nnodes} nodes)"),
            ),
            ("device", format!("device {}", a.device)),
            (
                "config_digest",
                format!("configuration {}", a.config_digest),
            ),
        ]
    };
    // Nodes may hold different numbers of ranks, as long as all agree on the sum.
    let same_world = theirs.world_size == ours.world_size;
    of(theirs)
        .into_iter()
        .zip(of(ours))
        .find(|((key, a), (_, b))| a != b && !(same_world && *key == "world_size"))
        .map(|((key, a), (_, b))| match key {
            "config_digest" => (key, only_in(&a, &b), only_in(&b, &a)),
            _ => (key, a, b),
        })
}

/// The parts of a list with commas that `other` does not have.
fn only_in(list: &str, other: &str) -> String {
    let parts = |list: &str| -> Vec<String> {
        let list = list.trim_start_matches("configuration ");
        list.split(", ").map(str::to_owned).collect()
    };
    let theirs = parts(other);
    let own: Vec<String> = parts(list)
        .into_iter()
        .filter(|p| !theirs.contains(p))
        .collect();
    format!("configuration {}", own.join(", "))
}

/// `[0, 1, 2, 5]` as `0-2, 5`.
fn ranges(ranks: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == rank => *last = rank,
            _ => runs.push((rank, rank)),
        }
    }
    let words: Vec<String> = runs
        .iter()
        .map(|(a, b)| {
            if a == b {
                a.to_string()
            } else {
                format!("{a}-{b}")
            }
        })
        .collect();
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announcement(rank: usize) -> Announcement {
        Announcement {
            launcher: "jobset".into(),
            job_id: "j".into(),
            restart_attempt: 1,
            nnodes: 3,
            node_rank: rank,
            local_rank: 0,
            local_world_size: 1,
            rank,
            world_size: 3,
            device: "cpu".into(),
            config_digest: "abc".into(),
            version: "1".into(),
            host: format!("pod-{rank}"),
            pid: 7,
            data: ([127, 0, 0, 1], 1).into(),
        }
    }

    fn refusal(change: impl FnOnce(&mut Announcement)) -> Refusal {
        let mut roster = Roster::new(announcement(0), "m".into());
        roster.seat(0, announcement(0)).expect("the first");
        let mut other = announcement(1);
        change(&mut other);
        roster.seat(1, other).expect_err("does not fit")
    }

    #[test]
    fn whoever_does_not_fit_is_refused_by_name() {
        type Change = fn(&mut Announcement);
        let mismatches: [(&str, Change, &str); 7] = [
            ("launcher", |a| a.launcher = "slurm".into(), "slurm"),
            ("job_id", |a| a.job_id = "k".into(), "k"),
            ("version", |a| a.version = "2".into(), "ferrotune 2"),
            ("nnodes", |a| a.nnodes = 4, "4 nodes"),
            ("world_size", |a| a.world_size = 6, "6 ranks"),
            ("device", |a| a.device = "gpu".into(), "gpu"),
            (
                "config_digest",
                |a| a.config_digest = "d".into(),
                "configuration d",
            ),
        ];
        for (key, change, word) in mismatches {
            let refusal = refusal(change);
            assert_eq!(refusal.kind, RefusalKind::Mismatch(key.into()));
            for word in [word, "rank 1 (host pod-1", "rank 0 (host pod-0"] {
                assert!(refusal.message.contains(word), "{}", refusal.message);
            }
        }
        let kind = |change: Change| refusal(change).kind;
        assert_eq!(kind(|a| a.rank = 0), RefusalKind::Duplicate);
        assert_eq!(kind(|a| a.restart_attempt = 0), RefusalKind::Stale);
        assert_eq!(kind(|a| a.restart_attempt = 2), RefusalKind::Ahead);
        assert_eq!(kind(|a| a.rank = 3), RefusalKind::Mismatch("rank".into()));
    }

    #[test]
    fn nodes_may_hold_different_numbers_of_ranks() {
        let mut roster = Roster::new(announcement(0), "m".into());
        let mut other = announcement(1);
        other.local_world_size = 2;
        assert!(matches!(roster.seat(0, other), Ok(Seated::Waiting)));
    }

    #[test]
    fn a_refusal_that_was_mended_does_not_last() {
        let mut roster = Roster::new(announcement(0), "m".into());
        let mut wrong = announcement(1);
        wrong.device = "gpu".into();
        roster.seat(1, wrong.clone()).expect_err("another device");
        assert!(roster.lasting_refusal().is_some());
        roster.seat(2, announcement(1)).expect("the right one");
        assert!(roster.lasting_refusal().is_none(), "{}", roster.missing());
        assert!(
            !roster.missing().contains("refused"),
            "{}",
            roster.missing()
        );
        // Somebody else's, once the rank is there.
        roster.seat(3, wrong).expect_err("another device");
        assert!(roster.lasting_refusal().is_none());
    }

    #[test]
    fn who_waits_in_vain_learns_who_is_missing_and_who_was_refused() {
        let mut roster = Roster::new(announcement(0), "m".into());
        roster.seat(0, announcement(0)).expect("the first");
        let mut other = announcement(2);
        other.device = "gpu".into();
        roster.seat(1, other).expect_err("another device");
        let text = roster.missing();
        assert!(
            text.contains("1 of 3") && text.contains("missing: 1-2"),
            "{text}"
        );
        assert!(text.contains("refused: rank 2"), "{text}");
        assert!(roster.lasting_refusal().is_some());
    }

    #[test]
    fn all_end_before_the_first_step_that_nobody_began() {
        let mut roster = Roster::new(announcement(0), "m".into());
        assert_eq!(roster.begin_step(0, false), (None, false));
        assert_eq!(roster.begin_step(1, false), (None, false));
        assert_eq!(
            roster.begin_step(1, true),
            (Some(2), true),
            "one has begun step 1"
        );
        assert_eq!(roster.begin_step(2, true), (Some(2), false));
    }
}
