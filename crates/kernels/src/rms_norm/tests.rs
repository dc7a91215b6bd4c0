use super::Weight;
use crate::test_support::{
    DTYPES, ODD_COLUMNS, Pitched, assert_close, assert_same_bits, assert_same_on_any_thread_count,
    flat, normal, oracle_gradients, tolerance, var,
};
use crate::{DType, Result, Tensor, View, ViewMut};
use candle_nn::ops::rms_norm_slow;

// The operations, over slices of host memory.
fn forward(x: View<'_>, weight: &[f32], eps: f32, y: ViewMut<'_>, rstd: &mut [f32]) -> Result<()> {
    super::forward(x, View::vector(weight), eps, y, column_mut(rstd))
}

fn add_forward(
    residual: ViewMut<'_>,
    branch: View<'_>,
    weight: &[f32],
    eps: f32,
    y: ViewMut<'_>,
    rstd: &mut [f32],
) -> Result<()> {
    super::add_forward(
        residual,
        branch,
        View::vector(weight),
        eps,
        y,
        column_mut(rstd),
    )
}

fn apply(x: View<'_>, weight: &[f32], rstd: &[f32], y: ViewMut<'_>) -> Result<()> {
    super::apply(x, View::vector(weight), column(rstd), y)
}

fn backward(
    dy: View<'_>,
    x: View<'_>,
    weight: &[f32],
    rstd: &[f32],
    dx: ViewMut<'_>,
    d_weight: Option<&mut [f32]>,
) -> Result<()> {
    let d_weight = d_weight.map(ViewMut::vector);
    super::backward(dy, x, View::vector(weight), column(rstd), dx, d_weight)
}

/// `ROWS` rows.
fn matrix_mut(values: &mut [f32]) -> ViewMut<'_> {
    let cols = values.len() / ROWS;
    ViewMut::from_f32(values, ROWS, cols)
}

fn column(values: &[f32]) -> View<'_> {
    View::from_f32(values, values.len(), 1)
}

fn column_mut(values: &mut [f32]) -> ViewMut<'_> {
    let rows = values.len();
    ViewMut::from_f32(values, rows, 1)
}

const EPS: f32 = 1e-5;
const ROWS: usize = 5;

#[test]
fn forward_matches_candle() {
    for x_dtype in DTYPES {
        for (y_dtype, cols) in DTYPES.into_iter().flat_map(|d| ODD_COLUMNS.map(|c| (d, c))) {
            let shape = [ROWS, cols];
            let (x, weight) = (Pitched::normal(1, shape, x_dtype), normal(2, cols));
            let (mut y, mut rstd) = (Pitched::zeros(shape, y_dtype), vec![0.0; ROWS]);
            forward(x.view(), &weight, EPS, y.view_mut(), &mut rstd).unwrap();
            let oracle = rms_norm_slow(&var(&x.values(), &shape), &var(&weight, &[cols]), EPS);
            let what = format!("{x_dtype} -> {y_dtype}, {cols} columns");
            assert_close(
                &y.values(),
                &flat(&oracle.unwrap()),
                tolerance(y_dtype),
                &what,
            );
            for (row, rstd) in x.values().chunks(cols).zip(rstd) {
                let squares: f64 = row.iter().map(|&v| f64::from(v).powi(2)).sum();
                let want = (squares / cols as f64 + f64::from(EPS)).sqrt().recip();
                assert!((f64::from(rstd) / want - 1.0).abs() < 1e-6, "{what}: rstd");
            }
        }
    }
}

#[test]
fn backward_matches_candle_autograd_and_adds() {
    for (dtype, cols) in DTYPES.into_iter().flat_map(|d| ODD_COLUMNS.map(|c| (d, c))) {
        let shape = [ROWS, cols];
        let (x, dy) = (
            Pitched::normal(1, shape, dtype),
            Pitched::normal(2, shape, dtype),
        );
        let weight = normal(3, cols);
        let rstd = rstd_of(x.view(), &weight);
        let mut dx = Pitched::normal(4, shape, dtype);
        let mut d_weight = normal(5, cols);

        let (x_leaf, weight_leaf) = (var(&x.values(), &shape), var(&weight, &[cols]));
        let y = rms_norm_slow(&x_leaf, &weight_leaf, EPS).unwrap();
        let want = oracle_gradients(&y, &dy.values(), &[&x_leaf, &weight_leaf]);
        let (want_dx, want_dw) = (sum(&dx.values(), &want[0]), sum(&d_weight, &want[1]));

        let mut frozen_dx = Pitched::new(&dx.values(), shape, dtype);
        let gradient = Some(d_weight.as_mut_slice());
        backward(dy.view(), x.view(), &weight, &rstd, dx.view_mut(), gradient).unwrap();
        assert_close(
            &dx.values(),
            &want_dx,
            tolerance(dtype),
            &format!("{dtype} dx, {cols}"),
        );
        // d_weight is f32 whatever the data is.
        let tolerance = tolerance(DType::F32);
        assert_close(
            &d_weight,
            &want_dw,
            tolerance,
            &format!("{dtype} d_weight, {cols}"),
        );

        backward(
            dy.view(),
            x.view(),
            &weight,
            &rstd,
            frozen_dx.view_mut(),
            None,
        )
        .unwrap();
        assert_same_bits(
            &frozen_dx.values(),
            &dx.values(),
            "dx under a frozen weight",
        );
    }
}

#[test]
fn backward_takes_every_mix_of_dtypes() {
    let shape = [ROWS, 123];
    let (x, dy, weight) = (normal(1, ROWS * 123), normal(2, ROWS * 123), normal(3, 123));
    for dy_dtype in DTYPES {
        for (x_dtype, dx_dtype) in DTYPES.into_iter().flat_map(|x| DTYPES.map(|dx| (x, dx))) {
            let (x, dy) = (
                Pitched::new(&x, shape, x_dtype),
                Pitched::new(&dy, shape, dy_dtype),
            );
            let rstd = rstd_of(x.view(), &weight);
            let mut dx = Pitched::zeros(shape, dx_dtype);
            backward(dy.view(), x.view(), &weight, &rstd, dx.view_mut(), None).unwrap();
            let leaf = var(&x.values(), &shape);
            let y = rms_norm_slow(&leaf, &var(&weight, &[123]), EPS).unwrap();
            let want = oracle_gradients(&y, &dy.values(), &[&leaf]);
            let what = format!("dy {dy_dtype}, x {x_dtype}, dx {dx_dtype}");
            assert_close(&dx.values(), &want[0], tolerance(dx_dtype), &what);
        }
    }
}

#[test]
fn an_offset_is_a_larger_weight() {
    let shape = [ROWS, 123];
    let (x, dy) = (normal(1, ROWS * 123), normal(2, ROWS * 123));
    let (x, dy) = (
        View::from_f32(&x, ROWS, 123),
        View::from_f32(&dy, ROWS, 123),
    );
    let values = normal(3, 123);
    let larger: Vec<f32> = values.iter().map(|w| w + 1.0).collect();
    let run = |weight: Weight<'_>| {
        let (mut y, mut sum) = (vec![0.0; ROWS * 123], dy.to_f32_vec());
        let (mut rstd, mut d_weight) = (vec![0.0; ROWS], vec![0.0; 123]);
        super::forward(x, weight, EPS, matrix_mut(&mut y), column_mut(&mut rstd)).unwrap();
        let mut all = vec![y.clone()];
        super::apply(x, weight, column(&rstd), matrix_mut(&mut y)).unwrap();
        all.push(y.clone());
        let gradient = Some(ViewMut::vector(&mut d_weight));
        let d = matrix_mut(&mut y);
        super::backward(dy, x, weight, column(&rstd), d, gradient).unwrap();
        all.extend([y.clone(), d_weight]);
        let residual = matrix_mut(&mut sum);
        super::add_forward(
            residual,
            x,
            weight,
            EPS,
            matrix_mut(&mut y),
            column_mut(&mut rstd),
        )
        .unwrap();
        all.extend([y, sum]);
        all
    };
    let offset = run(Weight {
        values: View::vector(&values),
        offset: 1.0,
    });
    for (got, want) in offset.iter().zip(run(View::vector(&larger).into())) {
        assert_same_bits(got, &want, &format!("{shape:?}"));
    }
}

#[test]
fn add_forward_is_addition_then_forward() {
    for (residual_dtype, branch_dtype) in DTYPES.into_iter().flat_map(|r| DTYPES.map(|b| (r, b))) {
        for (y_dtype, cols) in DTYPES.into_iter().flat_map(|d| ODD_COLUMNS.map(|c| (d, c))) {
            let shape = [ROWS, cols];
            let mut residual = Pitched::normal(1, shape, residual_dtype);
            let (branch, weight) = (Pitched::normal(2, shape, branch_dtype), normal(3, cols));
            let added = sum(&residual.values(), &branch.values());
            let added = Pitched::new(&added, shape, residual_dtype);

            let (mut y, mut rstd) = (Pitched::zeros(shape, y_dtype), vec![0.0; ROWS]);
            let (r, b, out) = (residual.view_mut(), branch.view(), y.view_mut());
            add_forward(r, b, &weight, EPS, out, &mut rstd).unwrap();
            assert_same_bits(&residual.values(), &added.values(), "residual");

            let (mut plain, mut plain_rstd) = (Pitched::zeros(shape, y_dtype), vec![0.0; ROWS]);
            forward(
                added.view(),
                &weight,
                EPS,
                plain.view_mut(),
                &mut plain_rstd,
            )
            .unwrap();
            assert_same_bits(&y.values(), &plain.values(), "y");
            assert_same_bits(&rstd, &plain_rstd, "rstd");
        }
    }
}

#[test]
fn apply_repeats_the_bits_of_forward() {
    for x_dtype in DTYPES {
        for (y_dtype, cols) in DTYPES.into_iter().flat_map(|d| ODD_COLUMNS.map(|c| (d, c))) {
            let shape = [ROWS, cols];
            let (x, weight) = (Pitched::normal(1, shape, x_dtype), normal(2, cols));
            let (mut y, mut rstd) = (Pitched::zeros(shape, y_dtype), vec![0.0; ROWS]);
            forward(x.view(), &weight, EPS, y.view_mut(), &mut rstd).unwrap();
            let mut again = Pitched::zeros(shape, y_dtype);
            apply(x.view(), &weight, &rstd, again.view_mut()).unwrap();
            assert_same_bits(&again.values(), &y.values(), "y");
        }
    }
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let shape = [700, 257];
    let weight = normal(3, 257);
    let (x, dy) = (
        Pitched::normal(1, shape, DType::F32),
        Pitched::normal(2, shape, DType::F32),
    );
    assert_same_on_any_thread_count(|| {
        let (mut y, mut rstd) = (Pitched::zeros(shape, DType::F32), vec![0.0; 700]);
        forward(x.view(), &weight, EPS, y.view_mut(), &mut rstd).unwrap();
        let mut residual = Pitched::new(&x.values(), shape, DType::F32);
        let (mut z, mut rstd_z) = (Pitched::zeros(shape, DType::F32), vec![0.0; 700]);
        let (r, out) = (residual.view_mut(), z.view_mut());
        add_forward(r, dy.view(), &weight, EPS, out, &mut rstd_z).unwrap();
        let (mut dx, mut d_weight) = (Pitched::zeros(shape, DType::F32), vec![0.0; 257]);
        let gradient = Some(d_weight.as_mut_slice());
        backward(dy.view(), x.view(), &weight, &rstd, dx.view_mut(), gradient).unwrap();
        vec![
            y.values(),
            rstd,
            residual.values(),
            z.values(),
            rstd_z,
            dx.values(),
            d_weight,
        ]
    });
}

#[test]
fn no_rows_is_legal() {
    let empty = Tensor::zeros(DType::F32, 0, 4);
    let (mut a, mut b) = (empty.clone(), empty.clone());
    let weight = [1.0; 4];
    forward(empty.view(), &weight, EPS, a.view_mut(), &mut []).unwrap();
    add_forward(
        a.view_mut(),
        empty.view(),
        &weight,
        EPS,
        b.view_mut(),
        &mut [],
    )
    .unwrap();
    apply(empty.view(), &weight, &[], a.view_mut()).unwrap();
    let mut d_weight = [3.0; 4];
    let (x, gradient) = (empty.view(), Some(d_weight.as_mut_slice()));
    backward(x, x, &weight, &[], a.view_mut(), gradient).unwrap();
    assert_eq!(d_weight, [3.0; 4]);
}

#[test]
fn wrong_shapes_are_refused() {
    let (x, mut y) = (
        Tensor::zeros(DType::F32, 2, 4),
        Tensor::zeros(DType::F32, 2, 4),
    );
    let (narrow, mut narrow_out) = (x.view().columns(0..3), Tensor::zeros(DType::F32, 2, 3));
    let (weight, x) = ([1.0; 4], x.view());
    let mut rstd = [0.0; 2];
    let message = forward(x, &weight, EPS, narrow_out.view_mut(), &mut rstd).unwrap_err();
    assert_eq!(
        message.to_string(),
        "rms_norm::forward: y is [2, 3] [rows, columns], expected [2, 4]"
    );
    assert!(forward(x, &weight[1..], EPS, y.view_mut(), &mut rstd).is_err());
    assert!(forward(x, &weight, EPS, y.view_mut(), &mut rstd[1..]).is_err());
    let mut residual = y.clone();
    assert!(
        add_forward(
            residual.view_mut(),
            narrow,
            &weight,
            EPS,
            y.view_mut(),
            &mut rstd
        )
        .is_err()
    );
    assert!(apply(x, &weight, &rstd[1..], y.view_mut()).is_err());
    assert!(backward(narrow, x, &weight, &rstd, y.view_mut(), None).is_err());
    assert!(backward(x, x, &weight, &rstd, narrow_out.view_mut(), None).is_err());
    assert!(backward(x, x, &weight, &rstd, y.view_mut(), Some(&mut [0.0; 3])).is_err());
}

fn rstd_of(x: View<'_>, weight: &[f32]) -> Vec<f32> {
    let mut y = Tensor::zeros(DType::F32, x.rows(), x.cols());
    let mut rstd = vec![0.0; x.rows()];
    forward(x, weight, EPS, y.view_mut(), &mut rstd).unwrap();
    rstd
}

fn sum(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}
