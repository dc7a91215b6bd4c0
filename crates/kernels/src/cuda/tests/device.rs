//! Opening, memory, copies, errors.

use super::{cuda_device, downloaded, in_own_process, inject, new_cuda_device, normal, uploaded};
use crate::cuda::{CudaDevice, Pitch, device_count};
use crate::{Error, ErrorKind};

#[test]
fn a_device_tells_about_itself() {
    let device = cuda_device();
    assert_eq!(device.ordinal(), 0);
    assert!(device.compute_capability() >= (8, 0));
    assert!(device.multiprocessors() > 0 && !device.name().is_empty());
    let info = device.memory_info().expect("it answers");
    assert!(info.free <= info.total && info.free > 0, "{info:?}");
}

#[test]
fn a_device_that_is_not_there_is_refused() {
    let _open = cuda_device();
    let count = device_count().expect("there is a driver");
    let error = CudaDevice::open(count).expect_err("one too many");
    assert_eq!(error.kind(), ErrorKind::Environment);
    let expected = format!("no usable GPU: number {count} is wanted, {count} are visible");
    assert!(error.to_string().starts_with(&expected), "{error}");
}

#[test]
fn memory_is_aligned_and_comes_back() {
    let device = new_cuda_device();
    assert_eq!(device.alloc(0).ptr(), 0, "nothing needs no address");
    for bytes in [1, 255, 4097] {
        let memory = device.alloc(bytes);
        assert_eq!((memory.bytes(), memory.ptr() % 256), (bytes, 0));
        assert_ne!(memory.ptr(), 0);
    }
    // More than the stand-in has, together.
    for _ in 0..20 {
        let _memory = device.alloc(256 << 20);
        device.check().expect("the one before was freed");
    }
}

#[test]
fn copies_keep_every_byte() {
    let device = cuda_device();
    // Above the pinned buffer, so that its halves take turns.
    let values: Vec<u32> = (0..5_000_003).collect();
    let memory = uploaded(&device, &values);
    assert!(downloaded::<u32>(&memory, values.len()) == values);
    let other = device.alloc(64);
    device.fill_zero(other.ptr(), 64).expect("fills");
    device
        .copy(other.ptr() + 8, memory.ptr() + 4, 12)
        .expect("copies");
    let mut expected = [0; 16];
    expected[2..5].copy_from_slice(&[1, 2, 3]);
    assert_eq!(downloaded::<u32>(&other, 16), expected);
}

#[test]
fn many_small_uploads_do_not_overwrite_each_other() {
    let device = cuda_device();
    let memories: Vec<_> = (0..3000_u32)
        .map(|i| uploaded(&device, &[i; 700]))
        .collect();
    for (i, memory) in (0..).zip(&memories) {
        assert_eq!(downloaded::<u32>(memory, 700), [i; 700]);
    }
}

#[test]
fn matrices_keep_what_lies_between_their_rows() {
    let device = cuda_device();
    let host: Vec<u8> = (0..=255).collect();
    let pitch = Pitch {
        rows: 5,
        row_bytes: 7,
        src: 11,
        dst: 16,
    };
    let memory = uploaded(&device, &[200_u8; 80]);
    device
        .upload_2d(memory.ptr() + 1, &host, pitch)
        .expect("uploads");
    let expected = |pitch: Pitch, at: usize, fill: u8, len: usize| {
        let mut expected = vec![fill; len];
        for r in 0..pitch.rows {
            for c in 0..pitch.row_bytes {
                expected[at + r * pitch.dst + c] = host[r * 11 + c];
            }
        }
        expected
    };
    assert_eq!(downloaded::<u8>(&memory, 80), expected(pitch, 1, 200, 80));

    let back = Pitch {
        src: 16,
        dst: 9,
        ..pitch
    };
    let mut bytes = vec![3; 45];
    device
        .download_2d(&mut bytes, memory.ptr() + 1, back)
        .expect("downloads");
    assert_eq!(bytes, expected(back, 0, 3, 45));

    let inside = uploaded(&device, &[9_u8; 60]);
    let pitch = Pitch { dst: 12, ..back };
    device
        .copy_2d(inside.ptr(), memory.ptr() + 1, pitch)
        .expect("copies");
    assert_eq!(downloaded::<u8>(&inside, 60), expected(pitch, 0, 9, 60));

    let error = device.upload_2d(memory.ptr(), &host[..50], Pitch { rows: 5, ..pitch });
    assert!(
        matches!(
            error,
            Err(Error::Length {
                expected: 71,
                got: 50,
                ..
            })
        ),
        "{error:?}"
    );
    device.check().expect("a refused argument does not stick");
}

#[test]
fn rows_longer_than_the_pinned_buffer_arrive() {
    let device = cuda_device();
    let host: Vec<u32> = (0..2_400_000).collect();
    let memory = device.alloc(10_000_000);
    let pitch = Pitch {
        rows: 2,
        row_bytes: 4_700_000,
        src: 4_800_000,
        dst: 4_900_000,
    };
    device
        .upload_2d(memory.ptr(), bytemuck::cast_slice(&host), pitch)
        .expect("uploads");
    let got = downloaded::<u32>(&memory, 2_400_000);
    assert!(got[..1_175_000] == host[..1_175_000]);
    assert!(got[1_225_000..][..1_175_000] == host[1_200_000..][..1_175_000]);
}

#[test]
fn small_uploads_do_not_wait_for_what_was_issued_before() {
    let device = new_cuda_device();
    let memory = device.alloc(1 << 20);
    let table: Vec<u32> = (0..1 << 18).collect();
    let before = device.waits();
    for round in 0..40 {
        // The stand-in has passed nothing until somebody waits for it.
        device.fill_zero(memory.ptr(), 1 << 20).expect("fills");
        let bytes = bytemuck::cast_slice(&table[..200_000 + round]);
        device.upload(memory.ptr(), bytes).expect("uploads");
    }
    assert_eq!(device.waits(), before);
    let got = downloaded::<u32>(&memory, 200_040);
    assert!(got[..200_039] == table[..200_039] && got[200_039] == 0);
}

#[test]
fn uploads_beyond_the_pinned_memory_wait() {
    let device = new_cuda_device();
    let memory = device.alloc(4 << 20);
    let before = device.waits();
    for round in 0..40_u32 {
        let table = vec![round; 1 << 20];
        let bytes = bytemuck::cast_slice(&table);
        device.upload(memory.ptr(), bytes).expect("uploads");
    }
    assert!(device.waits() > before || !inject("sync:1000000:214"));
    assert!(downloaded::<u32>(&memory, 1 << 20) == vec![39; 1 << 20]);
}

#[test]
fn empty_copies_do_nothing() {
    let device = cuda_device();
    device.upload(0, &[]).expect("nothing to do");
    device.download(&mut [], 0).expect("nothing to do");
    device.copy(0, 0, 0).expect("nothing to do");
    device.fill_zero(0, 0).expect("nothing to do");
    let none = Pitch {
        rows: 0,
        ..Pitch::row(8)
    };
    device.copy_2d(0, 0, none).expect("nothing to do");
}

#[test]
fn memory_that_runs_out_is_named_and_sticks() {
    let device = new_cuda_device();
    let total = device.memory_info().expect("it answers").total;
    let memory = device.alloc(2 * total);
    assert_eq!(memory.ptr(), 0);
    for result in [
        device.check(),
        device.synchronize(),
        device.fill_zero(0, 1),
        device.upload(0, &[1]),
    ] {
        let error = result.expect_err("the first failure sticks");
        assert!(
            matches!(error, Error::OutOfMemory { wanted, total: of, free }
                if wanted == 2 * total && of == total && free <= total),
            "{error}"
        );
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    }
    drop(memory);
    cuda_device().check().expect("another device goes on");
}

#[test]
fn a_fault_is_a_fault_of_the_device() {
    in_own_process("device::a_fault_is_a_fault_of_the_device", || {
        const ECC: u32 = 214;
        let device = new_cuda_device();
        let memory = uploaded(&device, &normal(1, 8));
        if !inject(&format!("fill:0:{ECC}")) {
            return;
        }
        let error = device.fill_zero(memory.ptr(), 32).expect_err("injected");
        assert_eq!(error.kind(), ErrorKind::DeviceFault);
        let text = error.to_string();
        assert!(
            text.starts_with(
                "filling with zeros: CUDA_ERROR_ECC_UNCORRECTABLE (214): uncorrectable"
            ),
            "{text}"
        );
        assert!(text.contains("Xid"), "{text}");
        let later = device.synchronize().expect_err("it sticks");
        assert_eq!(later.to_string(), text);
    });
}

#[test]
fn threads_share_a_device() {
    let device = cuda_device();
    std::thread::scope(|scope| {
        for thread in 0..4_u32 {
            let device = &device;
            scope.spawn(move || {
                for i in 0..50 {
                    let value = [thread * 1000 + i; 100];
                    let memory = uploaded(device, &value);
                    assert_eq!(downloaded::<u32>(&memory, 100), value);
                }
            });
        }
    });
}
