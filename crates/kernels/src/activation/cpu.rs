use super::Activation;
use crate::row_blocks::{blocks, rows_per_block};
use crate::simd::{dispatch, exp};
use crate::{Element, Rows, RowsMut};
use rayon::prelude::{IndexedParallelIterator, ParallelIterator};
use std::f32::consts::FRAC_1_SQRT_2;

/// `1 / sqrt(2 pi)`.
const INVERSE_ROOT_TWO_PI: f32 = 0.398_942_3;
/// `2 sqrt(2 / pi)`, and that times 0.044715: `2 u(g) = g (TANH_LINEAR + TANH_CUBIC g^2)`.
const TANH_LINEAR: f32 = 1.595_769;
const TANH_CUBIC: f32 = 0.071_354_814;
/// Beyond this gate `p'` is zero in f32, while its factor still grows.
const TANH_FLAT: f32 = 20.0;

/// Of the approximation by a sigmoid alone.
const QUICK: f32 = 1.702;

/// An activation, compiled into the loops.
trait Gate {
    /// `act(g)`.
    fn value(g: f32) -> f32;
    /// `act(g)` and `act'(g)`.
    fn with_slope(g: f32) -> [f32; 2];
}

struct Silu;
struct Gelu;
struct GeluTanh;
struct QuickGelu;
struct Relu;

/// `$call`, with `$gate` the type of `$activation`.
macro_rules! with_gate {
    ($activation:expr, $gate:ident => $call:expr) => {
        with_gate!($activation, $gate => $call, Silu Gelu GeluTanh QuickGelu Relu)
    };
    ($activation:expr, $gate:ident => $call:expr, $($name:ident)*) => {
        match $activation {
            $(Activation::$name => {
                type $gate = $name;
                $call
            })*
        }
    };
}

impl Gate for Silu {
    #[inline(always)]
    fn value(g: f32) -> f32 {
        g / (1.0 + exp(-g))
    }

    #[inline(always)]
    fn with_slope(g: f32) -> [f32; 2] {
        let sigmoid = 1.0 / (1.0 + exp(-g));
        [g * sigmoid, sigmoid * g.mul_add(1.0 - sigmoid, 1.0)]
    }
}

impl Gate for Gelu {
    #[inline(always)]
    fn value(g: f32) -> f32 {
        g * normal_share(g)
    }

    #[inline(always)]
    fn with_slope(g: f32) -> [f32; 2] {
        let share = normal_share(g);
        let density = exp(-0.5 * g * g) * INVERSE_ROOT_TWO_PI;
        [g * share, g.mul_add(density, share)]
    }
}

impl Gate for GeluTanh {
    #[inline(always)]
    fn value(g: f32) -> f32 {
        g / (1.0 + exp(-twice_u(g)))
    }

    #[inline(always)]
    fn with_slope(g: f32) -> [f32; 2] {
        let sigmoid = 1.0 / (1.0 + exp(-twice_u(g)));
        let near = g.clamp(-TANH_FLAT, TANH_FLAT);
        let d_twice_u = (near * near).mul_add(3.0 * TANH_CUBIC, TANH_LINEAR);
        let bend = near * d_twice_u * (1.0 - sigmoid);
        [g * sigmoid, sigmoid * (1.0 + bend)]
    }
}

impl Gate for QuickGelu {
    #[inline(always)]
    fn value(g: f32) -> f32 {
        g / (1.0 + exp(-QUICK * g))
    }

    #[inline(always)]
    fn with_slope(g: f32) -> [f32; 2] {
        let sigmoid = 1.0 / (1.0 + exp(-QUICK * g));
        [
            g * sigmoid,
            sigmoid * (QUICK * g).mul_add(1.0 - sigmoid, 1.0),
        ]
    }
}

impl Gate for Relu {
    #[inline(always)]
    fn value(g: f32) -> f32 {
        // Unlike `max`, this keeps NaN.
        if g < 0.0 { 0.0 } else { g }
    }

    #[inline(always)]
    fn with_slope(g: f32) -> [f32; 2] {
        [Self::value(g), if g > 0.0 { 1.0 } else { 0.0 }]
    }
}

#[inline(always)]
fn twice_u(g: f32) -> f32 {
    g * (g * g).mul_add(TANH_CUBIC, TANH_LINEAR)
}

/// `(1 + erf(x / sqrt 2)) / 2`, to about 1e-6 of itself in both tails.
///
/// A Chebyshev fit of `ln(erfc(z) / t) + z^2` in `t = 1 / (1 + z / 2)`: Press et al., "Numerical
/// Recipes", section 6.2.
#[inline(always)]
fn normal_share(x: f32) -> f32 {
    let z = x.abs() * FRAC_1_SQRT_2;
    let t = 1.0 / z.mul_add(0.5, 1.0);
    let p = 0.170_872_77_f32;
    let p = p.mul_add(t, -0.822_152_2);
    let p = p.mul_add(t, 1.488_515_9);
    let p = p.mul_add(t, -1.135_204);
    let p = p.mul_add(t, 0.278_868_07);
    let p = p.mul_add(t, -0.186_288_06);
    let p = p.mul_add(t, 0.096_784_18);
    let p = p.mul_add(t, 0.374_091_96);
    let p = p.mul_add(t, 1.000_023_7);
    let p = p.mul_add(t, -1.265_512_2);
    let tail = 0.5 * t * exp(z.mul_add(-z, p));
    if x < 0.0 { tail } else { 1.0 - tail }
}

pub(super) fn forward_gated<X: Element, Y: Element>(
    activation: Activation,
    gate_up: Rows<'_, X>,
    out: RowsMut<'_, Y>,
) {
    with_gate!(activation, A => forward_gated_of::<A, X, Y>(gate_up, out));
}

fn forward_gated_of<A: Gate, X: Element, Y: Element>(
    gate_up: Rows<'_, X>,
    mut out: RowsMut<'_, Y>,
) {
    let step = rows_per_block(out.cols());
    blocks(&mut out).enumerate().for_each(|(block, mut out)| {
        dispatch(
            #[inline(always)]
            || {
                for (t, out) in (block * step..).zip(out.rows()) {
                    let (gate, up) = gate_up.row(t).split_at(out.len());
                    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                        *out = Y::from_f32(A::value(gate.to_f32()) * up.to_f32());
                    }
                }
            },
        );
    });
}

pub(super) fn backward_gated_in_place<X: Element, G: Element>(
    activation: Activation,
    gate_up: RowsMut<'_, X>,
    d_out: Rows<'_, G>,
) {
    with_gate!(activation, A => backward_gated_of::<A, X, G>(gate_up, d_out));
}

fn backward_gated_of<A: Gate, X: Element, G: Element>(
    mut gate_up: RowsMut<'_, X>,
    d_out: Rows<'_, G>,
) {
    let step = rows_per_block(gate_up.cols());
    blocks(&mut gate_up)
        .enumerate()
        .for_each(|(block, mut gate_up)| {
            dispatch(
                #[inline(always)]
                || {
                    for (t, row) in (block * step..).zip(gate_up.rows()) {
                        let d_out = d_out.row(t);
                        let (gate, up) = row.split_at_mut(d_out.len());
                        backward_row::<A, X, G>(gate, up, d_out);
                    }
                },
            );
        });
}

#[inline(always)]
fn backward_row<A: Gate, X: Element, G: Element>(gate: &mut [X], up: &mut [X], d_out: &[G]) {
    for ((gate, up), d_out) in gate.iter_mut().zip(up).zip(d_out) {
        let (u, d) = (up.to_f32(), d_out.to_f32());
        let [value, slope] = A::with_slope(gate.to_f32());
        *gate = X::from_f32(d * u * slope);
        *up = X::from_f32(d * value);
    }
}

pub(super) fn forward<X: Element, Y: Element>(
    activation: Activation,
    x: Rows<'_, X>,
    out: RowsMut<'_, Y>,
) {
    with_gate!(activation, A => forward_of::<A, X, Y>(x, out));
}

fn forward_of<A: Gate, X: Element, Y: Element>(x: Rows<'_, X>, mut out: RowsMut<'_, Y>) {
    let step = rows_per_block(out.cols());
    blocks(&mut out).enumerate().for_each(|(block, mut out)| {
        dispatch(
            #[inline(always)]
            || {
                for (t, out) in (block * step..).zip(out.rows()) {
                    for (out, x) in out.iter_mut().zip(x.row(t)) {
                        *out = Y::from_f32(A::value(x.to_f32()));
                    }
                }
            },
        );
    });
}

pub(super) fn backward_in_place<X: Element, G: Element>(
    activation: Activation,
    x: RowsMut<'_, X>,
    d_out: Rows<'_, G>,
) {
    with_gate!(activation, A => backward_of::<A, X, G>(x, d_out));
}

fn backward_of<A: Gate, X: Element, G: Element>(mut x: RowsMut<'_, X>, d_out: Rows<'_, G>) {
    let step = rows_per_block(x.cols());
    blocks(&mut x).enumerate().for_each(|(block, mut x)| {
        dispatch(
            #[inline(always)]
            || {
                for (t, x) in (block * step..).zip(x.rows()) {
                    for (x, d_out) in x.iter_mut().zip(d_out.row(t)) {
                        let [_, slope] = A::with_slope(x.to_f32());
                        *x = X::from_f32(d_out.to_f32() * slope);
                    }
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::normal_share;

    #[test]
    fn the_share_of_a_normal_distribution_is_that_of_its_table() {
        // Abramowitz, Stegun: "Handbook of Mathematical Functions", tables 26.1 and 26.2.
        for (x, above) in [
            (0.0, 0.5),
            (0.5, 0.308_537_538_7),
            (1.0, 0.158_655_253_9),
            (2.0, 0.022_750_131_95),
            (3.0, 0.001_349_898_032),
            (5.0, 2.866_515_719e-7),
        ] {
            for (got, want) in [(normal_share(-x), above), (normal_share(x), 1.0 - above)] {
                let error = (f64::from(got) - want).abs() / want;
                assert!(error < 2e-6, "share at {x}: {got}, expected {want}");
            }
        }
        assert!(normal_share(f32::NAN).is_nan());
    }
}
