//! `torch.nn.functional.embedding`: exact forward.

use super::{Case, Recorded, Results, as_close_as_pytorch, file, zeros};
use crate::embedding::{backward, forward};
use crate::{Device, Indices};

as_close_as_pytorch!(run: "embedding_37x45");

fn run(case: &Case, device: &Device) -> Results {
    let (table, d_y) = (case.tensor("table", device), case.tensor("d_y", device));
    let ids: Vec<u32> = case.integers("ids").iter().map(|&id| id as u32).collect();
    let ids = Indices::new(ids, device);
    let mut y = case.output(d_y.view().shape(), device);
    forward(table.view(), &ids, y.view_mut()).expect("fits");
    let mut d_table = zeros(table.view().shape(), device);
    backward(d_y.view(), &ids, d_table.view_mut()).expect("fits");
    vec![("y", y.to_f32_vec()), ("d_table", d_table.to_f32_vec())]
}
