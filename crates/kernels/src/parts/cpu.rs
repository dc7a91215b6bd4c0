use super::{Blocks, Rows};
use crate::rng::Stream;

pub(super) fn rows(out: &mut [f32], mut draws: Stream, of: Rows) {
    let mut stays = |p: f64| draws.uniform() >= p;
    let module = stays(of.module);
    for factor in out.iter_mut() {
        *factor = f32::from(u8::from(module && stays(of.rows)));
    }
    let count = out.iter().filter(|factor| **factor > 0.0).count();
    if of.scaled && count > 0 {
        let factor = out.len() as f32 / count as f32;
        out.iter_mut().for_each(|stays| *stays *= factor);
    }
}

pub(super) fn blocks(out: &mut [f32], mut draws: Stream, of: Blocks) {
    out.fill(1.0);
    let chosen = match of.groups {
        1 => 0,
        several => (draws.uniform() * several as f64) as usize,
    };
    if chosen == of.group {
        out[..of.left_out].fill(0.0);
        draws.shuffle(out);
    }
}
