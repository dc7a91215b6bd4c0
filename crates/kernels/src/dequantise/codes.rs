//! The values that codes stand for.

/// nf4: quantiles of a normal distribution, scaled to -1..=1, with an exact zero.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// fp4: one sign, two exponent and one mantissa bit, scaled to -1..=1.
pub const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// The dynamic 8-bit map of bitsandbytes, ascending: 7 decades, each with twice as many values as
/// the one below, both signs, and 0 and 1. Without signs every decade has twice as many.
///
/// A decade is cut into even intervals and stands for their middles.
#[must_use]
pub fn dynamic_map(signed: bool) -> [f32; 256] {
    let mut map = [0.0; 256];
    let mut len = 0;
    for decade in 0..7 {
        let scale = 10.0_f64.powi(decade - 6) as f32;
        let intervals = if signed { 1 << decade } else { 2 << decade };
        for i in 0..intervals {
            let middle = (boundary(i, intervals) + boundary(i + 1, intervals)) / 2.0;
            map[len] = scale * middle;
            len += 1;
            if signed {
                map[len] = -(scale * middle);
                len += 1;
            }
        }
    }
    map[len + 1] = 1.0;
    map.sort_by(f32::total_cmp);
    map
}

/// Boundary `i` of `intervals` even ones from 0.1 to 1, counted from the nearer end as
/// `torch.linspace` does, with its roundings.
fn boundary(i: usize, intervals: usize) -> f32 {
    let step = (1.0_f32 - 0.1) / intervals as f32;
    if i < intervals.div_ceil(2) {
        step.mul_add(i as f32, 0.1)
    } else {
        step.mul_add(-((intervals - i) as f32), 1.0)
    }
}
