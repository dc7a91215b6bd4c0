use super::Activation::{Gelu, GeluTanh, QuickGelu, Relu, Silu};
use super::{backward_gated_in_place, backward_in_place, forward, forward_gated};
use crate::test_support::DTYPES;
use crate::twins::assert_cuda_matches;

const ROWS: usize = 5;

#[test]
fn matches_the_cpu() {
    for activation in [Silu, Gelu, GeluTanh, QuickGelu, Relu] {
        for (x_dtype, y_dtype) in DTYPES.into_iter().flat_map(|x| DTYPES.map(|y| (x, y))) {
            for cols in [1, 64, 123, 2120] {
                let (wide, shape) = ([ROWS, 2 * cols], [ROWS, cols]);
                let what =
                    format!("{activation:?}, gate_up {x_dtype}, out {y_dtype}, {cols} columns");
                assert_cuda_matches(&what, |place| {
                    let mut gate_up = place.matrix(1, wide, x_dtype);
                    let mut out = place.poisoned(shape, y_dtype);
                    forward_gated(activation, gate_up.view(), out.view_mut()).unwrap();
                    let d_out = place.matrix(2, shape, y_dtype);
                    backward_gated_in_place(activation, gate_up.view_mut(), d_out.view()).unwrap();
                    let mut x = place.matrix(3, shape, x_dtype);
                    let mut plain = place.poisoned(shape, y_dtype);
                    forward(activation, x.view(), plain.view_mut()).unwrap();
                    backward_in_place(activation, x.view_mut(), d_out.view()).unwrap();
                    vec![
                        (y_dtype, out.values()),
                        (x_dtype, gate_up.values()),
                        (y_dtype, plain.values()),
                        (x_dtype, x.values()),
                    ]
                });
            }
        }
    }
}
