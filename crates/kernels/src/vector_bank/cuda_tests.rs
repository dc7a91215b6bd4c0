use super::{Along, Composition, add_bank_gradient, add_logits_gradient, compose};
use crate::DType;
use crate::twins::assert_cuda_matches;

#[test]
fn matches_the_cpu() {
    for along in [Along::Rows, Along::Columns] {
        for ([a, b], [vectors, length], topk) in [
            ([1, 1], [1, 1], 1),
            ([3, 5], [7, 4], 2),
            ([2, 33], [123, 65], 3),
            ([40, 3], [257, 16], 40),
        ] {
            assert_cuda_matches(&format!("{along:?} {a} {b} {vectors} {length}"), |place| {
                let shape = match along {
                    Along::Rows => [a, b * length],
                    Along::Columns => [a * length, b],
                };
                let logits = place.dense(1, [a * b, vectors]);
                let bank = place.dense(2, [vectors, length]);
                let of = Composition {
                    logits: logits.view(),
                    bank: bank.view(),
                    topk,
                    along,
                };
                let mut out = place.poisoned(shape, DType::F32);
                compose(out.view_mut(), of).unwrap();
                let d = place.matrix(3, shape, DType::F32);
                let mut d_logits = place.dense(4, [a * b, vectors]);
                add_logits_gradient(d_logits.view_mut(), d.view(), of).unwrap();
                let mut d_bank = place.dense(5, [vectors, length]);
                add_bank_gradient(d_bank.view_mut(), d.view(), of).unwrap();
                vec![
                    (DType::F32, out.values()),
                    (DType::F32, d_logits.to_f32_vec()),
                    (DType::F32, d_bank.to_f32_vec()),
                ]
            });
        }
    }
}

/// Which vectors are chosen is the same where logits are equal, infinite or no numbers.
#[test]
fn the_first_of_equal_logits_are_chosen_on_both_sides() {
    let logits = [
        [0.0, -0.0, 0.0, -0.0, 0.0],
        [1.0, 2.0, 2.0, 2.0, 1.0],
        [-1e30, -1e30, 3.0, -1e30, -1e30],
        [f32::NEG_INFINITY, 1.0, 1.0, 1.0, f32::NEG_INFINITY],
    ];
    let bank: Vec<f32> = (0..10).map(|v| (1 << v) as f32).collect();
    assert_cuda_matches("equal logits", |place| {
        let on = |values: &[f32], rows, cols| {
            crate::Tensor::from_f32(values.to_vec(), rows, cols).to_device(place.device())
        };
        let (logits, bank) = (on(&logits.concat(), 4, 5), on(&bank, 5, 2));
        let of = Composition {
            logits: logits.view(),
            bank: bank.view(),
            topk: 2,
            along: Along::Rows,
        };
        let mut out = place.poisoned([1, 8], DType::F32);
        compose(out.view_mut(), of).unwrap();
        // Elements are powers of two: a mean says of which vectors.
        let values = out.values();
        assert_eq!(values, [8.5, 17.0, 10.0, 20.0, 16.0, 32.0, 10.0, 20.0]);
        vec![(DType::F32, values)]
    });
}
