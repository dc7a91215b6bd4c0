//! The buffer itself, in host memory or a GPU's.

use super::{ParamId, ParamLayout};
use crate::Result;
use ferrotune_kernels::{DType, Device, Tensor, View, ViewMut};
use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// A flat buffer of one [`ParamLayout`]: parameters, gradients or moments.
///
/// Its home is one device, where operations read and write it ([`FlatBuffer::view`]). A buffer whose
/// home is a GPU can be read and written from the host as well ([`FlatBuffer::as_slice`]): the values
/// are copied when they are first asked for on the other side, and the copy that became old is
/// dropped. Nothing is copied while one side alone works.
#[derive(Debug)]
pub struct FlatBuffer {
    layout: Arc<ParamLayout>,
    device: Device,
    /// At least one of `host` and `resident` holds the values; the others are copies.
    host: OnceLock<Vec<f32>>,
    /// `[1, len]` on the GPU; never set when the home is the host.
    resident: OnceLock<Tensor>,
    /// The values rounded to bf16, for products of bf16 operands.
    rounded: OnceLock<Tensor>,
    /// Memory of the GPU whose values became old: graphs know the addresses, so that the next ones go there.
    old: [Mutex<Option<Tensor>>; 2],
}

impl Clone for FlatBuffer {
    /// Copies the values; the copy starts in host memory and has the same home.
    fn clone(&self) -> Self {
        let mut copy = Self::zeros_on(&self.layout, &self.device);
        copy.as_mut_slice().copy_from_slice(self.as_slice());
        copy
    }
}

impl FlatBuffer {
    /// Zeros in host memory.
    #[must_use]
    pub fn zeros(layout: &Arc<ParamLayout>) -> Self {
        Self::zeros_on(layout, &Device::Cpu)
    }

    /// No parameters, at home on `device`: those of a base that is frozen throughout.
    #[must_use]
    pub fn empty_on(device: &Device) -> Self {
        Self::zeros_on(&Arc::default(), device)
    }

    /// Zeros whose home is `device`.
    #[must_use]
    pub fn zeros_on(layout: &Arc<ParamLayout>, device: &Device) -> Self {
        Self {
            layout: Arc::clone(layout),
            device: device.clone(),
            host: OnceLock::from(vec![0.0; layout.len()]),
            resident: OnceLock::new(),
            rounded: OnceLock::new(),
            old: Default::default(),
        }
    }

    /// Where operations find it.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Makes `device` its home.
    pub fn move_to(&mut self, device: &Device) {
        self.as_mut_slice();
        self.device = device.clone();
        self.old = Default::default();
    }

    /// What lies where.
    #[must_use]
    pub fn layout(&self) -> &Arc<ParamLayout> {
        &self.layout
    }

    /// One tensor, in host memory.
    #[must_use]
    pub fn get(&self, id: ParamId) -> &[f32] {
        &self.as_slice()[self.layout.segment(id).range()]
    }

    /// One tensor in host memory, to be written.
    pub fn get_mut(&mut self, id: ParamId) -> &mut [f32] {
        let range = self.layout.segment(id).range();
        &mut self.as_mut_slice()[range]
    }

    /// One tensor as files hold it.
    #[must_use]
    pub fn file_values(&self, id: ParamId) -> Cow<'_, [f32]> {
        let values = self.get(id);
        if !self.layout.segment(id).spec.transposed {
            return values.into();
        }
        let [rows, cols] = self.matrix(id);
        transpose(values, rows, cols).into()
    }

    /// Sets one tensor from what files hold, of as many elements.
    pub fn set_file_values(&mut self, id: ParamId, values: &[f32]) {
        if self.layout.segment(id).spec.transposed {
            let [rows, cols] = self.matrix(id);
            let values = transpose(values, cols, rows);
            self.get_mut(id).copy_from_slice(&values);
        } else {
            self.get_mut(id).copy_from_slice(values);
        }
    }

    /// The whole buffer, in host memory.
    ///
    /// NaN after a failure of the GPU, which reports it with its next operation.
    #[must_use]
    pub fn as_slice(&self) -> &[f32] {
        self.host.get_or_init(|| match self.resident.get() {
            Some(tensor) => tensor.to_f32_vec(),
            None => vec![0.0; self.layout.len()],
        })
    }

    /// Brings the whole buffer to host memory, as whoever writes it to a file needs it: [`FlatBuffer::as_slice`] and the
    /// tensors in it hold the values then.
    ///
    /// # Errors
    /// The first failure of the GPU, after which values are NaN.
    pub fn read_back(&self) -> Result<&[f32]> {
        let values = self.as_slice();
        if let Device::Cuda(device) = &self.device {
            device.check()?;
        }
        Ok(values)
    }

    /// The whole buffer in host memory, to be written. Alignment gaps must stay zero.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        let _ = self.as_slice();
        for (copy, old) in [&mut self.resident, &mut self.rounded]
            .into_iter()
            .zip(&self.old)
        {
            if let Some(tensor) = copy.take() {
                *lock(old) = Some(tensor);
            }
        }
        self.host.get_mut().map_or(&mut [], Vec::as_mut_slice)
    }

    /// Sets every value to zero, at home.
    pub fn zero(&mut self) {
        match self.device {
            Device::Cpu => self.as_mut_slice().fill(0.0),
            Device::Cuda(_) => self.home_mut().fill(0.0),
        }
    }

    /// The whole buffer as `[1, len]`, at home.
    #[must_use]
    pub fn home(&self) -> View<'_> {
        match self.device {
            Device::Cpu => View::vector(self.as_slice()),
            Device::Cuda(_) => self.resident().view(),
        }
    }

    /// The whole buffer as `[1, len]`, at home, to be written.
    pub fn home_mut(&mut self) -> ViewMut<'_> {
        if let Device::Cpu = self.device {
            return ViewMut::vector(self.as_mut_slice());
        }
        self.resident();
        self.host = OnceLock::new();
        if let Some(tensor) = self.rounded.take() {
            *lock(&self.old[1]) = Some(tensor);
        }
        match self.resident.get_mut() {
            Some(tensor) => tensor.view_mut(),
            None => unreachable!("the line above has set it"),
        }
    }

    /// The whole buffer and its rounded copy as `[1, len]` on the GPU, for the optimizer that writes
    /// both. `None` for the copy if no operation has asked for it.
    pub fn home_and_rounded_mut(&mut self) -> (ViewMut<'_>, Option<ViewMut<'_>>) {
        if let Device::Cpu = self.device {
            return (ViewMut::vector(self.as_mut_slice()), None);
        }
        self.resident();
        self.host = OnceLock::new();
        let rounded = self.rounded.get_mut().map(Tensor::view_mut);
        match self.resident.get_mut() {
            Some(tensor) => (tensor.view_mut(), rounded),
            None => unreachable!("the line above has set it"),
        }
    }

    /// One tensor at home: a matrix in its own shape, anything else as one row.
    #[must_use]
    pub fn view(&self, id: ParamId) -> View<'_> {
        self.shaped(self.home(), id)
    }

    /// One tensor at home as a matrix of its elements row by row.
    ///
    /// # Panics
    /// If it has another number of elements.
    #[must_use]
    pub fn view_as_matrix(&self, id: ParamId, [rows, cols]: [usize; 2]) -> View<'_> {
        self.home()
            .columns(self.layout.segment(id).range())
            .reshaped(rows, cols)
    }

    /// [`FlatBuffer::view_as_matrix`], to be written.
    ///
    /// # Panics
    /// If it has another number of elements.
    pub fn view_as_matrix_mut(&mut self, id: ParamId, [rows, cols]: [usize; 2]) -> ViewMut<'_> {
        let range = self.layout.segment(id).range();
        self.home_mut().columns(range).reshaped(rows, cols)
    }

    /// One tensor at home in `dtype`: on a GPU, bf16 is a copy kept up to date by the optimizer; on
    /// the host, values are f32.
    #[must_use]
    pub fn view_as(&self, id: ParamId, dtype: DType) -> View<'_> {
        match (&self.device, dtype) {
            (Device::Cuda(_), DType::Bf16) => self.shaped(self.rounded().view(), id),
            _ => self.view(id),
        }
    }

    /// One tensor at home, to be written: a matrix in its own shape, anything else as one row.
    pub fn view_mut(&mut self, id: ParamId) -> ViewMut<'_> {
        self.view_as_matrix_mut(id, self.matrix(id))
    }

    /// Matrices that lie below one another at home, as one to be written; `None` if they do not.
    pub fn view_joined_mut(&mut self, ids: &[ParamId]) -> Option<ViewMut<'_>> {
        let (first, rest) = ids.split_first()?;
        let (mut range, [mut rows, cols]) =
            (self.layout.segment(*first).range(), self.matrix(*first));
        for &id in rest {
            let (next, [more, width]) = (self.layout.segment(id).range(), self.matrix(id));
            if next.start != range.end || width != cols {
                return None;
            }
            (range.end, rows) = (next.end, rows + more);
        }
        Some(self.home_mut().columns(range).reshaped(rows, cols))
    }

    /// Two different tensors at home, to be written.
    ///
    /// # Panics
    /// If `a` and `b` are the same tensor.
    pub fn view_two_mut(&mut self, a: ParamId, b: ParamId) -> [ViewMut<'_>; 2] {
        assert_ne!(a, b, "view_two_mut needs two different tensors");
        let ranges = [a, b].map(|id| self.layout.segment(id).range());
        let shapes = [a, b].map(|id| self.matrix(id));
        let a_first = ranges[0].start < ranges[1].start;
        let cut = ranges[0].start.max(ranges[1].start);
        let [low, high] = self.home_mut().split_columns(cut);
        let parts = if a_first { [low, high] } else { [high, low] };
        let bases = if a_first { [0, cut] } else { [cut, 0] };
        let mut each = ranges.into_iter().zip(bases).zip(shapes);
        parts.map(|part| match each.next() {
            Some(((range, base), [rows, cols])) => part
                .columns(range.start - base..range.end - base)
                .reshaped(rows, cols),
            None => unreachable!("there are two of each"),
        })
    }

    /// Addresses of the values and of their rounded copy in the memory of the GPU; 0 where there is none.
    #[must_use]
    pub fn addresses(&self) -> [u64; 2] {
        [&self.resident, &self.rounded].map(|tensor| tensor.get().map_or(0, |t| t.view().ptr()))
    }

    /// Brings values that the host has written to where they were on the GPU, with their rounded copy if there was
    /// one: what is replayed finds both there.
    pub fn bring_home(&self) {
        if self.device.is_cuda() {
            self.resident();
            if lock(&self.old[1]).is_some() {
                self.rounded();
            }
        }
    }

    fn resident(&self) -> &Tensor {
        self.resident.get_or_init(|| {
            let host = View::vector(self.as_slice());
            let mut tensor = self.memory(0, DType::F32);
            tensor.view_mut().copy_from(host);
            tensor
        })
    }

    fn rounded(&self) -> &Tensor {
        self.rounded.get_or_init(|| {
            let mut tensor = self.memory(1, DType::Bf16);
            tensor.view_mut().copy_from(self.resident().view());
            tensor
        })
    }

    /// Memory of the GPU for the values or their rounded copy: that of old ones, if there is any.
    fn memory(&self, which: usize, dtype: DType) -> Tensor {
        let old = lock(&self.old[which]).take();
        old.unwrap_or_else(|| Tensor::empty(&self.device, dtype, 1, self.layout.len()))
    }

    fn shaped<'a>(&self, home: View<'a>, id: ParamId) -> View<'a> {
        let [rows, cols] = self.matrix(id);
        home.columns(self.layout.segment(id).range())
            .reshaped(rows, cols)
    }

    fn matrix(&self, id: ParamId) -> [usize; 2] {
        let spec = &self.layout.segment(id).spec;
        match spec.shape[..] {
            [rows, cols] => [rows, cols],
            _ => [1, spec.len()],
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panic leaves there is memory or none.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The columns of `values` `[rows, cols]`, one after the other.
pub fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let column = |c: usize| (0..rows).map(move |r| values[r * cols + c]);
    (0..cols).flat_map(column).collect()
}
