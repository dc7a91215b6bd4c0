use super::{gradient, product};
use crate::test_support::normal;
use crate::{DType, Tensor, View, matmul};

/// M with the blocks on its diagonal.
fn whole(blocks: &[f32], n: usize) -> Tensor {
    let side = blocks.len() / n;
    let mut m = vec![0.0; side * side];
    for (row, values) in blocks.chunks_exact(n).enumerate() {
        m[row * side + row / n * n..][..n].copy_from_slice(values);
    }
    Tensor::from_f32(m, side, side)
}

fn assert_close(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!(
            (got - want).abs() <= 1e-5 * want.abs().max(1.0),
            "{got} {want}"
        );
    }
}

#[test]
fn products_are_those_with_the_whole_matrix() {
    let (rows, n, side) = (7, 5, 15);
    let (x, dy, blocks) = (
        normal(1, rows * side),
        normal(2, rows * side),
        normal(3, side * n),
    );
    let (x, dy) = (
        View::from_f32(&x, rows, side),
        View::from_f32(&dy, rows, side),
    );
    let (mut y, mut want) = (
        Tensor::zeros(DType::F32, rows, side),
        Tensor::zeros(DType::F32, rows, side),
    );
    product(y.view_mut(), x, View::from_f32(&blocks, side, n)).unwrap();
    matmul::nt(want.view_mut(), 0.0, 1.0, x, whole(&blocks, n).view()).unwrap();
    assert_close(&y.to_f32_vec(), &want.to_f32_vec());

    let (mut d, mut want) = (
        Tensor::zeros(DType::F32, side, n),
        Tensor::zeros(DType::F32, side, side),
    );
    gradient(d.view_mut(), dy, x).unwrap();
    matmul::tn(want.view_mut(), 0.0, 1.0, dy, x).unwrap();
    let want = want.to_f32_vec();
    let want: Vec<f32> = (0..side)
        .flat_map(|row| want[row * side + row / n * n..][..n].to_vec())
        .collect();
    assert_close(&d.to_f32_vec(), &want);
}

#[test]
fn other_shapes_are_refused() {
    let tensor = |rows, cols| Tensor::zeros(DType::F32, rows, cols);
    let (x, mut y) = (tensor(3, 6), tensor(3, 6));
    for (rows, cols) in [(6, 4), (5, 5), (6, 0)] {
        assert!(product(y.view_mut(), x.view(), tensor(rows, cols).view()).is_err());
        assert!(gradient(tensor(rows, cols).view_mut(), x.view(), x.view()).is_err());
    }
}
