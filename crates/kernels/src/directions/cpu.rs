type Vector = Vec<f64>;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `to += factor from`.
fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

/// v_i of a column, its norm, and what was taken out of it along each of `before`.
struct Made {
    v: Vector,
    norm: f64,
    along: Vec<f64>,
}

fn made(vectors: &[f32], rank: usize, i: usize, before: &[Vector]) -> Made {
    let mut v: Vector = vectors
        .iter()
        .skip(i)
        .step_by(rank)
        .map(|u| f64::from(*u))
        .collect();
    let take_out = |q: &Vector| {
        let along = dot(q, &v);
        add(&mut v, -along, q);
        along
    };
    let along = before.iter().map(take_out).collect();
    let norm = dot(&v, &v).sqrt();
    Made { v, norm, along }
}

/// The directions, and what made them.
fn all(vectors: &[f32], rank: usize, orthogonal: bool) -> (Vec<Vector>, Vec<Made>) {
    let (mut directions, mut all): (Vec<Vector>, Vec<Made>) = (Vec::new(), Vec::new());
    for i in 0..rank {
        let before = if orthogonal { &directions[..] } else { &[] };
        let of = made(vectors, rank, i, before);
        directions.push(of.v.iter().map(|v| v / of.norm).collect());
        all.push(of);
    }
    (directions, all)
}

pub(super) fn forward(out: &mut [f32], vectors: &[f32], [n, rank]: [usize; 2], orthogonal: bool) {
    let (directions, _) = all(vectors, rank, orthogonal);
    for (out, direction) in out.chunks_exact_mut(n.max(1)).zip(&directions) {
        out.iter_mut()
            .zip(direction)
            .for_each(|(out, q)| *out = *q as f32);
    }
}

pub(super) fn add_gradient(
    d_vectors: &mut [f32],
    d: &[f32],
    vectors: &[f32],
    [n, rank]: [usize; 2],
    orthogonal: bool,
) {
    let (directions, made) = all(vectors, rank, orthogonal);
    let rows = d.chunks_exact(n.max(1));
    let mut d: Vec<Vector> = rows
        .map(|row| row.iter().map(|d| f64::from(*d)).collect())
        .collect();
    for (i, Made { mut v, norm, along }) in made.into_iter().enumerate().rev() {
        let q = &directions[i];
        let through = dot(q, &d[i]);
        let terms = d[i].iter().zip(q);
        let mut d_v: Vector = terms.map(|(d, q)| (d - through * q) / norm).collect();
        // v_{j+1} = v_j - (q_j . v_j) q_j, from the last j to the first.
        for (j, along) in along.iter().enumerate().rev() {
            let q = &directions[j];
            add(&mut v, *along, q);
            let back = dot(&d_v, q);
            add(&mut d[j], -back, &v);
            add(&mut d[j], -along, &d_v);
            add(&mut d_v, -back, q);
        }
        let column = d_vectors.iter_mut().skip(i).step_by(rank);
        column.zip(&d_v).for_each(|(to, d)| *to += *d as f32);
    }
}
