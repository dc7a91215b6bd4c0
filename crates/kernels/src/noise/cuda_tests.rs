use super::add;
use crate::test_support::{DTYPES, stream};
use crate::twins::assert_cuda_matches;

const ROWS: usize = 5;

#[test]
fn matches_the_cpu() {
    let mut stream = stream(9);
    let rows: Vec<u32> = (0..=2 * ROWS).map(|_| stream.bits() as u32).collect();
    let scales = [0.5, 0.0, 1e-3, 7.0, 1.0_f32].map(f32::to_bits);
    for dtype in DTYPES {
        for cols in [1, 64, 72, 123, 2120] {
            let shape = [ROWS, cols];
            assert_cuda_matches(&format!("{dtype}, {cols} columns"), |place| {
                let (rows, scales) = (place.indices(&rows), place.indices(&scales));
                let mut x = place.matrix(1, shape, dtype);
                add(x.view_mut(), 7, &rows, &scales).unwrap();
                vec![(dtype, x.values())]
            });
        }
    }
}
