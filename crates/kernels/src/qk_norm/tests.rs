use super::{Norm, backward_in_place, forward};
use crate::test_support::{
    DTYPES, Pitched, assert_close, assert_same_on_any_thread_count, flat, normal, oracle_gradients,
    tolerance, var,
};
use crate::{DType, Tensor, View, Workspace};
use candle_core::{D, Var};
use candle_nn::rotary_emb::rope_slow;

const EPS: f32 = 1e-5;

/// Rows, heads, head_dim, rotary_dim: whole, partial and no rotation, odd halves.
const SHAPES: [[usize; 4]; 6] = [
    [1, 1, 2, 2],
    [5, 3, 6, 6],
    [4, 2, 64, 64],
    [7, 1, 41, 26],
    [3, 5, 80, 20],
    [2, 2, 123, 0],
];

/// What a norm is made of, in host memory.
struct Parts {
    weight: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    rows: usize,
}

impl Parts {
    fn new([rows, _, head_dim, rotary]: [usize; 4]) -> Self {
        // Arbitrary angles: a scale may be folded into them.
        let (cos, sin) = (normal(11, rows * rotary / 2), normal(12, rows * rotary / 2));
        Self {
            weight: normal(13, head_dim),
            cos,
            sin,
            rows,
        }
    }

    fn norm(&self, offset: f32) -> Norm<'_> {
        let half = self.cos.len() / self.rows;
        Norm {
            weight: View::vector(&self.weight),
            offset,
            eps: EPS,
            cos: View::from_f32(&self.cos, self.rows, half),
            sin: View::from_f32(&self.sin, self.rows, half),
        }
    }
}

/// The same of `x [T, heads * head_dim]` in candle's operations.
fn oracle(
    x: &Var,
    weight: &Var,
    offset: f32,
    parts: &Parts,
    [rows, heads, head_dim, rotary]: [usize; 4],
) -> candle_core::Tensor {
    let angles = |values: &[f32]| var(values, &[rows, rotary / 2]);
    let (cos, sin) = (angles(&parts.cos), angles(&parts.sin));
    let normed_and_rotated = || {
        let x = x.reshape((1, rows, heads, head_dim))?.transpose(1, 2)?;
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let y = x.broadcast_div(&(mean_square + f64::from(EPS))?.sqrt()?)?;
        let y = y.broadcast_mul(&(weight.as_tensor() + f64::from(offset))?)?;
        let turned = y.narrow(D::Minus1, 0, rotary)?.contiguous()?;
        let turned = match rotary {
            0 => turned,
            _ => rope_slow(&turned, cos.as_tensor(), sin.as_tensor())?,
        };
        let rest = y.narrow(D::Minus1, rotary, head_dim - rotary)?;
        let both = candle_core::Tensor::cat(&[&turned, &rest.contiguous()?], D::Minus1)?;
        both.transpose(1, 2)?
            .contiguous()?
            .reshape((rows, heads * head_dim))
    };
    normed_and_rotated().unwrap()
}

#[test]
fn both_directions_match_candle() {
    for shape in SHAPES {
        for (x_dtype, y_dtype) in DTYPES.into_iter().flat_map(|x| DTYPES.map(|y| (x, y))) {
            for offset in [0.0, 1.0] {
                check_against_candle(shape, [x_dtype, y_dtype], offset);
            }
        }
    }
}

fn check_against_candle(shape: [usize; 4], [x_dtype, y_dtype]: [DType; 2], offset: f32) {
    let [rows, heads, head_dim, _] = shape;
    let (parts, matrix) = (Parts::new(shape), [rows, heads * head_dim]);
    let x = Pitched::normal(1, matrix, x_dtype);
    let mut d = Pitched::normal(2, matrix, y_dtype);
    let (leaf, weight) = (var(&x.values(), &matrix), var(&parts.weight, &[head_dim]));
    let want = oracle(&leaf, &weight, offset, &parts, shape);
    let gradients = oracle_gradients(&want, &d.values(), &[&leaf, &weight]);
    let what = format!("{shape:?}, x {x_dtype}, out {y_dtype}, offset {offset}");

    let mut out = Pitched::zeros(matrix, y_dtype);
    forward(x.view(), &parts.norm(offset), out.view_mut()).unwrap();
    assert_close(&out.values(), &flat(&want), tolerance(y_dtype), &what);

    let before = normal(3, head_dim);
    let mut d_weight = Tensor::from_f32(before.clone(), 1, head_dim);
    let (norm, workspace) = (parts.norm(offset), Workspace::new(0));
    let to = Some(d_weight.view_mut());
    backward_in_place(d.view_mut(), x.view(), &norm, to, &workspace).unwrap();
    assert_close(&d.values(), &gradients[0], 4.0 * tolerance(y_dtype), &what);
    let d_weight = d_weight.to_f32_vec();
    let added: Vec<f32> = d_weight.iter().zip(&before).map(|(a, b)| a - b).collect();
    // Two sums of some dozen terms that cancel, and a difference.
    assert_close(&added, &gradients[1], 1e-5, &what);
}

#[test]
fn a_frozen_weight_changes_nothing_else() {
    let shape = [7, 3, 10, 6];
    let parts = Parts::new(shape);
    let x = Pitched::normal(1, [7, 30], DType::F32);
    let [with, without] = [true, false].map(|trained| {
        let mut d = Pitched::normal(2, [7, 30], DType::F32);
        let mut d_weight = Tensor::zeros(DType::F32, 1, 10);
        let to = trained.then(|| d_weight.view_mut());
        let workspace = Workspace::new(0);
        backward_in_place(d.view_mut(), x.view(), &parts.norm(0.0), to, &workspace).unwrap();
        d.values()
    });
    assert_eq!(with, without);
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let shape = [600, 4, 64, 64];
    let parts = Parts::new(shape);
    let x = Pitched::normal(1, [600, 256], DType::F32);
    assert_same_on_any_thread_count(|| {
        let mut out = Pitched::zeros([600, 256], DType::F32);
        forward(x.view(), &parts.norm(1.0), out.view_mut()).unwrap();
        let mut d = Pitched::normal(2, [600, 256], DType::F32);
        let mut d_weight = Tensor::zeros(DType::F32, 1, 64);
        let (norm, to) = (parts.norm(1.0), Some(d_weight.view_mut()));
        backward_in_place(d.view_mut(), x.view(), &norm, to, &Workspace::new(0)).unwrap();
        vec![out.values(), d.values(), d_weight.to_f32_vec()]
    });
}

#[test]
fn wrong_shapes_are_refused() {
    let parts = Parts::new([2, 2, 4, 4]);
    let (x, mut out) = (
        Tensor::zeros(DType::F32, 2, 8),
        Tensor::zeros(DType::F32, 2, 8),
    );
    let mut refused = |norm: &Norm<'_>| {
        let refused = forward(x.view(), norm, out.view_mut());
        refused.unwrap_err().to_string()
    };
    let whole = parts.norm(0.0);
    let weight = View::vector(&parts.weight[..3]);
    assert_eq!(
        refused(&Norm { weight, ..whole }),
        "qk_norm::forward: x has 8 columns, expected a multiple of the 3 weights (above 0)"
    );
    let cos = View::from_f32(&parts.cos, 1, 4);
    assert!(refused(&Norm { cos, ..whole }).contains("at most half of 4"));
    let sin = View::from_f32(&parts.sin, 1, 4);
    assert!(refused(&Norm { sin, ..whole }).contains("sin is [1, 4]"));
    let narrow = Tensor::zeros(DType::F32, 2, 4);
    let workspace = Workspace::new(0);
    assert!(backward_in_place(out.view_mut(), narrow.view(), &whole, None, &workspace).is_err());
}
