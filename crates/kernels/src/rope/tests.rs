use super::Direction;
use super::Direction::{Backward, Forward};
use crate::test_support::{
    DTYPES, Pitched, assert_close, assert_same_bits, assert_same_on_any_thread_count, flat, normal,
    oracle_gradients, tolerance, var,
};
use crate::{DType, Result, Tensor, View, ViewMut};
use candle_core::{D, Var};
use candle_nn::rotary_emb::rope_slow;

// The operations, over slices of host memory.
fn apply(
    x: ViewMut<'_>,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
    rotary_dim: usize,
    direction: Direction,
) -> Result<()> {
    let (rows, half) = (x.rows(), rotary_dim / 2);
    let (cos, sin) = (table(cos, rows, half), table(sin, rows, half));
    super::apply(x, head_dim, cos, sin, rotary_dim, direction)
}

/// `[rows, half]`, or one row of what has another length.
fn table(values: &[f32], rows: usize, half: usize) -> View<'_> {
    if values.len() == rows * half {
        View::from_f32(values, rows, half)
    } else {
        View::vector(values)
    }
}

/// Rows, heads, head_dim, rotary_dim: whole and partial rotation, odd halves.
const SHAPES: [[usize; 4]; 6] = [
    [1, 1, 2, 2],
    [5, 3, 6, 6],
    [4, 2, 64, 64],
    [7, 1, 41, 26],
    [3, 5, 80, 20],
    [2, 2, 257, 256],
];

/// Arbitrary values, not the cosine and sine of anything: a scale may be folded into them.
fn angles(rows: usize, rotary_dim: usize) -> (Vec<f32>, Vec<f32>) {
    let len = rows * rotary_dim / 2;
    (normal(11, len), normal(12, len))
}

/// candle's rotation of `x [T, heads * head_dim]`, in that layout.
fn oracle(x: &Var, [rows, heads, head_dim, rotary]: [usize; 4]) -> candle_core::Tensor {
    let (cos, sin) = angles(rows, rotary);
    let (cos, sin) = (
        var(&cos, &[rows, rotary / 2]),
        var(&sin, &[rows, rotary / 2]),
    );
    let rotated = || {
        let heads_first = x.reshape((1, rows, heads, head_dim))?.transpose(1, 2)?;
        let turned = heads_first.narrow(D::Minus1, 0, rotary)?.contiguous()?;
        let turned = rope_slow(&turned, cos.as_tensor(), sin.as_tensor())?;
        let rest = heads_first.narrow(D::Minus1, rotary, head_dim - rotary)?;
        let both = candle_core::Tensor::cat(&[&turned, &rest.contiguous()?], D::Minus1)?;
        both.transpose(1, 2)?
            .contiguous()?
            .reshape((rows, heads * head_dim))
    };
    rotated().unwrap()
}

fn rotate(x: &mut Pitched, [rows, _, head_dim, rotary]: [usize; 4], direction: Direction) {
    let (cos, sin) = angles(rows, rotary);
    apply(x.view_mut(), head_dim, &cos, &sin, rotary, direction).unwrap();
}

#[test]
fn both_directions_match_candle() {
    for (dtype, shape) in DTYPES.into_iter().flat_map(|d| SHAPES.map(|s| (d, s))) {
        let matrix = [shape[0], shape[1] * shape[2]];
        let (mut x, mut dy) = (
            Pitched::normal(1, matrix, dtype),
            Pitched::normal(2, matrix, dtype),
        );
        let leaf = var(&x.values(), &matrix);
        let y = oracle(&leaf, shape);
        let gradient = oracle_gradients(&y, &dy.values(), &[&leaf]);
        rotate(&mut x, shape, Forward);
        assert_close(
            &x.values(),
            &flat(&y),
            tolerance(dtype),
            &format!("{dtype} {shape:?}"),
        );
        rotate(&mut dy, shape, Backward);
        let what = format!("gradient, {dtype} {shape:?}");
        assert_close(&dy.values(), &gradient[0], tolerance(dtype), &what);
    }
}

#[test]
fn backward_is_the_transpose() {
    let inner = |a: &[f32], b: &[f32]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(&a, &b)| f64::from(a) * f64::from(b))
            .sum()
    };
    for shape in SHAPES {
        let matrix = [shape[0], shape[1] * shape[2]];
        let x = Pitched::normal(1, matrix, DType::F32);
        let y = Pitched::normal(2, matrix, DType::F32);
        let mut turned = Pitched::new(&x.values(), matrix, DType::F32);
        rotate(&mut turned, shape, Forward);
        let mut turned_back = Pitched::new(&y.values(), matrix, DType::F32);
        rotate(&mut turned_back, shape, Backward);
        let (left, right) = (
            inner(&turned.values(), &y.values()),
            inner(&x.values(), &turned_back.values()),
        );
        let size = inner(&x.values(), &x.values());
        assert!(
            (left - right).abs() < 1e-6 * size,
            "{shape:?}: {left} and {right}"
        );
    }
}

#[test]
fn elements_after_the_rotary_part_keep_their_bits() {
    let shape = [3, 2, 10, 4];
    let x = Pitched::normal(1, [3, 20], DType::F32);
    for direction in [Forward, Backward] {
        let mut turned = Pitched::new(&x.values(), [3, 20], DType::F32);
        rotate(&mut turned, shape, direction);
        for (after, before) in turned.values().chunks(10).zip(x.values().chunks(10)) {
            assert_same_bits(&after[4..], &before[4..], "pass-through");
            assert!(
                after[..4]
                    .iter()
                    .zip(before)
                    .all(|(after, before)| after != before)
            );
        }
    }
    let mut same = Pitched::new(&x.values(), [3, 20], DType::F32);
    apply(same.view_mut(), 10, &[], &[], 0, Forward).unwrap();
    assert_same_bits(&same.values(), &x.values(), "rotary_dim = 0");
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let shape = [600, 4, 64, 64];
    assert_same_on_any_thread_count(|| {
        let mut x = Pitched::normal(1, [600, 256], DType::F32);
        rotate(&mut x, shape, Forward);
        vec![x.values()]
    });
}

#[test]
fn no_rows_is_legal() {
    let mut x = Tensor::zeros(DType::Bf16, 0, 8);
    apply(x.view_mut(), 4, &[], &[], 4, Forward).unwrap();
}

#[test]
fn wrong_shapes_are_refused() {
    let mut x = Tensor::zeros(DType::F32, 2, 8);
    let half = [0.0; 4];
    let mut refused = |head_dim, cos: &[f32], sin: &[f32], rotary_dim| {
        let result = apply(x.view_mut(), head_dim, cos, sin, rotary_dim, Forward);
        result.unwrap_err().to_string()
    };
    assert_eq!(
        refused(3, &half, &half, 2),
        "rope::apply: x has 8 columns, expected a multiple of head_dim = 3 (above 0)"
    );
    assert!(refused(0, &half, &half, 0).contains("above 0"));
    assert!(refused(4, &half, &half, 3).contains("even"));
    assert!(refused(4, &half, &half, 6).contains("up to head_dim = 4"));
    assert!(
        refused(4, &half[1..], &half, 4).contains("cos is [1, 3] [rows, columns], expected [2, 2]")
    );
    assert!(
        refused(4, &half, &half[1..], 4).contains("sin is [1, 3] [rows, columns], expected [2, 2]")
    );
}
