use super::{Factors, Weight, backward, copy, down, forward, place, room, up_backward};
use crate::test_support::{DTYPES, cuda_device, normal};
use crate::twins::assert_cuda_matches;
use crate::{DType, Device, Tensor, View, matmul};

const T: usize = 37;

/// Two updates over W `[out, in]`, of 20 and the other rows, of ranks 5 and 3; the second first among the ranks.
struct Case {
    out: usize,
    inputs: usize,
}

const CASES: [Case; 2] = [
    Case {
        out: 48,
        inputs: 40,
    },
    Case {
        out: 29,
        inputs: 21,
    },
];
const SPLIT: usize = 20;
const SCALES: [f32; 2] = [0.5, 1.7];

impl Case {
    fn ranks(&self) -> usize {
        room(5 + 3)
    }

    fn factors(&self, device: &Device) -> [[Tensor; 2]; 2] {
        let dense = |seed, rows, cols| {
            Tensor::from_f32(normal(seed, rows * cols), rows, cols).to_device(device)
        };
        let (out, inputs) = (self.out, self.inputs);
        [
            [dense(1, 5, inputs), dense(2, SPLIT, 5)],
            [dense(3, 3, inputs), dense(4, out - SPLIT, 3)],
        ]
    }

    /// W~ of random W, zero margins and these factors.
    fn weight(&self, dtype: DType, device: &Device) -> Tensor {
        let (ranks, [out, inputs]) = (self.ranks(), [self.out, self.inputs]);
        let mut wide = Tensor::zeros(DType::F32, out + ranks, inputs + ranks);
        let values = normal(5, out * inputs);
        let base = wide.view_mut().row_range(0..out).columns(0..inputs);
        base.copy_from(View::from_f32(&values, out, inputs));
        let mut weight = wide.to_dtype(dtype).to_device(device);
        let [first, second] = self.factors(device);
        let update = |[a, b]: &[Tensor; 2], scale, row, rank| {
            let factors = Factors {
                a: a.view(),
                b: b.view(),
                scale,
                row,
                rank,
            };
            place(weight.view_mut(), ranks, &[factors]).expect("fits");
        };
        let mut update = update;
        update(&first, SCALES[0], 0, 3);
        update(&second, SCALES[1], SPLIT, 0);
        weight
    }
}

#[test]
fn one_product_is_the_base_and_its_updates() {
    for case in &CASES {
        let [out, inputs] = [case.out, case.inputs];
        let ranks = case.ranks();
        let weight = case.weight(DType::F32, &Device::Cpu);
        let weight = Weight::new(weight.view(), ranks).expect("has margins");
        assert_eq!(weight.shape(), [out, inputs]);
        let (x, dy) = (normal(7, T * inputs), normal(8, T * out));
        let (x, dy) = (View::from_f32(&x, T, inputs), View::from_f32(&dy, T, out));

        // W + s B A, linear by linear.
        let mut whole = Tensor::zeros(DType::F32, out, inputs);
        whole.view_mut().copy_from(weight.base());
        let factors = case.factors(&Device::Cpu);
        let rows = [0..SPLIT, SPLIT..out];
        for (([a, b], rows), scale) in factors.iter().zip(rows).zip(SCALES) {
            let to = whole.view_mut().row_range(rows);
            matmul::nn(to, 1.0, scale, b.view(), a.view()).expect("fits");
        }
        let mut expected = [
            Tensor::zeros(DType::F32, T, out),
            Tensor::zeros(DType::F32, T, inputs),
        ];
        matmul::nt(expected[0].view_mut(), 0.0, 1.0, x, whole.view()).expect("fits");
        matmul::nn(expected[1].view_mut(), 0.0, 1.0, dy, whole.view()).expect("fits");

        let found = both(&weight, x, dy, DType::F32, &Device::Cpu);
        for (found, expected) in found.iter().zip(&expected) {
            let expected = expected.to_f32_vec();
            for (f, e) in found.to_f32_vec().iter().zip(&expected) {
                assert!((f - e).abs() < 1e-4 * (1.0 + e.abs()), "{f} is not {e}");
            }
        }
    }
}

/// y and dx of `x [T,in]` and `dy [T,out]`, by products with room behind theirs.
fn both(
    weight: &Weight<'_>,
    x: View<'_>,
    dy: View<'_>,
    dtype: DType,
    device: &Device,
) -> [Tensor; 2] {
    let ([out, inputs], ranks) = (weight.shape(), weight.ranks());
    let tensor = |cols| Tensor::empty(device, dtype, T, cols);
    let wide = |values: View<'_>| {
        let mut wide = tensor(values.cols() + ranks + 16);
        wide.view_mut().fill(f32::NAN);
        wide.view_mut().columns(0..values.cols()).copy_from(values);
        wide
    };
    let (mut wide_x, mut wide_dy) = (wide(x), wide(dy));
    let [mut y, mut dx] = [tensor(out), tensor(inputs)];
    down(wide_x.view_mut(), weight).expect("fits");
    forward(wide_x.view(), weight, y.view_mut()).expect("fits");
    up_backward(wide_dy.view_mut(), weight).expect("fits");
    backward(wide_dy.view(), weight, dx.view_mut()).expect("fits");
    [y, dx]
}

#[test]
fn cuda_matches() {
    for dtype in DTYPES {
        for case in &CASES {
            let what = format!("{dtype} {} {}", case.out, case.inputs);
            assert_cuda_matches(&what, |place| {
                let weight = case.weight(dtype, place.device());
                let parts = Weight::new(weight.view(), case.ranks()).expect("has margins");
                let x = place.matrix(7, [T, case.inputs], dtype);
                let dy = place.matrix(8, [T, case.out], dtype);
                let stored = x.view().dtype();
                let [y, dx] = both(&parts, x.view(), dy.view(), stored, place.device());
                let results = [&y, &dx].map(|t| (dtype, t.to_f32_vec()));
                results.to_vec()
            });
        }
    }
}

#[test]
fn narrow_copies_are_exact() {
    for dtype in DTYPES {
        for cols in [1, 16, 21] {
            assert_cuda_matches(&format!("{dtype} {cols}"), |place| {
                let from = place.matrix(1, [T, cols], dtype);
                let mut to = place.poisoned([T, cols], dtype);
                copy(to.view_mut(), from.view()).expect("of one shape");
                vec![(DType::F32, to.values())]
            });
        }
    }
}

#[test]
fn the_margins_have_the_bits_of_the_cpu() {
    let device = Device::Cuda(cuda_device());
    for dtype in DTYPES {
        for case in &CASES {
            let [cpu, cuda] =
                [Device::Cpu, device.clone()].map(|d| case.weight(dtype, &d).to_f32_vec());
            assert_eq!(cpu, cuda, "{dtype} {}", case.out);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = &CASES[0];
    let mut weight = case.weight(DType::F32, &Device::Cpu);
    let [[a, b], _] = case.factors(&Device::Cpu);
    let mut refused = |row, rank, ranks| {
        let factors = Factors {
            a: a.view(),
            b: b.view(),
            scale: 1.0,
            row,
            rank,
        };
        place(weight.view_mut(), ranks, &[factors])
            .expect_err("refused")
            .to_string()
    };
    assert!(refused(case.out, 0, case.ranks()).contains("margins"));
    assert!(refused(0, case.ranks(), case.ranks()).contains("margins"));
    assert!(refused(0, 0, 1000).contains("W~"));
}
