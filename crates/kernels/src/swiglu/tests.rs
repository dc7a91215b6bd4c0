use super::{backward_in_place, forward};
use crate::test_support::{
    DTYPES, ODD_COLUMNS, Pitched, assert_close, assert_same_on_any_thread_count, flat,
    oracle_gradients, tolerance, var,
};
use crate::{DType, Tensor};
use candle_core::Var;

const ROWS: usize = 5;

fn oracle(gate_up: &Var, cols: usize) -> candle_core::Tensor {
    let product = || {
        let (gate, up) = (gate_up.narrow(1, 0, cols)?, gate_up.narrow(1, cols, cols)?);
        gate.silu()? * up
    };
    product().unwrap()
}

#[test]
fn both_directions_match_candle() {
    for (x_dtype, y_dtype) in DTYPES.into_iter().flat_map(|x| DTYPES.map(|y| (x, y))) {
        for cols in ODD_COLUMNS {
            let (wide, shape) = ([ROWS, 2 * cols], [ROWS, cols]);
            let mut gate_up = Pitched::normal(1, wide, x_dtype);
            let d_out = Pitched::normal(2, shape, y_dtype);
            let leaf = var(&gate_up.values(), &wide);
            let want = oracle(&leaf, cols);
            let gradients = oracle_gradients(&want, &d_out.values(), &[&leaf]);
            let what = format!("gate_up {x_dtype}, out {y_dtype}, {cols} columns");

            let mut out = Pitched::zeros(shape, y_dtype);
            forward(gate_up.view(), out.view_mut()).unwrap();
            assert_close(&out.values(), &flat(&want), tolerance(y_dtype), &what);

            backward_in_place(gate_up.view_mut(), d_out.view()).unwrap();
            assert_close(&gate_up.values(), &gradients[0], tolerance(x_dtype), &what);
        }
    }
}

#[test]
fn large_gates_saturate_without_nan() {
    let gates = [-1e30_f32, -200.0, -89.0, 0.0, 89.0, 200.0, 1e30];
    let both: Vec<f32> = gates.iter().copied().chain([2.0; 7]).collect();
    let mut gate_up = Tensor::from_f32(both, 1, 14);
    let mut out = Tensor::zeros(DType::F32, 1, 7);
    forward(gate_up.view(), out.view_mut()).unwrap();
    for (out, gate) in out.to_f32_vec().iter().zip(gates) {
        assert!(
            (out - 2.0 * gate.max(0.0)).abs() <= 1e-36,
            "silu({gate}) * 2 = {out}"
        );
    }
    let d_out = Tensor::from_f32(vec![1.0; 7], 1, 7);
    backward_in_place(gate_up.view_mut(), d_out.view()).unwrap();
    let d_gate = &gate_up.to_f32_vec()[..7];
    assert_close(d_gate, &[0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0], 1e-6, "d_gate");
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let (wide, shape) = ([500, 514], [500, 257]);
    let d_out = Pitched::normal(2, shape, DType::F32);
    assert_same_on_any_thread_count(|| {
        let mut gate_up = Pitched::normal(1, wide, DType::F32);
        let mut out = Pitched::zeros(shape, DType::F32);
        forward(gate_up.view(), out.view_mut()).unwrap();
        backward_in_place(gate_up.view_mut(), d_out.view()).unwrap();
        vec![out.values(), gate_up.values()]
    });
}

#[test]
fn no_rows_is_legal() {
    let (mut wide, mut out) = (
        Tensor::zeros(DType::F32, 0, 8),
        Tensor::zeros(DType::Bf16, 0, 4),
    );
    forward(wide.view(), out.view_mut()).unwrap();
    backward_in_place(wide.view_mut(), out.view()).unwrap();
}

#[test]
fn wrong_shapes_are_refused() {
    let (mut wide, mut out) = (
        Tensor::zeros(DType::F32, 2, 7),
        Tensor::zeros(DType::F32, 2, 4),
    );
    let message = forward(wide.view(), out.view_mut())
        .unwrap_err()
        .to_string();
    assert_eq!(
        message,
        "swiglu::forward: gate_up is [2, 7] [rows, columns], expected [2, 8]"
    );
    assert!(backward_in_place(wide.view_mut(), out.view()).is_err());
    let taller = Tensor::zeros(DType::F32, 3, 8);
    assert!(forward(taller.view(), out.view_mut()).is_err());
}
