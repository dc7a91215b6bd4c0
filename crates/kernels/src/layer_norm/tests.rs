use super::{Affine, Gradients, add_forward, apply, backward, forward};
use crate::test_support::{
    DTYPES, ODD_COLUMNS, Pitched, assert_close, assert_same_bits, assert_same_on_any_thread_count,
    flat, normal, oracle_gradients, tolerance, var,
};
use crate::{DType, Tensor, View, ViewMut};
use candle_nn::ops::layer_norm_slow;

const EPS: f32 = 1e-5;
const ROWS: usize = 5;

/// Weight and bias of `cols` columns.
fn parameters(cols: usize) -> [Vec<f32>; 2] {
    [normal(2, cols), normal(3, cols)]
}

fn affine([weight, bias]: &[Vec<f32>; 2]) -> Affine<'_> {
    Affine {
        weight: View::vector(weight),
        bias: View::vector(bias),
        eps: EPS,
    }
}

fn pairs(values: &mut [f32]) -> ViewMut<'_> {
    let rows = values.len() / 2;
    ViewMut::from_f32(values, rows, 2)
}

fn statistics_of(x: View<'_>, parameters: &[Vec<f32>; 2]) -> Vec<f32> {
    let mut statistics = vec![0.0; 2 * x.rows()];
    let mut y = Tensor::zeros(DType::F32, x.rows(), x.cols());
    forward(x, affine(parameters), y.view_mut(), pairs(&mut statistics)).unwrap();
    statistics
}

#[test]
fn forward_matches_candle() {
    for (x_dtype, y_dtype) in DTYPES.into_iter().flat_map(|x| DTYPES.map(|y| (x, y))) {
        // One column has no deviation: only eps is left under the root.
        for cols in ODD_COLUMNS {
            let shape = [ROWS, cols];
            let (x, parameters) = (Pitched::normal(1, shape, x_dtype), parameters(cols));
            let (mut y, mut statistics) = (Pitched::zeros(shape, y_dtype), vec![0.0; 2 * ROWS]);
            let target = pairs(&mut statistics);
            forward(x.view(), affine(&parameters), y.view_mut(), target).unwrap();
            let [weight, bias] = parameters.each_ref().map(|p| var(p, &[cols]));
            let want = layer_norm_slow(&var(&x.values(), &shape), &weight, &bias, EPS).unwrap();
            let what = format!("{x_dtype} -> {y_dtype}, {cols} columns");
            assert_close(&y.values(), &flat(&want), tolerance(y_dtype), &what);

            let mut repeated = Pitched::zeros(shape, y_dtype);
            let statistics = View::from_f32(&statistics, ROWS, 2);
            apply(
                x.view(),
                affine(&parameters),
                statistics,
                repeated.view_mut(),
            )
            .unwrap();
            assert_same_bits(&repeated.values(), &y.values(), &what);
        }
    }
}

#[test]
fn add_forward_is_the_sum_and_its_norm() {
    for dtype in DTYPES {
        let shape = [ROWS, 123];
        let (mut residual, branch) = (
            Pitched::normal(1, shape, dtype),
            Pitched::normal(4, shape, dtype),
        );
        let parameters = parameters(shape[1]);
        let sum: Vec<f32> = residual
            .values()
            .iter()
            .zip(branch.values())
            .map(|(a, b)| a + b)
            .collect();
        let sum = Pitched::new(&sum, shape, dtype);
        let (mut want, mut want_statistics) = (Pitched::zeros(shape, dtype), vec![0.0; 2 * ROWS]);
        let target = pairs(&mut want_statistics);
        forward(sum.view(), affine(&parameters), want.view_mut(), target).unwrap();

        let (mut y, mut statistics) = (Pitched::zeros(shape, dtype), vec![0.0; 2 * ROWS]);
        add_forward(
            residual.view_mut(),
            branch.view(),
            affine(&parameters),
            y.view_mut(),
            pairs(&mut statistics),
        )
        .unwrap();
        assert_same_bits(&residual.values(), &sum.values(), "residual");
        assert_same_bits(&y.values(), &want.values(), "y");
        assert_same_bits(&statistics, &want_statistics, "statistics");
    }
}

#[test]
fn backward_matches_candle_autograd_and_adds() {
    for (dtype, cols) in DTYPES.into_iter().flat_map(|d| ODD_COLUMNS.map(|c| (d, c))) {
        let (shape, parameters) = ([ROWS, cols], parameters(cols));
        let (x, dy) = (
            Pitched::normal(1, shape, dtype),
            Pitched::normal(4, shape, dtype),
        );
        let statistics = statistics_of(x.view(), &parameters);
        let before = Pitched::normal(5, shape, dtype).values();
        let (mut d_weight, mut d_bias) = (normal(6, cols), normal(7, cols));

        let leaf = var(&x.values(), &shape);
        let [weight, bias] = parameters.each_ref().map(|p| var(p, &[cols]));
        let y = layer_norm_slow(&leaf, &weight, &bias, EPS).unwrap();
        let gradients = oracle_gradients(&y, &dy.values(), &[&leaf, &weight, &bias]);
        let sum =
            |a: &[f32], b: &[f32]| -> Vec<f32> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
        let want = [
            sum(&before, &gradients[0]),
            sum(&d_weight, &gradients[1]),
            sum(&d_bias, &gradients[2]),
        ];

        let mut dx = Pitched::new(&before, shape, dtype);
        let mut frozen_dx = Pitched::new(&before, shape, dtype);
        let statistics = View::from_f32(&statistics, ROWS, 2);
        let weight = affine(&parameters).weight;
        let trained = Gradients {
            weight: Some(ViewMut::vector(&mut d_weight)),
            bias: Some(ViewMut::vector(&mut d_bias)),
        };
        backward(
            dy.view(),
            x.view(),
            weight,
            statistics,
            dx.view_mut(),
            trained,
        )
        .unwrap();
        backward(
            dy.view(),
            x.view(),
            weight,
            statistics,
            frozen_dx.view_mut(),
            Gradients::default(),
        )
        .unwrap();
        let what = format!("{dtype}, {cols} columns");
        // rstd is 316 for a single column, and multiplies the roundings of what cancels.
        let dx_tolerance = if cols == 1 {
            1e-4_f64.max(tolerance(dtype))
        } else {
            tolerance(dtype)
        };
        assert_close(&dx.values(), &want[0], dx_tolerance, &format!("dx, {what}"));
        assert_same_bits(&frozen_dx.values(), &dx.values(), "frozen parameters");
        // The parameters' gradients are f32 whatever the data is.
        let tolerance = tolerance(DType::F32);
        assert_close(&d_weight, &want[1], tolerance, &format!("d_weight, {what}"));
        assert_close(&d_bias, &want[2], tolerance, &format!("d_bias, {what}"));
    }
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let shape = [600, 257];
    let parameters = parameters(shape[1]);
    assert_same_on_any_thread_count(|| {
        let (x, dy) = (
            Pitched::normal(1, shape, DType::F32),
            Pitched::normal(4, shape, DType::F32),
        );
        let statistics = statistics_of(x.view(), &parameters);
        let mut dx = Pitched::zeros(shape, DType::F32);
        let (mut d_weight, mut d_bias) = (vec![0.0; shape[1]], vec![0.0; shape[1]]);
        let gradients = Gradients {
            weight: Some(ViewMut::vector(&mut d_weight)),
            bias: Some(ViewMut::vector(&mut d_bias)),
        };
        let rows = View::from_f32(&statistics, shape[0], 2);
        let weight = affine(&parameters).weight;
        backward(dy.view(), x.view(), weight, rows, dx.view_mut(), gradients).unwrap();
        vec![dx.values(), statistics, d_weight, d_bias]
    });
}

#[test]
fn wrong_shapes_are_refused() {
    let (x, parameters) = (Tensor::zeros(DType::F32, 2, 4), parameters(4));
    let mut y = Tensor::zeros(DType::F32, 2, 4);
    let mut statistics = vec![0.0; 4];
    let short = parameters.each_ref().map(|p| p[1..].to_vec());
    let mut refused = |affine: Affine<'_>, statistics: ViewMut<'_>| {
        let result = forward(x.view(), affine, y.view_mut(), statistics);
        result.unwrap_err().to_string()
    };
    assert!(refused(affine(&short), pairs(&mut statistics)).contains("weight is [1, 3]"));
    assert!(refused(affine(&parameters), pairs(&mut statistics[..2])).contains("statistics is"));
}
