use super::add;
use crate::rng::philox4x32;
use crate::test_support::{
    DTYPES, ODD_COLUMNS, Pitched, assert_close, assert_same_on_any_thread_count, stream, tolerance,
};
use crate::{Indices, Tensor};

const ROWS: usize = 5;
const SEED: u64 = 0x0123_4567_89ab_cdef;
const STEP: u32 = 6;

/// Sequence and position of every row, and the step.
fn rows() -> Vec<u32> {
    let mut stream = stream(9);
    let mut rows: Vec<u32> = (0..2 * ROWS).map(|_| stream.bits() as u32).collect();
    rows.push(STEP);
    rows
}

fn scales() -> Vec<u32> {
    [0.5, 0.0, 1e-3, 7.0, 1.0_f32].map(f32::to_bits).to_vec()
}

/// The noise by its definition, one element at a time.
fn noise(cols: usize) -> Vec<f32> {
    let (rows, scales) = (rows(), scales());
    let at = |t: usize, c: usize| {
        let words = philox4x32(
            [(c / 4) as u32, rows[2 * t + 1], rows[2 * t], STEP],
            [SEED as u32, (SEED >> 32) as u32],
        );
        let uniform = f64::from(words[c % 4]) / 2.0_f64.powi(31) - 1.0;
        (uniform * f64::from(f32::from_bits(scales[t]))) as f32
    };
    (0..ROWS)
        .flat_map(|t| (0..cols).map(move |c| (t, c)))
        .map(|(t, c)| at(t, c))
        .collect()
}

#[test]
fn follows_the_definition() {
    for dtype in DTYPES {
        for cols in ODD_COLUMNS {
            let shape = [ROWS, cols];
            let mut x = Pitched::normal(1, shape, dtype);
            let want: Vec<f32> = x
                .values()
                .iter()
                .zip(noise(cols))
                .map(|(x, n)| x + n)
                .collect();
            add(
                x.view_mut(),
                SEED,
                &Indices::host(rows()),
                &Indices::host(scales()),
            )
            .unwrap();
            assert_close(
                &x.values(),
                &want,
                tolerance(dtype),
                &format!("{dtype}, {cols} columns"),
            );
        }
    }
}

#[test]
fn is_spread_evenly_and_never_beyond_its_scale() {
    let cols = 4096;
    let mut x = Tensor::from_f32(vec![0.0; ROWS * cols], ROWS, cols);
    let (rows, scales) = (Indices::host(rows()), Indices::host(scales()));
    add(x.view_mut(), SEED, &rows, &scales).unwrap();
    let noise = x.to_f32_vec();
    let unit = &noise[4 * cols..];
    assert!(unit.iter().all(|u| (-1.0..=1.0).contains(u)));
    let mean = |f: fn(f64) -> f64| unit.iter().map(|u| f(f64::from(*u))).sum::<f64>() / cols as f64;
    // A uniform number of [-1, 1] has mean 0 and variance 1/3; five standard errors.
    assert!(mean(|u| u).abs() < 5.0 * (1.0 / 3.0 / cols as f64).sqrt());
    assert!((mean(|u| u * u) - 1.0 / 3.0).abs() < 0.03);
    assert!(
        noise[cols..2 * cols].iter().all(|n| *n == 0.0),
        "a scale of 0 adds nothing"
    );
}

#[test]
fn is_the_same_on_any_thread_count() {
    assert_same_on_any_thread_count(|| {
        let mut x = Tensor::from_f32(vec![0.25; ROWS * 4097], ROWS, 4097);
        add(
            x.view_mut(),
            SEED,
            &Indices::host(rows()),
            &Indices::host(scales()),
        )
        .unwrap();
        vec![x.to_f32_vec()]
    });
}

#[test]
fn no_rows_are_legal_and_wrong_lengths_are_not() {
    let mut none = Tensor::from_f32(Vec::new(), 0, 8);
    add(
        none.view_mut(),
        SEED,
        &Indices::host(vec![STEP]),
        &Indices::host(Vec::new()),
    )
    .unwrap();
    let mut one = Tensor::from_f32(vec![0.0; 8], 1, 8);
    let (rows, none) = (Indices::host(vec![0, 0, STEP]), Indices::host(Vec::new()));
    let error = add(one.view_mut(), SEED, &rows, &none).unwrap_err();
    assert!(error.to_string().contains("scales"), "{error}");
}
