use super::{Factors, add_inverse_gradients, inverse};
use crate::DType;
use crate::twins::assert_cuda_matches;

#[test]
fn matches_the_cpu() {
    // With `least` above one norm, both, or none.
    for least in [1e-4, 8.0, 1e3] {
        for [rank, inputs, outputs] in [[1, 1, 1], [3, 7, 123], [8, 1100, 65]] {
            assert_cuda_matches(&format!("{rank} {inputs} {outputs} {least}"), |place| {
                let (a, b) = (
                    place.dense(1, [rank, inputs]),
                    place.dense(2, [outputs, rank]),
                );
                let of = Factors {
                    a: a.view(),
                    b: b.view(),
                    least,
                };
                let mut out = place.dense(3, [rank, 1]);
                inverse(out.view_mut(), of).unwrap();
                let d = place.dense(4, [rank, 1]);
                let mut d_a = place.dense(5, [rank, inputs]);
                let mut d_b = place.dense(6, [outputs, rank]);
                add_inverse_gradients([d_a.view_mut(), d_b.view_mut()], d.view(), of).unwrap();
                [out, d_a, d_b]
                    .map(|of| (DType::F32, of.to_f32_vec()))
                    .into()
            });
        }
    }
}
