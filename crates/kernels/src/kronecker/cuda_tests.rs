use super::{Second, add, add_first_gradient, add_second_gradient};
use crate::DType;
use crate::twins::assert_cuda_matches;

#[test]
fn matches_the_cpu() {
    // Shape of the product and of b: whole blocks, and some that stick out.
    let cases: [([usize; 2], [usize; 2]); 6] = [
        ([1, 1], [1, 1]),
        ([12, 20], [4, 5]),
        ([33, 70], [8, 16]),
        ([64, 96], [1, 7]),
        ([7, 300], [7, 4]),
        ([300, 260], [150, 130]),
    ];
    for (shape, [p, q]) in cases {
        for transposed in [false, true] {
            assert_cuda_matches(&format!("{shape:?} {p} {q} {transposed}"), |place| {
                let blocks = [shape[0].div_ceil(p), shape[1].div_ceil(q)];
                let stored = if transposed { [q, p] } else { [p, q] };
                let (a, b) = (place.dense(1, blocks), place.dense(2, stored));
                let matrix = b.view();
                let second = Second { matrix, transposed };
                let mut out = place.matrix(3, shape, DType::F32);
                add(out.view_mut(), -0.5, a.view(), second).unwrap();
                let d = place.matrix(4, shape, DType::F32);
                let (mut d_a, mut d_b) = (place.dense(5, blocks), place.dense(6, stored));
                add_first_gradient(d_a.view_mut(), 2.0, d.view(), second).unwrap();
                add_second_gradient(d_b.view_mut(), transposed, 0.3, d.view(), a.view()).unwrap();
                vec![
                    (DType::F32, out.values()),
                    (DType::F32, d_a.to_f32_vec()),
                    (DType::F32, d_b.to_f32_vec()),
                ]
            });
        }
    }
}
