/// Writes the direction over `gram`, `[rank, rank]`; the distance.
pub(super) fn direction(gram: &mut [f32], rank: usize) -> f32 {
    let on_diagonal = gram.iter_mut().step_by(rank + 1);
    on_diagonal
        .filter(|square| **square > 0.0)
        .for_each(|square| *square -= 1.0);
    let squares = gram.iter().map(|&v| f64::from(v) * f64::from(v));
    let distance = squares.sum::<f64>().sqrt();
    let inverse = if distance > 0.0 { 1.0 / distance } else { 0.0 };
    for value in gram {
        *value = (f64::from(*value) * inverse) as f32;
    }
    distance as f32
}
