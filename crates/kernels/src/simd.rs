//! Runs a loop compiled for the widest vector unit of the machine it runs on.

use std::sync::LazyLock;

static ARCH: LazyLock<pulp::Arch> = LazyLock::new(pulp::Arch::new);

/// Calls `body` compiled for AVX-512, AVX2 or the baseline, whichever this machine has.
///
/// Everything `body` calls must be `#[inline(always)]`, or it stays at the baseline.
#[inline]
pub(crate) fn dispatch<R>(body: impl FnOnce() -> R) -> R {
    ARCH.dispatch(body)
}

/// `e^x` to about 1 ulp, in a form that loops over it vectorise.
///
/// Cephes: `x = n ln 2 + r`, a degree-6 polynomial in `r`, then `2^n` put into the exponent.
/// Below -87.3 it returns a value under the smallest normal; above 88.7, infinity.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // NaN must stay NaN: clamp() on f32 keeps it.
    let clamped = x.clamp(-103.0, 89.0);
    let n = (clamped * LOG2E).round_ties_even();
    let r = n.mul_add(-LN2_HI, clamped);
    let r = n.mul_add(-LN2_LO, r);
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let y = (p * r).mul_add(r, r + 1.0);
    // Two factors so that n = 128 overflows to infinity and n = -149 reaches the denormals. Adding
    // 1.5 * 2^23 leaves the integer in the low bits; a saturating cast or an overflow check would
    // keep the loop from vectorising.
    let half = (n * 0.5).floor();
    let scale = |k: f32| f32::from_bits((k + 12_582_912.0).to_bits().wrapping_add(127) << 23);
    y * scale(half) * scale(n - half)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut x = -87.0_f32;
        while x < 88.0 {
            let (got, want) = (exp(x), f64::from(x).exp());
            let error = (f64::from(got) - want).abs() / want;
            assert!(error < 2.5e-7, "exp({x}) = {got}, expected {want}");
            x += 0.003_7;
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NEG_INFINITY) < 1e-38);
    }
}
