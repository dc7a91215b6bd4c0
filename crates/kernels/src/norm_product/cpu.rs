/// Norms of the rows of `a` and of the columns of `b`, for each of `rank`.
fn norms(a: &[f32], b: &[f32], rank: usize) -> Vec<[f64; 2]> {
    let inputs = a.len() / rank.max(1);
    let norm = |squares: f64| squares.sqrt();
    let square = |v: &f32| f64::from(*v) * f64::from(*v);
    (0..rank)
        .map(|k| {
            let row = a[k * inputs..(k + 1) * inputs].iter();
            let column = b.iter().skip(k).step_by(rank);
            [norm(row.map(square).sum()), norm(column.map(square).sum())]
        })
        .collect()
}

fn inverse_of(norms: [f64; 2], least: f32) -> f64 {
    let [a, b] = norms.map(|norm| norm.max(f64::from(least)));
    1.0 / (a * b)
}

pub(super) fn inverse(out: &mut [f32], a: &[f32], b: &[f32], least: f32) {
    let norms = norms(a, b, out.len());
    for (out, norms) in out.iter_mut().zip(norms) {
        *out = inverse_of(norms, least) as f32;
    }
}

pub(super) fn add_inverse_gradients(
    [d_a, d_b]: [&mut [f32]; 2],
    d: &[f32],
    [a, b]: [&[f32]; 2],
    least: f32,
) {
    let rank = d.len();
    let inputs = a.len() / rank.max(1);
    for (k, norms) in norms(a, b, rank).into_iter().enumerate() {
        let along = f64::from(d[k]) * inverse_of(norms, least);
        let [of_a, of_b] = norms.map(|norm| match norm > f64::from(least) {
            true => (along / (norm * norm)) as f32,
            false => 0.0,
        });
        let row = k * inputs..(k + 1) * inputs;
        for (to, a) in d_a[row.clone()].iter_mut().zip(&a[row]) {
            *to -= of_a * a;
        }
        let column = d_b.iter_mut().zip(b).skip(k).step_by(rank);
        column.for_each(|(to, b)| *to -= of_b * b);
    }
}
