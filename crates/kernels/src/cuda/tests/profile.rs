use super::uploaded;
use crate::cuda::LaunchTime;
use crate::test_support::{new_cuda_device, normal};
use crate::{Device, Tensor, matmul};

#[test]
fn a_profile_has_every_launch_between_start_and_end() {
    let device = new_cuda_device();
    let memory = uploaded(&device, &[1_u32; 4]);
    let place = Device::Cuda(device.clone());
    let matrix =
        |rows, cols| Tensor::from_f32(normal(1, rows * cols), rows, cols).to_device(&place);
    let (a, b, mut dst) = (matrix(3, 5), matrix(4, 5), matrix(3, 4));
    let mut product = |beta| matmul::nt(dst.view_mut(), beta, 1.0, a.view(), b.view());
    product(0.0).expect("the shapes agree");
    assert_eq!(
        device.take_profile().expect("works"),
        [],
        "none was started"
    );

    device.start_profile().expect("works");
    product(0.0).expect("the shapes agree");
    product(1.0).expect("the shapes agree");
    product(1.0).expect("the shapes agree");
    device.fill_zero(memory.ptr(), 16).expect("works");
    let times = device.take_profile().expect("works");
    let mut found: Vec<(&str, usize)> = times.iter().map(|t| (t.name.as_str(), t.calls)).collect();
    found.sort_unstable();
    let expected = [
        ("product nt 3 x 4 x 5 f32", 1),
        ("product nt 3 x 4 x 5 f32, added", 2),
        ("zeros", 1),
    ];
    assert_eq!(found, expected);
    let longest_first = |pair: &[LaunchTime]| pair[0].milliseconds >= pair[1].milliseconds;
    assert!(times.windows(2).all(longest_first), "{times:?}");
    product(0.0).expect("the shapes agree");
    assert_eq!(device.take_profile().expect("works"), [], "it has ended");
}
