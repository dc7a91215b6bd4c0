use super::{Order, add, add_gradient};
use crate::DType;
use crate::twins::assert_cuda_matches;

#[test]
fn matches_the_cpu() {
    for (shape, block) in [
        ([1, 1], 1),
        ([12, 20], 4),
        ([70, 105], 35),
        ([600, 300], 300),
    ] {
        for order in [Order::Circulant, Order::Reflected] {
            assert_cuda_matches(&format!("{shape:?} {block} {order:?}"), |place| {
                let of_kernel = [shape[0] / block, shape[1]];
                let kernel = place.dense(1, of_kernel);
                let mut out = place.matrix(2, shape, DType::F32);
                add(out.view_mut(), -0.5, kernel.view(), block, order).unwrap();
                let d = place.matrix(3, shape, DType::F32);
                let mut d_kernel = place.dense(4, of_kernel);
                add_gradient(d_kernel.view_mut(), 2.0, d.view(), block).unwrap();
                vec![
                    (DType::F32, out.values()),
                    (DType::F32, d_kernel.to_f32_vec()),
                ]
            });
        }
    }
}
