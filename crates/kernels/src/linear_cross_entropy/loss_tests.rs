//! Label smoothing, and what becomes of the logits before the softmax, against their definitions
//! through candle's tape.

use super::tests::{case, labels};
use super::{Accumulator, Head, Labels};
use crate::{DType, Error, Indices, Tensor, View, Workspace};
use candle_core::{D, Device, Result, Tensor as Oracle, Var};

const SIZES: [[usize; 4]; 3] = [[5, 8, 131, 4], [3, 4, 1, 3], [40, 7, 2051, 33]];

#[test]
fn label_smoothing_is_the_mean_over_the_vocabulary() -> Result<()> {
    compare(0.1, 1.0, None)
}

#[test]
fn logits_are_scaled_and_then_capped() -> Result<()> {
    compare(0.0, 0.3, None)?;
    compare(0.0, 1.0, Some(2.5))?;
    compare(0.1, 0.7, Some(4.0))
}

#[test]
fn a_softcap_that_bounds_nothing_is_refused() {
    let (hidden, head) = (
        Tensor::zeros(DType::F32, 2, 4),
        Tensor::zeros(DType::F32, 3, 4),
    );
    let (rows, workspace) = (Indices::host(vec![1]), Workspace::new(2));
    for softcap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let head = Head {
            softcap: Some(softcap),
            ..head.view().into()
        };
        let mut sums = Accumulator::default();
        let refused = super::forward(
            hidden.view(),
            head,
            labels(&rows, &rows),
            &mut sums,
            &workspace,
        );
        assert!(matches!(refused, Err(Error::Invalid { .. })), "{softcap}");
    }
}

fn compare(smoothing: f64, scale: f64, softcap: Option<f64>) -> Result<()> {
    for sizes in SIZES {
        let case = case(sizes, [DType::F32; 2]);
        let (hidden, weight) = (case.hidden(), case.head());
        let head = Head {
            scale: scale as f32,
            softcap: softcap.map(|c| c as f32),
            ..weight.into()
        };
        let workspace = Workspace::new(sizes[0]);
        let (rows, targets) = (Indices::host(&case.rows), Indices::host(&case.targets));
        let labels = Labels {
            smoothing: smoothing as f32,
            ..labels(&rows, &targets)
        };
        let mut d_hidden = Tensor::zeros(DType::F32, sizes[0], sizes[1]);
        let mut d_head = Tensor::zeros(DType::F32, sizes[2], sizes[1]);
        let mut sums = Accumulator::default();
        let (dx, dw) = (d_hidden.view_mut(), Some(d_head.view_mut()));
        super::forward_backward(hidden, head, labels, dx, dw, &mut sums, &workspace)
            .expect("valid");
        let sums = sums.read().expect("a CPU does not fail");
        let mut alone = Accumulator::default();
        super::forward(hidden, head, labels, &mut alone, &workspace).expect("valid");
        assert_eq!(alone.read().expect("a CPU does not fail"), sums);

        let device = Device::Cpu;
        let oracle =
            |view: View<'_>| Var::from_vec(view.to_f32_vec(), (view.rows(), view.cols()), &device);
        let (x, w) = (oracle(hidden)?, oracle(weight)?);
        let rows = Oracle::from_slice(&case.rows, case.rows.len(), &device)?;
        let targets = Oracle::from_slice(&case.targets, (case.targets.len(), 1), &device)?;
        let mut z = (x.index_select(&rows, 0)?.matmul(&w.t()?)? * scale)?;
        if let Some(softcap) = softcap {
            z = ((z / softcap)?.tanh()? * softcap)?;
        }
        let max = z.max_keepdim(D::Minus1)?.detach();
        let log_z = z
            .broadcast_sub(&max)?
            .exp()?
            .sum_keepdim(D::Minus1)?
            .log()?;
        let minus_log_p = (log_z + max)?.broadcast_sub(&z)?;
        let nll = minus_log_p.gather(&targets, 1)?.sum_all()?;
        let spread = (minus_log_p.sum_all()? / sizes[2] as f64)?;
        let loss = ((nll * (1.0 - smoothing))? + (spread * smoothing)?)?;
        let grads = loss.backward()?;
        let expected = f64::from(loss.to_scalar::<f32>()?);
        assert!(
            (sums.loss - expected).abs() <= 1e-5 * expected,
            "{} {expected}",
            sums.loss
        );
        for (ours, theirs) in [(&d_hidden, &x), (&d_head, &w)] {
            let theirs = grads.get(theirs).expect("the oracle has a gradient");
            let theirs = theirs.flatten_all()?.to_vec1::<f32>()?;
            let largest = theirs.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
            for (a, b) in ours.to_f32_vec().iter().zip(&theirs) {
                assert!((a - b).abs() <= 1e-5 * largest.max(1e-3), "{a} {b}");
            }
        }
    }
    Ok(())
}
