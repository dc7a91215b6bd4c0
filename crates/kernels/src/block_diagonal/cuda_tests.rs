use super::{gradient, product};
use crate::twins::assert_cuda_matches;
use crate::{DType, Tensor};

#[test]
fn matches_the_cpu() {
    for (rows, blocks, n) in [(1, 1, 1), (5, 7, 4), (70, 3, 32), (33, 2, 50), (130, 1, 97)] {
        assert_cuda_matches(&format!("{rows} rows, {blocks} blocks of {n}"), |place| {
            let shape = [rows, blocks * n];
            let x = place.matrix(1, shape, DType::F32);
            let m = place.dense(2, [blocks * n, n]);
            let mut y = place.poisoned(shape, DType::F32);
            product(y.view_mut(), x.view(), m.view()).unwrap();
            let dy = place.matrix(3, shape, DType::F32);
            let mut d_m = Tensor::empty(place.device(), DType::F32, blocks * n, n);
            gradient(d_m.view_mut(), dy.view(), x.view()).unwrap();
            vec![(DType::F32, y.values()), (DType::F32, d_m.to_f32_vec())]
        });
    }
}
