//! PEFT's LoRA over a frozen linear, in products of its own and in one with the linear's.

use super::{Case, Recorded, Results, as_close_as_pytorch, file, zeros};
use crate::lora_linear::{LowRank, backward, forward};
use crate::{DType, Device, Tensor, View, Workspace, augmented_linear, matmul};

as_close_as_pytorch!(run: "lora_37x123x67", "lora_33x256x96");

/// One product is what a GPU computes, but for methods that need what is between two.
fn run(case: &Case, device: &Device) -> Results {
    let apart = Linear::new(case, device);
    let [y, d_x, d_a, d_b] = apart.separate(case, device);
    let separate = vec![("y", y), ("d_x", d_x), ("d_a", d_a), ("d_b", d_b)];
    for (result, got) in &separate {
        case.judge(result, got, device);
    }
    let [y, d_x, d_a, d_b] = apart.augmented(case, device);
    vec![("y", y), ("d_x", d_x), ("d_a", d_a), ("d_b", d_b)]
}

/// `y = x W^T + scale (x A^T) B^T`.
pub(super) struct Linear {
    pub(super) x: Tensor,
    pub(super) weight: Tensor,
    pub(super) d_y: Tensor,
    /// Parameters, f32.
    pub(super) a: Tensor,
    pub(super) b: Tensor,
    pub(super) scale: f32,
}

impl Linear {
    pub(super) fn new(case: &Case, device: &Device) -> Self {
        let [x, weight, d_y] = ["x", "weight", "d_y"].map(|name| case.tensor(name, device));
        let [a, b] = ["a", "b"].map(|name| case.f32(name, device));
        let scale = case.number("scale");
        Self {
            x,
            weight,
            d_y,
            a,
            b,
            scale,
        }
    }

    /// Products read rounded parameters on a GPU, and f32 on a CPU.
    pub(super) fn factors(&self, case: &Case, device: &Device) -> [Tensor; 2] {
        let dtype = if device.is_cuda() {
            case.dtype
        } else {
            DType::F32
        };
        [&self.a, &self.b].map(|factor| factor.to_dtype(dtype))
    }

    /// The output, and x A^T.
    pub(super) fn forward(
        &self,
        case: &Case,
        update: &LowRank<'_>,
        workspace: &Workspace,
    ) -> [Tensor; 2] {
        let device = workspace.device();
        let mut y = case.output(self.d_y.view().shape(), device);
        matmul::nt(y.view_mut(), 0.0, 1.0, self.x.view(), self.weight.view()).expect("fits");
        let (dtype, rank) = (update.a.dtype(), update.a.rows());
        let mut s = Tensor::empty(device, dtype, self.x.rows(), rank);
        forward(self.x.view(), update, y.view_mut(), s.view_mut(), workspace).expect("fits");
        [y, s]
    }

    /// Gradients of x, A and B from that of the output, `d_y [T,out]`.
    pub(super) fn backward(
        &self,
        case: &Case,
        update: &LowRank<'_>,
        [s, d_y]: [View<'_>; 2],
        workspace: &Workspace,
    ) -> [Tensor; 3] {
        let device = workspace.device();
        let mut d_x = case.output(self.x.view().shape(), device);
        matmul::nn(d_x.view_mut(), 0.0, 1.0, d_y, self.weight.view()).expect("fits");
        let [mut d_a, mut d_b] = [&self.a, &self.b].map(|t| zeros(t.view().shape(), device));
        backward(
            self.x.view(),
            update,
            s,
            d_y,
            Some(d_x.view_mut()),
            d_a.view_mut(),
            d_b.view_mut(),
            workspace,
        )
        .expect("fits");
        [d_x, d_a, d_b]
    }

    pub(super) fn update<'a>(&self, [a, b]: &'a [Tensor; 2]) -> LowRank<'a> {
        LowRank {
            a: a.view(),
            b: b.view(),
            scale: self.scale,
            dropout: None,
            silent: None,
        }
    }

    /// y and the gradients of x, A and B.
    fn separate(&self, case: &Case, device: &Device) -> [Vec<f32>; 4] {
        let (factors, workspace) = (
            self.factors(case, device),
            Workspace::on(device.clone(), self.x.rows()),
        );
        let update = self.update(&factors);
        let [y, s] = self.forward(case, &update, &workspace);
        let [d_x, d_a, d_b] = self.backward(case, &update, [s.view(), self.d_y.view()], &workspace);
        [y, d_x, d_a, d_b].map(|t| t.to_f32_vec())
    }

    /// The same, where x and its product with A lie beside one another.
    fn augmented(&self, case: &Case, device: &Device) -> [Vec<f32>; 4] {
        let ([out, inputs], rank) = (self.weight.view().shape(), self.a.rows());
        let room = augmented_linear::room(rank);
        let beside = |matrix: &Tensor, more_rows| {
            let [rows, cols] = matrix.view().shape();
            let mut wide =
                Tensor::zeros(case.dtype, rows + more_rows, cols + room).to_device(device);
            let place = wide.view_mut().row_range(0..rows).columns(0..cols);
            place.copy_from(matrix.view());
            wide
        };
        let mut weight = beside(&self.weight, room);
        let factors = augmented_linear::Factors {
            a: self.a.view(),
            b: self.b.view(),
            scale: self.scale,
            row: 0,
            rank: 0,
        };
        augmented_linear::place(weight.view_mut(), room, &[factors]).expect("fits");
        let weight = augmented_linear::Weight::new(weight.view(), room).expect("has room");
        let (mut x, mut d_y) = (beside(&self.x, 0), beside(&self.d_y, 0));
        let [mut y, mut d_x] = [&self.d_y, &self.x].map(|t| case.output(t.view().shape(), device));
        augmented_linear::down(x.view_mut(), &weight).expect("fits");
        augmented_linear::forward(x.view(), &weight, y.view_mut()).expect("fits");
        augmented_linear::up_backward(d_y.view_mut(), &weight).expect("fits");
        augmented_linear::backward(d_y.view(), &weight, d_x.view_mut()).expect("fits");
        let [mut d_a, mut d_b] = [&self.a, &self.b].map(|t| zeros(t.view().shape(), device));
        let s = x.view().columns(inputs..inputs + rank);
        let d_s = d_y.view().columns(out..out + rank);
        matmul::tn(d_a.view_mut(), 1.0, 1.0, d_s, self.x.view()).expect("fits");
        matmul::tn(d_b.view_mut(), 1.0, self.scale, self.d_y.view(), s).expect("fits");
        [y, d_x, d_a, d_b].map(|t| t.to_f32_vec())
    }
}
