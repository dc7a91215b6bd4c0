use super::Key;
use crate::rng::philox4x32;
use crate::test_support::{
    DTYPES, ODD_COLUMNS, Pitched, assert_close, assert_same_bits, assert_same_on_any_thread_count,
    oracle_gradients, stream, tolerance, var,
};
use crate::{DType, Indices, Result, Tensor, View, ViewMut};

// The operations, over slices of host memory.
fn forward(x: View<'_>, key: Key, rows: &[[u32; 2]], out: ViewMut<'_>) -> Result<()> {
    super::forward(x, key, &draws(rows), out)
}

fn backward(dy: View<'_>, key: Key, rows: &[[u32; 2]], dx: ViewMut<'_>) -> Result<()> {
    super::backward(dy, key, &draws(rows), dx)
}

fn add_masked(dx: ViewMut<'_>, d: View<'_>, key: Key, rows: &[[u32; 2]]) -> Result<()> {
    super::add_masked(dx, d, key, &draws(rows))
}

const STEP: u32 = 6;

fn draws(rows: &[[u32; 2]]) -> Indices<'static> {
    draws_at(rows, STEP)
}

fn draws_at(rows: &[[u32; 2]], step: u32) -> Indices<'static> {
    Indices::host([rows.as_flattened(), &[step]].concat())
}

const ROWS: usize = 5;
const KEY: Key = Key {
    seed: 0x0123_4567_89ab_cdef,
    p: 0.3,
};

fn tokens(count: usize) -> Vec<[u32; 2]> {
    let mut stream = stream(9);
    (0..count)
        .map(|_| [stream.bits() as u32, stream.bits() as u32])
        .collect()
}

/// The mask by its definition, one element at a time.
fn factors(key: Key, tokens: &[[u32; 2]], cols: usize) -> Vec<f32> {
    let factor = |[sequence, position]: [u32; 2], c: usize| {
        let words = philox4x32(
            [(c / 4) as u32, position, sequence, STEP],
            [key.seed as u32, (key.seed >> 32) as u32],
        );
        let kept = f64::from(words[c % 4]) >= f64::from(key.p) * 2.0_f64.powi(32);
        if kept {
            (1.0 / (1.0 - f64::from(key.p))) as f32
        } else {
            0.0
        }
    };
    let columns = |&token| (0..cols).map(move |c| factor(token, c));
    tokens.iter().flat_map(columns).collect()
}

#[test]
fn both_directions_follow_the_definition() {
    let tokens = tokens(ROWS);
    for (x_dtype, y_dtype) in DTYPES.into_iter().flat_map(|x| DTYPES.map(|y| (x, y))) {
        for cols in ODD_COLUMNS {
            let shape = [ROWS, cols];
            let x = Pitched::normal(1, shape, x_dtype);
            let mask = candle_core::Tensor::from_vec(
                factors(KEY, &tokens, cols),
                (ROWS, cols),
                &candle_core::Device::Cpu,
            );
            let (leaf, mask) = (var(&x.values(), &shape), mask.unwrap());
            let want = (leaf.as_tensor() * &mask).unwrap();
            let what = format!("{x_dtype} -> {y_dtype}, {cols} columns");

            let mut out = Pitched::zeros(shape, y_dtype);
            forward(x.view(), KEY, &tokens, out.view_mut()).unwrap();
            let want_values = crate::test_support::flat(&want);
            assert_close(&out.values(), &want_values, tolerance(y_dtype), &what);

            let dy = Pitched::normal(2, shape, x_dtype);
            let gradient = oracle_gradients(&want, &dy.values(), &[&leaf]);
            let mut dx = Pitched::zeros(shape, y_dtype);
            backward(dy.view(), KEY, &tokens, dx.view_mut()).unwrap();
            assert_close(&dx.values(), &gradient[0], tolerance(y_dtype), &what);

            let mut sum = Pitched::normal(3, shape, y_dtype);
            let want: Vec<f32> = sum
                .values()
                .iter()
                .zip(&gradient[0])
                .map(|(a, b)| a + b)
                .collect();
            add_masked(sum.view_mut(), dy.view(), KEY, &tokens).unwrap();
            assert_close(&sum.values(), &want, tolerance(y_dtype), &what);
        }
    }
}

#[test]
fn the_kept_share_is_one_minus_p_and_the_mean_stays() {
    let (rows, cols) = (500, 400);
    let ones = Tensor::from_f32(vec![1.0; rows * cols], rows, cols);
    let tokens = tokens(rows);
    for p in [0.05_f32, 0.1, 0.5, 0.9] {
        let mut out = Tensor::zeros(DType::F32, rows, cols);
        forward(ones.view(), Key { seed: 4, p }, &tokens, out.view_mut()).unwrap();
        let kept = out.to_f32_vec().iter().filter(|&&v| v != 0.0).count() as f64;
        let (n, keep) = ((rows * cols) as f64, 1.0 - f64::from(p));
        let deviations = (kept - n * keep) / (n * keep * (1.0 - keep)).sqrt();
        assert!(deviations.abs() < 4.0, "p = {p}: {kept} of {n} kept");
        let scale = (1.0 / keep) as f32;
        assert!(out.to_f32_vec().iter().all(|&v| v == 0.0 || v == scale));
    }
}

#[test]
fn probabilities_zero_and_one_are_exact() {
    let x = Pitched::normal(1, [3, 70], DType::F32);
    let mut out = Pitched::zeros([3, 70], DType::F32);
    forward(
        x.view(),
        Key { seed: 4, p: 0.0 },
        &tokens(3),
        out.view_mut(),
    )
    .unwrap();
    assert_same_bits(&out.values(), &x.values(), "p = 0");
    forward(
        x.view(),
        Key { seed: 4, p: 1.0 },
        &tokens(3),
        out.view_mut(),
    )
    .unwrap();
    assert!(out.values().iter().all(|&v| v == 0.0));
}

#[test]
fn the_mask_follows_the_token_wherever_its_row_is() {
    let (rows, cols) = (9, 123);
    let (x, tokens) = (Pitched::normal(1, [rows, cols], DType::F32), tokens(rows));
    let mut whole = Pitched::zeros([rows, cols], DType::F32);
    forward(x.view(), KEY, &tokens, whole.view_mut()).unwrap();
    for split in 0..=rows {
        let mut parts = Pitched::zeros([rows, cols], DType::F32);
        for range in [0..split, split..rows] {
            let part = parts.view_mut().row_range(range.clone());
            let x = x.view().row_range(range.clone());
            forward(x, KEY, &tokens[range], part).unwrap();
        }
        assert_same_bits(&parts.values(), &whole.values(), "split rows");
    }
    let last = tokens[rows - 1];
    let mut alone = Tensor::zeros(DType::F32, 1, cols);
    forward(
        x.view().row_range(rows - 1..rows),
        KEY,
        &[last],
        alone.view_mut(),
    )
    .unwrap();
    assert_same_bits(
        &alone.to_f32_vec(),
        &whole.values()[(rows - 1) * cols..],
        "row alone",
    );
}

#[test]
fn seed_step_sequence_and_position_each_change_the_mask() {
    let ones = Tensor::from_f32(vec![1.0; 256], 1, 256);
    let mask_at = |seed, token, step| {
        let mut out = Tensor::zeros(DType::F32, 1, 256);
        let (key, draws) = (Key { seed, p: 0.5 }, draws_at(&[token], step));
        super::forward(ones.view(), key, &draws, out.view_mut()).unwrap();
        out.to_f32_vec()
    };
    let mask = |seed, token| mask_at(seed, token, STEP);
    let base = mask(1, [2, 3]);
    let others = [
        mask(1 << 32 | 1, [2, 3]),
        mask(2, [2, 3]),
        mask(1, [3, 3]),
        mask(1, [2, 4]),
        mask(1, [3, 2]),
        mask_at(1, [2, 3], STEP + 1),
    ];
    for other in others {
        let same = base.iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!((80..176).contains(&same), "{same} of 256 elements agree");
    }
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let (shape, tokens) = ([600, 257], tokens(600));
    let x = Pitched::normal(1, shape, DType::F32);
    assert_same_on_any_thread_count(|| {
        let mut out = Pitched::zeros(shape, DType::F32);
        forward(x.view(), KEY, &tokens, out.view_mut()).unwrap();
        let mut sum = Pitched::normal(2, shape, DType::F32);
        add_masked(sum.view_mut(), x.view(), KEY, &tokens).unwrap();
        vec![out.values(), sum.values()]
    });
}

#[test]
fn no_rows_is_legal() {
    let (x, mut out) = (
        Tensor::zeros(DType::F32, 0, 4),
        Tensor::zeros(DType::F32, 0, 4),
    );
    forward(x.view(), KEY, &[], out.view_mut()).unwrap();
    add_masked(out.view_mut(), x.view(), KEY, &[]).unwrap();
}

#[test]
fn wrong_arguments_are_refused() {
    let (x, mut out) = (
        Tensor::zeros(DType::F32, 2, 4),
        Tensor::zeros(DType::F32, 2, 4),
    );
    let narrow = x.view().columns(0..3);
    assert!(forward(narrow, KEY, &tokens(2), out.view_mut()).is_err());
    assert!(forward(x.view(), KEY, &tokens(1), out.view_mut()).is_err());
    assert!(add_masked(out.view_mut(), narrow, KEY, &tokens(2)).is_err());
    for p in [-0.1, 1.1, f32::NAN] {
        let error = forward(x.view(), Key { seed: 1, p }, &tokens(2), out.view_mut()).unwrap_err();
        assert!(error.to_string().contains("expected 0 to 1"), "{error}");
    }
}
