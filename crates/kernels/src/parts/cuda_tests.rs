use super::{Blocks, Draws, Rows, blocks, rows};
use crate::twins::assert_cuda_matches;
use crate::{DType, Tensor};

/// Draws are decisions: those of the host, not nearly so.
#[test]
fn matches_the_cpu() {
    for (count, step) in [(1, 0), (2, 1), (7, 2), (123, 3), (2000, 1 << 20)] {
        assert_cuda_matches(&format!("{count} {step}"), |place| {
            let steps = place.indices(&[9, step]);
            let draws = Draws {
                key: 0x1234_5678_9abc_def0,
                steps: &steps,
            };
            let column = || Tensor::zeros(DType::F32, count, 1).to_device(place.device());
            let mut made = Vec::new();
            for (p_rows, module, scaled) in [
                (0.3, 0.0, false),
                (0.5, 0.4, true),
                (1.0, 0.0, true),
                (0.0, 1.0, false),
            ] {
                let mut out = column();
                let of = Rows {
                    rows: p_rows,
                    module,
                    scaled,
                };
                rows(out.view_mut(), draws, of).unwrap();
                made.push((DType::F32, out.to_f32_vec()));
            }
            for (left_out, groups) in [(count, 1), (count / 2, 1), (count.div_ceil(3), 3)] {
                for group in 0..groups {
                    let mut out = column();
                    let of = Blocks {
                        left_out,
                        groups,
                        group,
                    };
                    blocks(out.view_mut(), draws, of).unwrap();
                    made.push((DType::F32, out.to_f32_vec()));
                }
            }
            made
        });
    }
}
