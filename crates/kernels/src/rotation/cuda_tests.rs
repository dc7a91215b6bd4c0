use super::{Map, Source, add_gradient, forward, shorten};
use crate::DType;
use crate::twins::assert_cuda_matches;

#[test]
fn matches_the_cpu() {
    let maps = [
        Map::Cayley,
        Map::Series(&[]),
        Map::Series(&[0.2]),
        Map::Series(&[0.2, 0.1, -0.1, 0.05]),
    ];
    for map in maps {
        for source in [Source::Upper, Source::Square] {
            for [n, blocks] in [[1, 3], [2, 1], [7, 4], [32, 2]] {
                assert_cuda_matches(&format!("{map:?} {source:?} {n} {blocks}"), |place| {
                    let shape = [blocks, source.parameters(n)];
                    let parameters = place.dense(1, shape);
                    let mut rotations = place.dense(2, [blocks * n, n]);
                    forward(rotations.view_mut(), parameters.view(), source, map).unwrap();
                    let d = place.dense(3, [blocks * n, n]);
                    let mut d_parameters = place.dense(4, shape);
                    let to = d_parameters.view_mut();
                    add_gradient(to, d.view(), parameters.view(), source, map).unwrap();
                    [rotations, d_parameters]
                        .map(|of| (DType::F32, of.to_f32_vec()))
                        .into()
                });
            }
        }
    }
}

#[test]
fn shortened_rows_match_the_cpu() {
    for [rows, cols] in [[1, 1], [7, 6], [3, 500]] {
        // Of some rows, all, or none.
        for limit in [(cols as f64).sqrt(), 1e-5, 1e5] {
            assert_cuda_matches(&format!("{rows} {cols} {limit}"), |place| {
                let mut vectors = place.dense(1, [rows, cols]);
                shorten(vectors.view_mut(), limit).unwrap();
                vec![(DType::F32, vectors.to_f32_vec())]
            });
        }
    }
}
