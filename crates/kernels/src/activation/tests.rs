use super::Activation::{self, Gelu, GeluTanh, QuickGelu, Relu, Silu};
use super::{backward_gated_in_place, backward_in_place, forward, forward_gated};
use crate::test_support::{
    DTYPES, ODD_COLUMNS, Pitched, assert_close, assert_same_bits, assert_same_on_any_thread_count,
    flat, oracle_gradients, tolerance, var,
};
use crate::{DType, Tensor};
use candle_core::Var;

const ROWS: usize = 5;

const ACTIVATIONS: [Activation; 5] = [Silu, Gelu, GeluTanh, QuickGelu, Relu];

fn oracle(activation: Activation, gate_up: &Var, cols: usize) -> candle_core::Tensor {
    let product = || {
        let (gate, up) = (gate_up.narrow(1, 0, cols)?, gate_up.narrow(1, cols, cols)?);
        let activated = match activation {
            Silu => gate.silu()?,
            Gelu => gate.gelu_erf()?,
            GeluTanh => gate.gelu()?,
            QuickGelu => ((gate * 1.702)?.silu()? / 1.702)?,
            Relu => gate.relu()?,
        };
        activated * up
    };
    product().unwrap()
}

#[test]
fn both_directions_match_candle() {
    for activation in ACTIVATIONS {
        for (x_dtype, y_dtype) in DTYPES.into_iter().flat_map(|x| DTYPES.map(|y| (x, y))) {
            for cols in ODD_COLUMNS {
                check_against_candle(activation, [x_dtype, y_dtype], cols);
            }
        }
    }
}

fn check_against_candle(activation: Activation, [x_dtype, y_dtype]: [DType; 2], cols: usize) {
    let (wide, shape) = ([ROWS, 2 * cols], [ROWS, cols]);
    let mut gate_up = Pitched::normal(1, wide, x_dtype);
    let d_out = Pitched::normal(2, shape, y_dtype);
    let leaf = var(&gate_up.values(), &wide);
    let want = oracle(activation, &leaf, cols);
    let gradients = oracle_gradients(&want, &d_out.values(), &[&leaf]);
    let what = format!("{activation:?}: gate_up {x_dtype}, out {y_dtype}, {cols} columns");

    let mut out = Pitched::zeros(shape, y_dtype);
    forward_gated(activation, gate_up.view(), out.view_mut()).unwrap();
    assert_close(&out.values(), &flat(&want), tolerance(y_dtype), &what);

    backward_gated_in_place(activation, gate_up.view_mut(), d_out.view()).unwrap();
    assert_close(&gate_up.values(), &gradients[0], tolerance(x_dtype), &what);
}

/// Gate, gelu and gelu tanh of it, and the slopes of both, computed with 50 digits.
const RECORDED: [[f64; 5]; 6] = [
    [
        -5.5,
        -1.044_425_936e-7,
        -5.927_640_264e-9,
        -5.733_472_399e-7,
        -4.676_552_811e-8,
    ],
    [
        -3.0,
        -0.004_049_694,
        -0.003_637_392,
        -0.011_945_647,
        -0.011_584_167,
    ],
    [
        -0.625,
        -0.166_240_956,
        -0.166_278_850,
        0.060_884_924,
        0.061_091_963,
    ],
    [
        -0.125,
        -0.056_282_722,
        -0.056_282_801,
        0.400_782_064,
        0.400_784_594,
    ],
    [
        0.6875,
        0.518_454_853,
        0.518_402_705,
        0.970_660_455,
        0.970_411_649,
    ],
    [
        4.0,
        3.999_873_315,
        3.999_929_754,
        1.000_503_650,
        1.000_335_123,
    ],
];

#[test]
fn gelu_is_what_50_digits_give() {
    for [gate, gelu, gelu_tanh, d_gelu, d_gelu_tanh] in RECORDED {
        for (activation, value, slope) in [(Gelu, gelu, d_gelu), (GeluTanh, gelu_tanh, d_gelu_tanh)]
        {
            let mut gate_up = Tensor::from_f32(vec![gate as f32, 1.0], 1, 2);
            let mut out = Tensor::zeros(DType::F32, 1, 1);
            forward_gated(activation, gate_up.view(), out.view_mut()).unwrap();
            let one = Tensor::from_f32(vec![1.0], 1, 1);
            backward_gated_in_place(activation, gate_up.view_mut(), one.view()).unwrap();
            let got = [out.to_f32_vec()[0], gate_up.to_f32_vec()[0]];
            for (got, want) in got.into_iter().zip([value, slope]) {
                // Of the value itself: it keeps its digits in the tail, too.
                let error = (f64::from(got) - want).abs() / want.abs();
                assert!(
                    error <= 1e-5,
                    "{activation:?} at {gate}: {got}, expected {want}"
                );
            }
        }
    }
}

#[test]
fn large_gates_saturate_without_nan() {
    let gates = [-1e30_f32, -200.0, -89.0, 0.0, 89.0, 200.0, 1e30];
    let both: Vec<f32> = gates.iter().copied().chain([2.0; 7]).collect();
    for activation in ACTIVATIONS {
        let mut gate_up = Tensor::from_f32(both.clone(), 1, 14);
        let mut out = Tensor::zeros(DType::F32, 1, 7);
        forward_gated(activation, gate_up.view(), out.view_mut()).unwrap();
        for (out, gate) in out.to_f32_vec().iter().zip(gates) {
            assert!(
                (out - 2.0 * gate.max(0.0)).abs() <= 1e-36,
                "{activation:?}({gate}) * 2 = {out}"
            );
        }
        let d_out = Tensor::from_f32(vec![1.0; 7], 1, 7);
        backward_gated_in_place(activation, gate_up.view_mut(), d_out.view()).unwrap();
        let d_gate = &gate_up.to_f32_vec()[..7];
        // The slope at zero, twice: of ReLU, PyTorch's.
        let middle = if activation == Relu { 0.0 } else { 1.0 };
        let expected = [0.0, 0.0, 0.0, middle, 2.0, 2.0, 2.0];
        assert_close(d_gate, &expected, 1e-6, "d_gate");
    }
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let (wide, shape) = ([500, 514], [500, 257]);
    let d_out = Pitched::normal(2, shape, DType::F32);
    assert_same_on_any_thread_count(|| {
        let mut gate_up = Pitched::normal(1, wide, DType::F32);
        let mut out = Pitched::zeros(shape, DType::F32);
        forward_gated(Gelu, gate_up.view(), out.view_mut()).unwrap();
        backward_gated_in_place(Gelu, gate_up.view_mut(), d_out.view()).unwrap();
        vec![out.values(), gate_up.values()]
    });
}

#[test]
fn no_rows_is_legal() {
    let (mut wide, mut out) = (
        Tensor::zeros(DType::F32, 0, 8),
        Tensor::zeros(DType::Bf16, 0, 4),
    );
    forward_gated(Silu, wide.view(), out.view_mut()).unwrap();
    backward_gated_in_place(Silu, wide.view_mut(), out.view()).unwrap();
}

#[test]
fn wrong_shapes_are_refused() {
    let (mut wide, mut out) = (
        Tensor::zeros(DType::F32, 2, 7),
        Tensor::zeros(DType::F32, 2, 4),
    );
    let message = forward_gated(Silu, wide.view(), out.view_mut())
        .unwrap_err()
        .to_string();
    assert_eq!(
        message,
        "activation::forward_gated: gate_up is [2, 7] [rows, columns], expected [2, 8]"
    );
    assert!(backward_gated_in_place(Silu, wide.view_mut(), out.view()).is_err());
    let taller = Tensor::zeros(DType::F32, 3, 8);
    assert!(forward_gated(Silu, taller.view(), out.view_mut()).is_err());
    assert!(forward(Silu, wide.view(), out.view_mut()).is_err());
    assert!(backward_in_place(Silu, wide.view_mut(), out.view()).is_err());
}

#[test]
fn a_plain_activation_is_one_whose_gate_lets_everything_through() {
    for (x_dtype, y_dtype) in DTYPES.into_iter().flat_map(|x| DTYPES.map(|y| (x, y))) {
        for (activation, cols) in ACTIVATIONS
            .into_iter()
            .flat_map(|a| ODD_COLUMNS.map(|cols| (a, cols)))
        {
            let shape = [ROWS, cols];
            let mut x = Pitched::normal(1, shape, x_dtype);
            let d_out = Pitched::normal(2, shape, y_dtype);
            let rows = x.values();
            let ones = rows
                .chunks(cols)
                .flat_map(|row| [row, &vec![1.0; cols][..]].concat());
            let mut gate_up = Pitched::new(&ones.collect::<Vec<_>>(), [ROWS, 2 * cols], x_dtype);
            let (mut out, mut gated) = (
                Pitched::zeros(shape, y_dtype),
                Pitched::zeros(shape, y_dtype),
            );
            forward(activation, x.view(), out.view_mut()).unwrap();
            forward_gated(activation, gate_up.view(), gated.view_mut()).unwrap();
            let what = format!("{activation:?}: x {x_dtype}, out {y_dtype}, {cols} columns");
            assert_same_bits(&out.values(), &gated.values(), &what);
            backward_in_place(activation, x.view_mut(), d_out.view()).unwrap();
            backward_gated_in_place(activation, gate_up.view_mut(), d_out.view()).unwrap();
            let d_gate = gate_up.values();
            let d_gate = d_gate.chunks(2 * cols).flat_map(|row| &row[..cols]);
            let d_gate: Vec<f32> = d_gate.copied().collect();
            assert_same_bits(&x.values(), &d_gate, &what);
        }
    }
}
