//! Integers that operations look things up with: token ids, label rows, sequence bounds.

use crate::Device;
use crate::cuda::{CudaDevice, Memory};
use std::borrow::Cow;
use std::ops::Deref;
use std::sync::Arc;

/// Words from the start of a table to that of the next are a multiple of this: 16 bytes.
const ALIGN: usize = 4;

/// u32 values that the host knows, with a copy on the GPU where the operation runs there.
///
/// Reads as a slice. Operations check the values on the host and use the copy on the GPU.
#[derive(Debug)]
pub struct Indices<'a> {
    host: Cow<'a, [u32]>,
    /// The GPU's memory, and the words of it before these.
    copy: Option<(Arc<Memory>, usize)>,
}

impl<'a> Indices<'a> {
    /// Borrows or takes `values`, and copies them to `device` if that is a GPU.
    pub fn new(values: impl Into<Cow<'a, [u32]>>, device: &Device) -> Self {
        let [indices] = IndexBlock::default().upload(device, [values.into()]);
        indices
    }

    /// Values in host memory alone.
    pub fn host(values: impl Into<Cow<'a, [u32]>>) -> Self {
        Self {
            host: values.into(),
            copy: None,
        }
    }

    /// The GPU that has a copy, if there is one.
    pub(crate) fn device(&self) -> Option<&Arc<CudaDevice>> {
        self.copy.as_ref().map(|(memory, _)| memory.device())
    }

    /// Address of the copy in the memory of the GPU; 0 if there is none.
    #[must_use]
    pub fn ptr(&self) -> u64 {
        let address = |(memory, words): &(Arc<Memory>, usize)| {
            memory.ptr() + (words * size_of::<u32>()) as u64
        };
        self.copy.as_ref().map_or(0, address)
    }
}

impl Deref for Indices<'_> {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.host
    }
}

/// Memory of a GPU for tables that go up together, in one copy, and again in the next pass.
#[derive(Debug, Default)]
pub struct IndexBlock {
    memory: Option<Arc<Memory>>,
}

impl IndexBlock {
    /// Borrows or takes `tables`, and copies all of them to `device` if that is a GPU.
    ///
    /// The memory is that of the call before if it is large enough and its tables are gone. What was
    /// issued on those still reads them: copies and kernels run in the order they are issued.
    pub fn upload<'a, const N: usize>(
        &mut self,
        device: &Device,
        tables: [Cow<'a, [u32]>; N],
    ) -> [Indices<'a>; N] {
        let Device::Cuda(device) = device else {
            return tables.map(Indices::host);
        };
        let mut words = Vec::new();
        let starts = tables.each_ref().map(|table| {
            let start = words.len();
            words.extend_from_slice(table);
            words.resize(words.len().next_multiple_of(ALIGN), 0);
            start
        });
        let bytes: &[u8] = bytemuck::cast_slice(&words);
        let memory = self.memory_for(device, bytes.len());
        // A failure is remembered by the device and reported by its next operation.
        let _ = device.upload(memory.ptr(), bytes);
        let mut starts = starts.into_iter();
        tables.map(|host| Indices {
            host,
            copy: starts.next().map(|start| (Arc::clone(&memory), start)),
        })
    }

    fn memory_for(&mut self, device: &Arc<CudaDevice>, bytes: usize) -> Arc<Memory> {
        let fits = |memory: &Arc<Memory>| {
            memory.bytes() >= bytes
                && Arc::strong_count(memory) == 1
                && Arc::ptr_eq(memory.device(), device)
        };
        match self.memory.take().filter(fits) {
            Some(memory) => Arc::clone(self.memory.insert(memory)),
            None => Arc::clone(self.memory.insert(Arc::new(device.alloc(bytes)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::cuda_device;

    fn on_gpu(indices: &Indices<'_>) -> Vec<u32> {
        let mut values = vec![0; indices.len()];
        let device = indices.device().expect("a copy on the GPU");
        let bytes = bytemuck::cast_slice_mut(&mut values);
        device.download(bytes, indices.ptr()).expect("downloads");
        values
    }

    #[test]
    fn tables_of_a_block_lie_behind_each_other_and_are_reused_when_gone() {
        let device = Device::Cuda(cuda_device());
        let mut block = IndexBlock::default();
        let tables =
            |first: u32| [3, 0, 4].map(|len| Cow::from((first..first + len).collect::<Vec<u32>>()));
        let all = block.upload(&device, tables(10));
        for (indices, table) in all.iter().zip(tables(10)) {
            assert_eq!((on_gpu(indices), &**indices), (table.to_vec(), &*table));
            assert!(indices.ptr().is_multiple_of(16));
        }
        let held = all[0].ptr();
        let second = block.upload(&device, tables(20));
        assert_ne!(second[0].ptr(), held, "the first tables are still there");
        assert_eq!(on_gpu(&all[2]), [10, 11, 12, 13]);
        let freed = second[0].ptr();
        drop(second);
        let third = block.upload(&device, tables(30));
        assert_eq!(
            (third[0].ptr(), on_gpu(&third[2])),
            (freed, vec![30, 31, 32, 33])
        );
    }
}
