//! Recording and replaying.

use super::{cuda_device, downloaded, in_own_process, inject, new_cuda_device, uploaded};
use crate::ErrorKind;
use crate::cuda::Captured;

#[test]
fn a_graph_runs_when_it_is_launched() {
    let device = cuda_device();
    let (from, to) = (
        uploaded(&device, &[1_u32; 4]),
        uploaded(&device, &[7_u32; 8]),
    );
    let captured = device
        .capture(|| {
            device.copy(to.ptr(), from.ptr(), 16)?;
            device.fill_zero(to.ptr() + 24, 8)
        })
        .expect("captures");
    let Captured::Graph(graph) = captured else {
        panic!("{captured:?}");
    };
    assert_eq!(downloaded::<u32>(&to, 8), [7; 8], "nothing ran yet");
    graph.launch().expect("runs");
    assert_eq!(downloaded::<u32>(&to, 8), [1, 1, 1, 1, 7, 7, 0, 0]);
    device.upload(from.ptr(), &[2; 16]).expect("uploads");
    graph.launch().expect("runs again");
    let twos = u32::from_ne_bytes([2; 4]);
    assert_eq!(downloaded::<u32>(&to, 8)[..5], [twos, twos, twos, twos, 7]);
}

#[test]
fn what_cannot_be_recorded_is_run_one_by_one() {
    let device = new_cuda_device();
    let memory = uploaded(&device, &[3_u32; 4]);
    let obstacles: [(&str, &dyn Fn() -> crate::Result<()>); 4] = [
        ("memory cannot be allocated", &|| {
            device.alloc(64);
            Ok(())
        }),
        ("no upload", &|| device.upload(memory.ptr(), &[1])),
        ("no download", &|| device.download(&mut [0], memory.ptr())),
        ("", &|| device.synchronize()),
    ];
    for (expected, obstacle) in obstacles {
        let captured = device
            .capture(|| {
                device.fill_zero(memory.ptr(), 16)?;
                obstacle()
            })
            .expect("not a failure of the device");
        let Captured::Eager { reason } = captured else {
            panic!("{expected}: captured");
        };
        assert!(reason.contains(expected) && !reason.is_empty(), "{reason}");
        assert_eq!(downloaded::<u32>(&memory, 4), [3; 4], "nothing ran");
    }
    device.check().expect("the device is as before");
}

#[test]
fn memory_dropped_while_recording_is_freed_with_the_graph() {
    let device = new_cuda_device();
    let memory = uploaded(&device, &[1_u8; 64]);
    let ptr = memory.ptr();
    let captured = device.capture(|| {
        drop(memory);
        device.fill_zero(ptr, 64)
    });
    let Ok(Captured::Graph(graph)) = captured else {
        panic!("{captured:?}");
    };
    graph.launch().expect("its memory is still there");
    drop(graph);
    device.synchronize().expect("nothing sticks");
    // The stand-in knows what is allocated; a GPU may not notice.
    if inject("sync:1000000:214") {
        let error = device.fill_zero(ptr, 64).expect_err("it was freed");
        assert_eq!(error.kind(), ErrorKind::Internal, "{error}");
    }
}

#[test]
fn a_fault_before_recording_is_reported() {
    in_own_process("graph::a_fault_before_recording_is_reported", || {
        let device = new_cuda_device();
        let memory = uploaded(&device, &[1_u32; 4]);
        if inject("fill:0:214") {
            let _ = device.fill_zero(memory.ptr(), 16);
            let error = device.capture(|| Ok(())).expect_err("the device is lost");
            assert_eq!(error.kind(), ErrorKind::DeviceFault);
        }
    });
}
