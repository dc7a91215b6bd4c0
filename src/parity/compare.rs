use serde::Serialize;
use std::collections::BTreeMap;

/// Error of a gradient, relative to the largest of the model, that f32 sums leave: three steps of f32.
const ROUNDING: f64 = 3.0 * f32::EPSILON as f64;

/// The worst error of one kind of quantity in a case.
#[derive(Clone, Debug, Serialize)]
pub struct Quantity {
    /// `logits`, `loss`, `grad`, ...
    pub name: String,
    /// Tensors compared.
    pub tensors: usize,
    /// Worst `max|ours - theirs| / max|theirs|`.
    pub error: f64,
    /// Largest error that passes, of the worst tensor.
    pub tolerance: f64,
    /// The tensor with the worst error relative to its tolerance.
    pub worst: String,
}

impl Quantity {
    /// Whether the error is within the tolerance; NaN never is, and a tolerance is a finite number.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.error <= self.tolerance && self.tolerance.is_finite()
    }
}

/// Collects errors while a case is recomputed.
#[derive(Debug, Default)]
pub struct Comparison {
    quantities: BTreeMap<String, Quantity>,
}

impl Comparison {
    /// Compares a tensor; a length that differs is an infinite error.
    pub fn tensor(
        &mut self,
        quantity: &str,
        name: &str,
        ours: &[f32],
        theirs: &[f32],
        tolerance: f64,
    ) {
        self.error(quantity, name, relative_error(ours, theirs), tolerance);
    }

    /// Compares a gradient with its twin, `largest` being the largest value of all gradients recorded: some
    /// are zero but for rounding, such as that of a key's bias where nothing rotates.
    pub fn gradient(
        &mut self,
        quantity: &str,
        name: &str,
        (ours, theirs): (&[f32], &[f32]),
        largest: f64,
        tolerance: f64,
    ) {
        let tolerance = tolerance.max(ROUNDING * largest / peak(theirs).max(f64::MIN_POSITIVE));
        self.tensor(quantity, name, ours, theirs, tolerance);
    }

    /// Compares a number.
    pub fn number(&mut self, quantity: &str, name: &str, ours: f64, theirs: f64, tolerance: f64) {
        let error = if ours == theirs {
            0.0
        } else {
            (ours - theirs).abs() / theirs.abs().max(f64::MIN_POSITIVE)
        };
        self.error(quantity, name, error, tolerance);
    }

    /// Compares what must be the same.
    pub fn exact(&mut self, quantity: &str, name: &str, same: bool) {
        let error = if same { 0.0 } else { f64::INFINITY };
        self.error(quantity, name, error, 0.0);
    }

    /// Takes an error that is already computed.
    pub fn error(&mut self, quantity: &str, name: &str, error: f64, tolerance: f64) {
        let fresh = || Quantity {
            name: quantity.into(),
            tensors: 0,
            error: 0.0,
            tolerance,
            worst: String::new(),
        };
        let entry = self.quantities.entry(quantity.into()).or_insert_with(fresh);
        entry.tensors += 1;
        let worse = excess(error, tolerance) > excess(entry.error, entry.tolerance);
        if worse || entry.worst.is_empty() {
            entry.error = error;
            entry.tolerance = tolerance;
            entry.worst = name.into();
        }
    }

    /// Compares a bf16 result through its distance from the exact one: the worst of ours may be at
    /// most `factor` times the worst of theirs, over all tensors of the quantity.
    pub(super) fn beside_peer(
        &mut self,
        quantity: &str,
        name: &str,
        ours: f64,
        theirs: f64,
        factor: f64,
    ) {
        // PyTorch's rounding can hit a scalar exactly; half a bf16 ulp is the least one can ask.
        let least = f64::from(f32::from(half::bf16::EPSILON)) / 2.0;
        let tolerance = (factor * theirs).max(least);
        let fresh = || Quantity {
            name: quantity.into(),
            tensors: 0,
            error: 0.0,
            tolerance,
            worst: name.into(),
        };
        let entry = self.quantities.entry(quantity.into()).or_insert_with(fresh);
        entry.tensors += 1;
        entry.tolerance = entry.tolerance.max(tolerance);
        if (ours.is_nan() || ours > entry.error) && !entry.error.is_nan() {
            entry.error = ours;
            entry.worst = name.into();
        }
    }

    /// The quantities by name.
    #[must_use]
    pub fn finish(self) -> Vec<Quantity> {
        self.quantities.into_values().collect()
    }
}

/// How far an error is beyond its tolerance, as a ratio that is never NaN: anything is infinitely
/// beyond a tolerance of zero, and NaN beyond any.
fn excess(error: f64, tolerance: f64) -> f64 {
    if error == 0.0 && tolerance.is_finite() {
        0.0
    } else if error.is_nan() || !(tolerance > 0.0 && tolerance.is_finite()) {
        f64::INFINITY
    } else {
        error / tolerance
    }
}

/// The largest absolute value.
pub(super) fn peak(values: &[f32]) -> f64 {
    values.iter().fold(0.0, |m, v| m.max(f64::from(v.abs())))
}

/// `max|a - b| / max|b|`; absolute where b is all zeros, infinite where lengths differ.
pub(super) fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    if ours.len() != theirs.len() {
        return f64::INFINITY;
    }
    let mut difference = 0.0_f64;
    let mut scale = 0.0_f64;
    for (a, b) in ours.iter().zip(theirs) {
        let d = (f64::from(*a) - f64::from(*b)).abs();
        // f64::max would swallow a NaN.
        if d.is_nan() {
            return f64::NAN;
        }
        difference = difference.max(d);
        scale = scale.max(f64::from(b.abs()));
    }
    if scale == 0.0 {
        difference
    } else {
        difference / scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_length_mismatch_never_pass() {
        assert!(relative_error(&[f32::NAN], &[1.0]).is_nan());
        assert_eq!(relative_error(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        let mut c = Comparison::default();
        c.tensor("x", "good", &[1.0], &[1.0], 1e-5);
        c.tensor("x", "bad", &[f32::NAN], &[1.0], 1e-5);
        c.tensor("x", "good", &[1.0], &[1.0], 1e-5);
        let q = c.finish();
        assert!(!q[0].passed());
        assert_eq!((q[0].tensors, q[0].worst.as_str()), (3, "bad"));
    }

    #[test]
    fn a_late_error_counts_where_nothing_is_tolerated() {
        let mut c = Comparison::default();
        c.number("count", "step 1", 5.0, 5.0, 0.0);
        c.number("count", "step 2", 6.0, 5.0, 0.0);
        c.number("count", "step 3", 5.0, 5.0, 0.0);
        let q = c.finish();
        assert!(!q[0].passed());
        assert_eq!(q[0].worst, "step 2");
    }

    #[test]
    fn an_infinite_tolerance_passes_nothing() {
        let mut c = Comparison::default();
        c.error("x", "zeros recorded", 1.0, f64::INFINITY);
        assert!(!c.finish()[0].passed());
    }

    #[test]
    fn the_worst_tensor_is_named() {
        let mut c = Comparison::default();
        c.tensor("x", "a", &[1.0], &[1.0], 1e-5);
        c.tensor("x", "b", &[1.1], &[1.0], 1e-5);
        let q = c.finish();
        assert_eq!(q[0].worst, "b");
        assert!((q[0].error - 0.1).abs() < 1e-6);
    }
}
