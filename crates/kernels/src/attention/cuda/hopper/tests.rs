//! Tiles that the copy engine brings against those that threads copy.

use super::for_tests::with;
use crate::attention::cuda::Engine;
use crate::attention::cuda::tests::{both_passes, bounds, config};
use crate::attention::{Config, forward};
use crate::cuda::{BoxedTensor, Captured};
use crate::test_support::{assert_same_bits, cuda_device, new_cuda_device, normal};
use crate::twins::Place;
use crate::{DType, Device, Indices, Tensor};

/// Both passes of `config` over `lengths`, in every layout in memory.
fn assert_boxes_are_copies(config: &Config, lengths: &[u32]) {
    for place in Place::each_on(&Device::Cuda(cuda_device())) {
        let run = || both_passes(&place, config, lengths, DType::Bf16);
        let Some((copies, boxes)) = with(Engine::Wgmma, run).zip(with(Engine::Tma, run)) else {
            return;
        };
        for (i, ((_, copies), (_, boxes))) in copies.iter().zip(&boxes).enumerate() {
            let what = format!("{config:?} {lengths:?}, result {i}");
            assert_same_bits(boxes, copies, &what);
        }
    }
}

#[test]
fn boxes_give_the_bits_of_copies() {
    for (heads, lengths) in [
        ([2, 1, 8], &[1, 0, 31, 65][..]),
        ([4, 2, 64], &[193, 70]),
        ([2, 2, 80], &[3, 20]),
        ([1, 1, 96], &[49]),
        ([3, 1, 104], &[130, 5]),
        ([2, 1, 128], &[129, 97]),
    ] {
        assert_boxes_are_copies(&config(heads), lengths);
    }
}

#[test]
fn boxes_know_windows_and_softcaps() {
    for heads in [[2, 1, 64], [2, 1, 128]] {
        let config = Config {
            window: Some(40),
            softcap: Some(2.0),
            ..config(heads)
        };
        assert_boxes_are_copies(&config, &[200, 30]);
    }
}

#[test]
fn boxes_are_taken_where_rows_are_aligned() {
    let device = new_cuda_device();
    let on = Device::Cuda(device.clone());
    let kernels = |place: &Place, heads| {
        device.start_profile().expect("no other profile");
        both_passes(place, &config(heads), &[20, 5], DType::Bf16);
        let times = device.take_profile().expect("there is one");
        times.into_iter().map(|time| time.name).collect::<Vec<_>>()
    };
    let expected = |engine| {
        ["forward", "backward_q", "backward_kv"].map(|k| format!("attention_{k}_{engine}"))
    };
    for (layout, place) in Place::each_on(&on).enumerate() {
        for (heads, engine) in [
            // The rows of the last layout start anywhere.
            ([2, 1, 64], if layout < 2 { "tma" } else { "wgmma" }),
            ([2, 1, 20], "wgmma"),
            ([2, 1, 96], "bf16"),
        ] {
            let Some(names) = with(Engine::Tma, || kernels(&place, heads)) else {
                return;
            };
            for name in expected(engine) {
                assert!(
                    names.contains(&name),
                    "{layout} {heads:?}: {name}: {names:?}"
                );
            }
        }
    }
}

#[test]
fn a_recorded_graph_reads_what_its_tensors_hold_later() {
    let device = new_cuda_device();
    let on = Device::Cuda(device.clone());
    let (config, rows) = (config([2, 1, 64]), 90);
    let matrix = |seed, width| {
        let values = Tensor::from_f32(normal(seed, rows * width), rows, width);
        values.to_dtype(DType::Bf16).to_device(&on)
    };
    let [k, v] = [2, 3].map(|seed| matrix(seed, 64));
    let cu = Indices::new(bounds(&[60, 30]), &on);
    let run = |q: &Tensor, out: &mut Tensor, lse: &mut Tensor| {
        let (to, sums) = (out.view_mut(), lse.view_mut());
        forward(&config, q.view(), k.view(), v.view(), &cu, &cu, to, sums)
    };
    with(Engine::Tma, || {
        let [mut q, other] = [1, 4].map(|seed| matrix(seed, 128));
        let mut out = Tensor::empty(&on, DType::Bf16, rows, 128);
        let mut lse = Tensor::empty(&on, DType::F32, rows, 2);
        let expected = [&q, &other].map(|q| {
            run(q, &mut out, &mut lse).expect("runs");
            out.to_f32_vec()
        });
        let captured = device.capture(|| run(&q, &mut out, &mut lse));
        let Ok(Captured::Graph(graph)) = captured else {
            panic!("{captured:?}");
        };
        for (what, expected) in ["as it was", "changed"].iter().zip(&expected) {
            graph.launch().expect("runs");
            assert_same_bits(&out.to_f32_vec(), expected, what);
            q.view_mut().copy_from(other.view());
        }
    });
}

#[test]
fn what_the_copy_engine_cannot_read_is_refused() {
    let device = cuda_device();
    let memory = device.alloc(64 * 1024);
    let good = BoxedTensor {
        address: memory.ptr(),
        shape: [64, 2, 20],
        strides: [128, 512],
        box_shape: [64, 1, 16],
    };
    device.tensor_map(&good).expect("as it has to be");
    for (bad, strides) in [(8, [128, 512]), (0, [120, 512]), (0, [128, 520])] {
        let tensor = BoxedTensor {
            address: memory.ptr() + bad,
            strides,
            ..good
        };
        let error = device
            .tensor_map(&tensor)
            .map(|_| ())
            .expect_err("not aligned to 16");
        assert!(error.to_string().contains("copy engine"), "{error}");
    }
}
