use crate::test_support::{DTYPES, assert_same_bits, cuda_device, normal};
use crate::twins::assert_cuda_matches;
use crate::{DType, Device, Tensor};

#[test]
fn copies_and_fills_match_the_cpu() {
    for (from_dtype, to_dtype) in DTYPES.into_iter().flat_map(|f| DTYPES.map(|t| (f, t))) {
        for shape in [[0, 8], [3, 1], [5, 123], [7, 264], [1, 4096]] {
            let what = format!("{from_dtype} -> {to_dtype} {shape:?}");
            assert_cuda_matches(&what, |place| {
                let (from, mut to) = (
                    place.matrix(1, shape, from_dtype),
                    place.poisoned(shape, to_dtype),
                );
                to.view_mut().copy_from(from.view());
                let fills = [0.0, -0.3].map(|value| {
                    let mut filled = place.poisoned(shape, to_dtype);
                    filled.view_mut().fill(value);
                    (to_dtype, filled.values())
                });
                vec![(to_dtype, to.values())]
                    .into_iter()
                    .chain(fills)
                    .collect()
            });
        }
    }
}

#[test]
fn a_row_copied_in_pieces_is_the_row() {
    let gpu = cuda_device();
    let device = Device::Cuda(gpu.clone());
    let host = Tensor::from_f32(normal(1, 3 * 100), 3, 100);
    let from = host.to_device(&device);
    let mut to = Tensor::empty(&device, DType::Bf16, 3, 100);
    super::cuda::convert(&gpu, to.view_mut(), from.view(), 16).expect("copies");
    let want = host.to_dtype(DType::Bf16).to_f32_vec();
    assert_same_bits(&to.to_f32_vec(), &want, "f32 to bf16");
}

#[test]
fn values_survive_the_way_to_the_gpu_and_back() {
    let device = Device::Cuda(cuda_device());
    for (dtype, other) in DTYPES.into_iter().flat_map(|a| DTYPES.map(|b| (a, b))) {
        let host = Tensor::from_f32(normal(1, 5 * 21), 5, 21).to_dtype(dtype);
        // Pitched on one side, on the other, on both; converted on either way.
        let mut there = Tensor::zeros(other, 5, 30).to_device(&device);
        there.view_mut().columns(4..25).copy_from(host.view());
        let mut back = Tensor::zeros(dtype, 5, 23);
        back.view_mut()
            .columns(1..22)
            .copy_from(there.view().columns(4..25));
        let want = host.to_dtype(other).to_dtype(dtype).to_f32_vec();
        let got = back.view().columns(1..22).to_f32_vec();
        assert_same_bits(&got, &want, &format!("{dtype} by way of {other}"));
        assert_same_bits(
            &host.to_device(&device).to_f32_vec(),
            &host.to_f32_vec(),
            "dense",
        );
        let edges = there.to_f32_vec();
        assert!(
            edges
                .chunks(30)
                .all(|row| row[..4].iter().chain(&row[25..]).all(|&v| v == 0.0))
        );
    }
}
