use super::{Beside, nn, nt, nt_beside, tn};
use crate::rng::Stream;
use crate::test_support::stream;
use crate::{DType, Error, Tensor, View, ViewMut};

type Op = fn(ViewMut<'_>, f32, f32, View<'_>, View<'_>) -> crate::Result<()>;

#[derive(Clone, Copy, Debug)]
enum Kind {
    Nt,
    Nn,
    Tn,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Nt, Self::Nn, Self::Tn];

    fn op(self) -> Op {
        match self {
            Self::Nt => nt,
            Self::Nn => nn,
            Self::Tn => tn,
        }
    }

    /// Stored shapes of a and b.
    fn shapes(self, m: usize, n: usize, k: usize) -> [[usize; 2]; 2] {
        match self {
            Self::Nt => [[m, k], [n, k]],
            Self::Nn => [[m, k], [k, n]],
            Self::Tn => [[k, m], [k, n]],
        }
    }

    /// (sum, sum of magnitudes) of element (i, j), in f64.
    fn dot(self, a: &[f32], b: &[f32], [m, n, k]: [usize; 3], [i, j]: [usize; 2]) -> (f64, f64) {
        (0..k).fold((0.0, 0.0), |(sum, size), l| {
            let (x, y) = match self {
                Self::Nt => (a[i * k + l], b[j * k + l]),
                Self::Nn => (a[i * k + l], b[l * n + j]),
                Self::Tn => (a[l * m + i], b[l * n + j]),
            };
            let product = f64::from(x) * f64::from(y);
            (sum + product, size + product.abs())
        })
    }
}

/// A random matrix with `gap` elements of NaN between its rows.
struct Padded {
    tensor: Tensor,
    cols: usize,
}

impl Padded {
    fn random(dtype: DType, [rows, cols]: [usize; 2], gap: usize, stream: &mut Stream) -> Self {
        let width = cols + gap;
        let values = (0..rows * width)
            .map(|i| {
                if i % width < cols {
                    stream.normal() as f32
                } else {
                    f32::NAN
                }
            })
            .collect();
        Self {
            tensor: Tensor::from_f32(values, rows, width).to_dtype(dtype),
            cols,
        }
    }

    fn view(&self) -> View<'_> {
        self.tensor.view().columns(0..self.cols)
    }

    fn view_mut(&mut self) -> ViewMut<'_> {
        self.tensor.view_mut().columns(0..self.cols)
    }
}

fn check(kind: Kind, [m, n, k]: [usize; 3], dtypes: [DType; 3], [beta, alpha]: [f32; 2]) {
    let mut stream = stream((m * 1_000_003 + n * 1009 + k) as u64);
    let [a_shape, b_shape] = kind.shapes(m, n, k);
    let a = Padded::random(dtypes[1], a_shape, 5, &mut stream);
    let b = Padded::random(dtypes[2], b_shape, 3, &mut stream);
    let mut dst = Padded::random(dtypes[0], [m, n], 7, &mut stream);
    let before = dst.view().to_f32_vec();
    if beta == 0.0 {
        dst.view_mut().fill(f32::NAN);
    }
    kind.op()(dst.view_mut(), beta, alpha, a.view(), b.view()).expect("shapes fit");
    let (a, b, got) = (
        a.view().to_f32_vec(),
        b.view().to_f32_vec(),
        dst.view().to_f32_vec(),
    );
    for i in 0..m {
        for j in 0..n {
            let (sum, size) = kind.dot(&a, &b, [m, n, k], [i, j]);
            let want = f64::from(alpha) * sum + f64::from(beta) * f64::from(before[i * n + j]);
            let size = size + want.abs();
            // f32: rounding of a running sum. bf16: one rounding of the result, at most 2^-8.
            let rounding = if dtypes[0] == DType::F32 {
                0.0
            } else {
                want.abs() / 255.0
            };
            let error = (f64::from(got[i * n + j]) - want).abs();
            assert!(
                error <= 1e-6 * size + 1e-6 + rounding,
                "{kind:?} [{m},{n},{k}] {dtypes:?} beta {beta}: [{i},{j}] is {}, expected {want}",
                got[i * n + j]
            );
        }
    }
    // The gaps between the rows of dst stay untouched.
    let all = dst.tensor.to_f32_vec();
    let width = n + 7;
    assert!(
        all.iter()
            .enumerate()
            .all(|(i, v)| i % width < n || v.is_nan())
    );
}

const SHAPES: [[usize; 3]; 14] = [
    [1, 1, 1],
    [1, 17, 3],
    [3, 1, 123],
    [17, 3, 0],
    [123, 17, 16],
    [49, 123, 1],
    [64, 16, 130],
    [16, 200, 300],
    [1, 700, 600],
    [300, 2, 40],
    [70, 401, 33],
    [513, 65, 31],
    [600, 390, 5],
    [52, 50, 1021], // b has a pitch of 1024: transposed first
];

#[test]
fn f32_products_match_f64_loops_on_odd_shapes_and_pitched_views() {
    for kind in Kind::ALL {
        for shape in SHAPES {
            for factors in [[0.0, 1.0], [1.0, 1.0], [1.0, 0.3], [-0.5, 2.0]] {
                check(kind, shape, [DType::F32; 3], factors);
            }
        }
    }
}

#[test]
fn bf16_and_mixed_products_round_once() {
    use DType::{Bf16, F32};
    for kind in Kind::ALL {
        for shape in SHAPES {
            for dtypes in [
                [Bf16, Bf16, Bf16],
                [F32, Bf16, Bf16],
                [F32, F32, Bf16],
                [F32, Bf16, F32],
                [Bf16, F32, F32],
            ] {
                check(kind, shape, dtypes, [0.0, 1.0]);
                check(kind, shape, dtypes, [1.0, 0.25]);
            }
        }
    }
}

#[test]
fn no_tokens_and_no_depth_are_legal() {
    for kind in Kind::ALL {
        for shape in [[0, 5, 7], [5, 0, 7], [0, 0, 0], [5, 7, 0]] {
            check(kind, shape, [DType::F32; 3], [0.0, 1.0]);
            check(
                kind,
                shape,
                [DType::Bf16, DType::F32, DType::Bf16],
                [1.0, 1.0],
            );
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let mut stream = stream(3);
    for kind in Kind::ALL {
        for shape @ [m, n, k] in [
            [1024, 256, 256],
            [700, 16, 500],
            [16, 900, 300],
            [700, 2304, 16],
            [1, 4000, 300],
            [130, 390, 1023],
            [600, 100, 77],
        ] {
            for dtype in [DType::F32, DType::Bf16] {
                let [a_shape, b_shape] = kind.shapes(m, n, k);
                let a = Padded::random(dtype, a_shape, 0, &mut stream);
                let b = Padded::random(dtype, b_shape, 1, &mut stream);
                let results = [1, 2, 3].map(|threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    let mut dst = Tensor::zeros(dtype, m, n);
                    pool.expect("threads start").install(|| {
                        kind.op()(dst.view_mut(), 0.0, 1.0, a.view(), b.view())
                            .expect("shapes fit");
                    });
                    dst.to_f32_vec()
                        .into_iter()
                        .map(f32::to_bits)
                        .collect::<Vec<_>>()
                });
                assert!(
                    results[0] == results[1],
                    "{kind:?} {shape:?} {dtype}: 1 and 2 threads"
                );
                assert!(
                    results[0] == results[2],
                    "{kind:?} {shape:?} {dtype}: 1 and 3 threads"
                );
            }
        }
    }
}

/// A token's result must not depend on which tokens share its batch.
#[test]
fn bits_of_a_row_do_not_depend_on_the_number_of_rows() {
    let mut stream = stream(4);
    for kind in [Kind::Nt, Kind::Nn] {
        for [n, k] in [
            [16, 64],
            [64, 16],
            [4, 700],
            [128, 1536],
            [1000, 2049],
            [1, 33],
        ] {
            let m = 150;
            let [a_shape, b_shape] = kind.shapes(m, n, k);
            let a = Padded::random(DType::F32, a_shape, 0, &mut stream);
            let b = Padded::random(DType::F32, b_shape, 1, &mut stream);
            let product = |rows: usize| {
                let mut dst = Tensor::zeros(DType::F32, rows, n);
                let a = a.view().row_range(0..rows);
                kind.op()(dst.view_mut(), 0.0, 1.0, a, b.view()).expect("shapes fit");
                dst.to_f32_vec()
                    .into_iter()
                    .map(f32::to_bits)
                    .collect::<Vec<_>>()
            };
            let whole = product(m);
            for rows in [2, 3, 5, 17, 64, 65] {
                assert!(
                    product(rows) == whole[..rows * n],
                    "{kind:?} {n} {k}: {rows} rows"
                );
            }
        }
    }
}

/// Products beside one another are those that stand alone, to the bit, on any number of threads.
#[test]
fn products_beside_one_another_are_those_alone() {
    let mut stream = stream(5);
    for (dst_type, a_type, b_type) in [
        (DType::F32, DType::F32, DType::F32),
        (DType::Bf16, DType::F32, DType::Bf16),
        (DType::Bf16, DType::Bf16, DType::Bf16),
    ] {
        for [m, n, k, gap] in [
            [256, 700, 1024, 0], // b is transposed first
            [256, 700, 1023, 3],
            [1, 500, 1024, 0],
            [2, 400, 600, 0], // little work without those beside
            [0, 40, 64, 0],
            [700, 390, 600, 1],
            [3, 6, 7, 1],
            [4200, 100, 33, 0],
        ] {
            let a = Padded::random(a_type, [m, k], 0, &mut stream);
            let b = Padded::random(b_type, [n, k], gap, &mut stream);
            // Parts of one row range each, two over the same, one of no rows.
            let ranges = [0..n / 3, n / 3..n, n / 3..n, n..n];
            let beside: Vec<Padded> = [16, 2, 60, 4]
                .iter()
                .map(|&rows| Padded::random(a_type, [rows, k], 2, &mut stream))
                .collect();
            let alone = |a: &Padded, b: View<'_>, dtype| {
                let mut dst = Tensor::zeros(dtype, a.view().rows(), b.rows());
                nt(dst.view_mut(), 0.0, 1.0, a.view(), b).expect("shapes fit");
                dst.to_f32_vec()
            };
            let mut want = vec![alone(&a, b.view(), dst_type)];
            for (a, rows) in beside.iter().zip(&ranges) {
                want.push(alone(a, b.view().row_range(rows.clone()), DType::F32));
            }
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                let mut dst = Padded::random(dst_type, [m, n], 3, &mut stream);
                let mut results: Vec<Tensor> = beside
                    .iter()
                    .zip(&ranges)
                    .map(|(a, rows)| Tensor::zeros(DType::F32, a.view().rows(), rows.len()))
                    .collect();
                let others = beside.iter().zip(&ranges).zip(&mut results);
                let others = others.map(|((a, rows), dst)| Beside {
                    a: a.view(),
                    rows: rows.clone(),
                    dst: dst.view_mut(),
                });
                let others = others.collect();
                pool.expect("threads start").install(|| {
                    nt_beside(dst.view_mut(), a.view(), b.view(), others).expect("shapes fit");
                });
                let mut got = vec![dst.view().to_f32_vec()];
                got.extend(results.iter().map(Tensor::to_f32_vec));
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let what = format!("{b_type} {m} {n} {k}, {threads} threads, product {i}");
                    assert!(got == want, "{what}");
                }
            }
        }
    }
}

#[test]
fn products_beside_that_do_not_fit_are_refused() {
    let [a, b] = [[2, 3], [4, 3]].map(|[rows, cols]| Tensor::zeros(DType::F32, rows, cols));
    let with = |rows: std::ops::Range<usize>, mut other: Tensor| {
        let mut dst = Tensor::zeros(DType::F32, 2, 4);
        let dst_view = other.view_mut();
        let beside = Beside {
            a: a.view(),
            rows,
            dst: dst_view,
        };
        nt_beside(dst.view_mut(), a.view(), b.view(), vec![beside])
    };
    let tensor = |dtype, cols| Tensor::zeros(dtype, 2, cols);
    assert!(with(1..4, tensor(DType::F32, 3)).is_ok());
    let error = with(1..5, tensor(DType::F32, 4)).expect_err("b has 4 rows");
    assert!(error.to_string().contains("rows 1..5"), "{error}");
    assert!(with(1..4, tensor(DType::F32, 2)).is_err());
    assert!(with(1..4, tensor(DType::Bf16, 3)).is_err());
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let (a, b) = (
        Tensor::zeros(DType::F32, 2, 3),
        Tensor::zeros(DType::F32, 4, 5),
    );
    let mut dst = Tensor::zeros(DType::F32, 2, 4);
    for kind in Kind::ALL {
        let error = kind.op()(dst.view_mut(), 0.0, 1.0, a.view(), b.view());
        assert!(matches!(error, Err(Error::Shape { .. })), "{kind:?}");
    }
    let b = Tensor::zeros(DType::F32, 5, 3);
    let error = nt(dst.view_mut(), 0.0, 1.0, a.view(), b.view()).expect_err("dst is [2,4]");
    assert_eq!(
        error.to_string(),
        "matmul::nt: dst [M,N] is [2, 4] [rows, columns], expected [2, 5]"
    );
}
