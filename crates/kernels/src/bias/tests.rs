use crate::{DType, Result, Tensor, View, ViewMut};

// The operations, over slices of host memory.
fn add(y: ViewMut<'_>, bias: &[f32]) -> Result<()> {
    super::add(y, View::vector(bias))
}

fn backward(dy: View<'_>, d_bias: &mut [f32]) -> Result<()> {
    super::backward(dy, ViewMut::vector(d_bias))
}

fn matrix(rows: usize, cols: usize) -> Tensor {
    Tensor::from_f32(
        (0..rows * cols).map(|i| (i % 17) as f32 - 8.0).collect(),
        rows,
        cols,
    )
}

#[test]
fn adds_to_each_row_and_sums_columns() {
    for dtype in [DType::F32, DType::Bf16] {
        for (rows, cols) in [(0, 5), (1, 1), (3, 1025)] {
            let mut y = matrix(rows, cols).to_dtype(dtype);
            let before = y.to_f32_vec();
            let bias: Vec<f32> = (0..cols).map(|c| (c % 5) as f32).collect();
            add(y.view_mut(), &bias).expect("shapes agree");
            let after = y.to_f32_vec();
            assert!((0..rows * cols).all(|i| after[i] == before[i] + bias[i % cols]));
            let mut d_bias = vec![1.0; cols];
            backward(y.view(), &mut d_bias).expect("shapes agree");
            for (c, d) in d_bias.iter().enumerate() {
                let want: f32 = 1.0 + (0..rows).map(|r| after[r * cols + c]).sum::<f32>();
                assert_eq!(*d, want);
            }
        }
    }
}

#[test]
fn wrong_length_is_refused() {
    let mut y = matrix(2, 3);
    assert!(add(y.view_mut(), &[0.0; 2]).is_err());
    assert!(backward(y.view(), &mut [0.0; 4]).is_err());
}

#[test]
fn a_scale_multiplies_the_bias_and_its_gradient() {
    let mut y = matrix(3, 4);
    let before = y.to_f32_vec();
    let bias = [1.0, -2.0, 3.0, 0.5];
    super::add_scaled(y.view_mut(), 2.5, View::vector(&bias)).expect("shapes agree");
    let after = y.to_f32_vec();
    assert!((0..12).all(|i| after[i] == before[i] + 2.5 * bias[i % 4]));
    let mut d_bias = [1.0; 4];
    super::backward_scaled(y.view(), 0.5, ViewMut::vector(&mut d_bias)).expect("shapes agree");
    for (c, d) in d_bias.iter().enumerate() {
        let sum: f32 = (0..3).map(|r| after[r * 4 + c]).sum();
        assert_eq!(*d, 1.0 + 0.5 * sum);
    }
}
