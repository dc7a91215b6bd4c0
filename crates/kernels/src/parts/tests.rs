use super::{Blocks, Draws, Rows, blocks, rows};
use crate::rng::{Stream, mix};
use crate::{DType, Indices, Tensor};

const KEY: u64 = 77;

fn drawn(count: usize, step: u32, draw: impl FnOnce(&mut Tensor, Draws<'_>)) -> Vec<f32> {
    let steps = Indices::host(vec![5, step]);
    let mut out = Tensor::from_f32(vec![f32::NAN; count], count, 1);
    let draws = Draws {
        key: KEY,
        steps: &steps,
    };
    draw(&mut out, draws);
    out.to_f32_vec()
}

#[test]
fn rows_stay_as_the_numbers_of_the_step_say() {
    let (mut left_out, mut all) = (0, 0);
    for step in 0..200 {
        for scaled in [false, true] {
            let of = Rows {
                rows: 0.4,
                module: 0.25,
                scaled,
            };
            let got = drawn(11, step, |out, draws| {
                rows(out.view_mut(), draws, of).unwrap();
            });
            let mut stream = Stream::new(mix(KEY, u64::from(step)));
            let module = stream.uniform() >= 0.25;
            let stays: Vec<bool> = (0..11)
                .map(|_| module & (stream.uniform() >= 0.4))
                .collect();
            let count = stays.iter().filter(|stays| **stays).count();
            let factor = if scaled { 11.0 / count as f32 } else { 1.0 };
            let want: Vec<f32> = stays
                .iter()
                .map(|s| if *s { factor } else { 0.0 })
                .collect();
            assert_eq!(got, want, "step {step}");
            left_out += usize::from(!module);
            all += 1;
        }
    }
    assert!((50..150).contains(&left_out), "{left_out} of {all}");
}

#[test]
fn as_many_blocks_as_asked_are_left_out_of_the_group_that_is_drawn() {
    let mut times = [0; 9];
    for step in 0..300 {
        let of = |group| Blocks {
            left_out: 2,
            groups: 3,
            group,
        };
        let made: Vec<Vec<f32>> = (0..3)
            .map(|group| {
                drawn(3, step, |out, draws| {
                    blocks(out.view_mut(), draws, of(group)).unwrap();
                })
            })
            .collect();
        let all = made.concat();
        assert_eq!(all.iter().filter(|f| **f == 0.0).count(), 2, "step {step}");
        assert_eq!(made.iter().filter(|of| of.contains(&0.0)).count(), 1);
        for (times, factor) in times.iter_mut().zip(all) {
            *times += usize::from(factor == 0.0);
        }
    }
    // 300 * 2 / 9 on average, with a deviation of 7.2.
    assert!(
        times.iter().all(|times| (38..96).contains(times)),
        "{times:?}"
    );
}

#[test]
fn what_cannot_be_drawn_is_refused() {
    let steps = Indices::host(vec![1]);
    let none = Indices::host(Vec::new());
    let mut out = Tensor::zeros(DType::F32, 4, 1);
    let draws = |steps| Draws { key: 1, steps };
    let of = |left_out, group| Blocks {
        left_out,
        groups: 2,
        group,
    };
    blocks(out.view_mut(), draws(&steps), of(4, 1)).unwrap();
    assert!(blocks(out.view_mut(), draws(&steps), of(5, 1)).is_err());
    assert!(blocks(out.view_mut(), draws(&steps), of(1, 2)).is_err());
    assert!(blocks(out.view_mut(), draws(&none), of(1, 0)).is_err());
    let mut wide = Tensor::zeros(DType::F32, 1, 4);
    assert!(blocks(wide.view_mut(), draws(&steps), of(1, 0)).is_err());
}
