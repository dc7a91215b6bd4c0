use super::direction;
use crate::DType;
use crate::twins::assert_cuda_matches;

#[test]
fn matches_the_cpu() {
    for rank in [1, 7, 33, 123] {
        assert_cuda_matches(&format!("{rank}"), |place| {
            let mut gram = place.dense(1, [rank, rank]);
            let mut distances = place.dense(2, [1, 3]);
            let distance = distances.view_mut().columns(1..2);
            direction(gram.view_mut(), distance).unwrap();
            [gram, distances]
                .map(|of| (DType::F32, of.to_f32_vec()))
                .into()
        });
    }
}
