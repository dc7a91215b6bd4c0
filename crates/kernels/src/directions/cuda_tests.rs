use super::{add_gradient, forward};
use crate::DType;
use crate::twins::assert_cuda_matches;

#[test]
fn matches_the_cpu() {
    for orthogonal in [false, true] {
        for [n, rank] in [[1, 1], [7, 3], [123, 8], [1200, 5]] {
            assert_cuda_matches(&format!("{orthogonal} {n} {rank}"), |place| {
                let vectors = place.dense(1, [n, rank]);
                let mut directions = place.dense(2, [rank, n]);
                forward(directions.view_mut(), vectors.view(), orthogonal).unwrap();
                let d = place.dense(3, [rank, n]);
                let mut d_vectors = place.dense(4, [n, rank]);
                let to = d_vectors.view_mut();
                add_gradient(to, d.view(), vectors.view(), orthogonal).unwrap();
                [directions, d_vectors]
                    .map(|of| (DType::F32, of.to_f32_vec()))
                    .into()
            });
        }
    }
}
