use super::{Along, Composition, add_bank_gradient, add_logits_gradient, compose};
use crate::test_support::{Pitched, normal};
use crate::{DType, Tensor, View};

const VECTORS: usize = 6;
const LENGTH: usize = 3;
const TOPK: usize = 2;
/// A and B.
const GRID: [usize; 2] = [2, 4];

/// The pieces, one after the other, by definition, in f64.
fn pieces(logits: &[f64], bank: &[f64]) -> Vec<f64> {
    let mut out = Vec::new();
    for logits in logits.chunks(VECTORS) {
        let mut order: Vec<usize> = (0..VECTORS).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let chosen = &order[..TOPK];
        let total: f64 = chosen.iter().map(|&v| logits[v].exp()).sum();
        let weighted = |e: usize| {
            let term = |&v: &usize| logits[v].exp() / total * bank[v * LENGTH + e];
            chosen.iter().map(term).sum::<f64>()
        };
        out.extend((0..LENGTH).map(weighted));
    }
    out
}

fn shape(along: Along) -> [usize; 2] {
    match along {
        Along::Rows => [GRID[0], GRID[1] * LENGTH],
        Along::Columns => [GRID[0] * LENGTH, GRID[1]],
    }
}

/// Pieces one after the other as they lie in the matrix.
fn laid_out<T: Copy>(pieces: &[T], along: Along) -> Vec<T> {
    let [rows, cols] = shape(along);
    let at = |row: usize, column: usize| match along {
        Along::Rows => (row * GRID[1] + column / LENGTH) * LENGTH + column % LENGTH,
        Along::Columns => (row / LENGTH * GRID[1] + column) * LENGTH + row % LENGTH,
    };
    let places = (0..rows).flat_map(|row| (0..cols).map(move |column| (row, column)));
    places
        .map(|(row, column)| pieces[at(row, column)])
        .collect()
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

#[track_caller]
fn assert_close(got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        let error = (f64::from(*got) - want).abs();
        assert!(error <= 1e-5 * want.abs().max(1.0), "{got} for {want}");
    }
}

#[test]
fn the_matrix_and_its_gradients_are_those_of_their_definition() {
    let count = GRID[0] * GRID[1];
    let (logits, bank) = (normal(1, count * VECTORS), normal(2, VECTORS * LENGTH));
    let d = normal(3, count * LENGTH);
    let wide = [widened(&logits), widened(&bank)];
    let slopes = |part: usize| -> Vec<f64> {
        let slope = |at: usize| {
            let value = |step: f64| -> f64 {
                let mut moved = wide.clone();
                moved[part][at] += step;
                let made = pieces(&moved[0], &moved[1]);
                made.iter().zip(&d).map(|(v, d)| v * f64::from(*d)).sum()
            };
            // What is added to starts at 1.
            1.0 + (value(1e-5) - value(-1e-5)) / 2e-5
        };
        (0..wide[part].len()).map(slope).collect()
    };
    let want = [slopes(0), slopes(1)];
    for along in [Along::Rows, Along::Columns] {
        let of = Composition {
            logits: View::from_f32(&logits, count, VECTORS),
            bank: View::from_f32(&bank, VECTORS, LENGTH),
            topk: TOPK,
            along,
        };
        let mut out = Pitched::zeros(shape(along), DType::F32);
        compose(out.view_mut(), of).unwrap();
        assert_close(&out.values(), &laid_out(&pieces(&wide[0], &wide[1]), along));
        let d = Pitched::new(&laid_out(&d, along), shape(along), DType::F32);
        let ones = |rows, cols| Tensor::from_f32(vec![1.0; rows * cols], rows, cols);
        let (mut d_logits, mut d_bank) = (ones(count, VECTORS), ones(VECTORS, LENGTH));
        add_logits_gradient(d_logits.view_mut(), d.view(), of).unwrap();
        add_bank_gradient(d_bank.view_mut(), d.view(), of).unwrap();
        assert_close(&d_logits.to_f32_vec(), &want[0]);
        assert_close(&d_bank.to_f32_vec(), &want[1]);
    }
}

#[test]
fn other_shapes_are_refused() {
    let tensor = |rows, cols| Tensor::zeros(DType::F32, rows, cols);
    let (logits, bank) = (tensor(4, 6), tensor(6, 3));
    let with = |topk, along| Composition {
        logits: logits.view(),
        bank: bank.view(),
        topk,
        along,
    };
    compose(tensor(2, 6).view_mut(), with(2, Along::Rows)).unwrap();
    compose(tensor(6, 2).view_mut(), with(6, Along::Columns)).unwrap();
    for topk in [0, 7] {
        assert!(compose(tensor(2, 6).view_mut(), with(topk, Along::Rows)).is_err());
    }
    assert!(compose(tensor(2, 6).view_mut(), with(2, Along::Columns)).is_err());
    assert!(compose(tensor(2, 9).view_mut(), with(2, Along::Rows)).is_err());
    let d = tensor(2, 6);
    let of = with(2, Along::Rows);
    assert!(add_logits_gradient(tensor(6, 4).view_mut(), d.view(), of).is_err());
    assert!(add_bank_gradient(tensor(3, 6).view_mut(), d.view(), of).is_err());
}
