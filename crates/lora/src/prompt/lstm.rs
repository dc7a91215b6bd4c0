//! PyTorch's bidirectional LSTM over one sequence, forward and backward through time, on the host.
//!
//! Gates stand in PyTorch's order, input, forget, cell, output: `[i, f, g, o] = W_ih x_t + b_ih + W_hh
//! h_{t-1} + b_hh`, `c_t = f c_{t-1} + i g`, `h_t = o tanh(c_t)`.

use super::linear::{add_columns, add_weight_gradient, plus, product, product_backward};
use ferrotune_core::Result;
use ferrotune_core::params::{FlatBuffer, ParamId};

/// Layers, each in both directions; their outputs stand side by side.
#[derive(Clone, Debug)]
pub(super) struct Lstm {
    hidden: usize,
    layers: Vec<[Direction; 2]>,
}

/// One direction of one layer.
#[derive(Clone, Copy, Debug)]
struct Direction {
    weight_ih: ParamId,
    weight_hh: ParamId,
    bias_ih: ParamId,
    bias_hh: ParamId,
    inputs: usize,
    hidden: usize,
    reverse: bool,
}

/// What backward needs of one direction, in the order of its steps.
pub(super) struct Steps {
    x: Vec<f32>,
    /// After their functions, `[n, 4 hidden]`.
    gates: Vec<f32>,
    cells: Vec<f32>,
    outputs: Vec<f32>,
}

impl Lstm {
    /// Declares `name.weight_ih_l0` and so on.
    pub(super) fn new(
        name: &str,
        inputs: usize,
        hidden: usize,
        layers: usize,
        add: &mut dyn FnMut(String, Vec<usize>) -> ParamId,
    ) -> Self {
        let mut direction = |layer: usize, reverse: bool| {
            let inputs = if layer == 0 { inputs } else { 2 * hidden };
            let ending = if reverse { "_reverse" } else { "" };
            let mut tensor = |kind: &str, shape: Vec<usize>| {
                add(format!("{name}.{kind}_l{layer}{ending}"), shape)
            };
            Direction {
                weight_ih: tensor("weight_ih", vec![4 * hidden, inputs]),
                weight_hh: tensor("weight_hh", vec![4 * hidden, hidden]),
                bias_ih: tensor("bias_ih", vec![4 * hidden]),
                bias_hh: tensor("bias_hh", vec![4 * hidden]),
                inputs,
                hidden,
                reverse,
            }
        };
        let layers =
            (0..layers).map(|layer| [false, true].map(|reverse| direction(layer, reverse)));
        Self {
            hidden,
            layers: layers.collect(),
        }
    }

    /// `[n, 2 hidden]` of x `[n, in]`, and what backward needs.
    pub(super) fn forward(
        &self,
        params: &FlatBuffer,
        x: &[f32],
    ) -> Result<(Vec<f32>, Vec<[Steps; 2]>)> {
        let (mut x, mut saved) = (x.to_vec(), Vec::new());
        for [forward, backward] in &self.layers {
            let steps = [forward.forward(params, &x)?, backward.forward(params, &x)?];
            let [there, back] = [&steps[0], &steps[1]].map(|steps| &steps.outputs);
            let back = reversed(back, self.hidden);
            x = beside(there, &back, self.hidden);
            saved.push(steps);
        }
        Ok((x, saved))
    }

    /// The gradient of x; adds those of the weights.
    pub(super) fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        saved: &[[Steps; 2]],
        d_y: &[f32],
    ) -> Result<Vec<f32>> {
        let mut d = d_y.to_vec();
        for (directions, steps) in self.layers.iter().zip(saved).rev() {
            let [there, back] = apart(&d, self.hidden);
            let mut d_x = directions[0].backward(params, grads, &steps[0], &there)?;
            let back = reversed(&back, self.hidden);
            let of_back = directions[1].backward(params, grads, &steps[1], &back)?;
            d_x.iter_mut().zip(of_back).for_each(|(d, b)| *d += b);
            d = d_x;
        }
        Ok(d)
    }
}

impl Direction {
    /// Steps in the direction's own order.
    fn forward(&self, params: &FlatBuffer, x: &[f32]) -> Result<Steps> {
        let hidden = self.hidden;
        let x = self.in_order(x);
        let read = product(&x, params.get(self.weight_ih), [4 * hidden, self.inputs])?;
        let mut gates = plus(
            plus(read, params.get(self.bias_ih)),
            params.get(self.bias_hh),
        );
        let (mut cells, mut outputs) = (Vec::new(), Vec::new());
        let (mut c, mut h) = (vec![0.0; hidden], vec![0.0; hidden]);
        for gates in gates.chunks_exact_mut(4 * hidden) {
            let recurrent = product(&h, params.get(self.weight_hh), [4 * hidden, hidden])?;
            gates
                .iter_mut()
                .zip(recurrent)
                .for_each(|(gate, r)| *gate += r);
            for j in 0..hidden {
                let [i, f, g, o] = [0, 1, 2, 3].map(|k| gates[k * hidden + j]);
                let (i, f, g, o) = (sigmoid(i), sigmoid(f), g.tanh(), sigmoid(o));
                for (k, gate) in [i, f, g, o].into_iter().enumerate() {
                    gates[k * hidden + j] = gate;
                }
                c[j] = f * c[j] + i * g;
                h[j] = o * c[j].tanh();
            }
            cells.extend_from_slice(&c);
            outputs.extend_from_slice(&h);
        }
        Ok(Steps {
            x,
            gates,
            cells,
            outputs,
        })
    }

    /// The gradient of x in the order of the sequence, from that of the outputs in the order of the steps.
    fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        steps: &Steps,
        d_outputs: &[f32],
    ) -> Result<Vec<f32>> {
        let hidden = self.hidden;
        let count = steps.cells.len() / hidden;
        let mut d_gates = vec![0.0; 4 * hidden * count];
        let (mut d_c, mut d_h) = (vec![0.0; hidden], vec![0.0; hidden]);
        for t in (0..count).rev() {
            let at = |values: &[f32], j: usize| values[t * hidden + j];
            let gates = &steps.gates[t * 4 * hidden..(t + 1) * 4 * hidden];
            let d_t = &mut d_gates[t * 4 * hidden..(t + 1) * 4 * hidden];
            for j in 0..hidden {
                let [i, f, g, o] = [0, 1, 2, 3].map(|k| gates[k * hidden + j]);
                let tanh_c = at(&steps.cells, j).tanh();
                let before = if t == 0 {
                    0.0
                } else {
                    steps.cells[(t - 1) * hidden + j]
                };
                let d = at(d_outputs, j) + d_h[j];
                let d_cell = d_c[j] + d * o * (1.0 - tanh_c * tanh_c);
                d_t[j] = d_cell * g * i * (1.0 - i);
                d_t[hidden + j] = d_cell * before * f * (1.0 - f);
                d_t[2 * hidden + j] = d_cell * i * (1.0 - g * g);
                d_t[3 * hidden + j] = d * tanh_c * o * (1.0 - o);
                d_c[j] = d_cell * f;
            }
            d_h = product_backward(d_t, params.get(self.weight_hh), [4 * hidden, hidden])?;
        }
        // The output before each step; none before the first.
        let mut before = vec![0.0; hidden];
        before.extend_from_slice(&steps.outputs[..(count.max(1) - 1) * hidden]);
        let shape = [4 * hidden, hidden];
        add_weight_gradient(grads.get_mut(self.weight_hh), shape, &before, &d_gates)?;
        let shape = [4 * hidden, self.inputs];
        add_weight_gradient(grads.get_mut(self.weight_ih), shape, &steps.x, &d_gates)?;
        add_columns(grads.get_mut(self.bias_ih), &d_gates);
        add_columns(grads.get_mut(self.bias_hh), &d_gates);
        let d_x = product_backward(&d_gates, params.get(self.weight_ih), shape)?;
        Ok(self.in_order(&d_x))
    }

    /// Rows of the width of x in the order of this direction, and back.
    fn in_order(&self, x: &[f32]) -> Vec<f32> {
        if self.reverse {
            reversed(x, self.inputs)
        } else {
            x.to_vec()
        }
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// The last row first.
fn reversed(rows: &[f32], width: usize) -> Vec<f32> {
    rows.chunks_exact(width).rev().flatten().copied().collect()
}

/// Two matrices side by side.
fn beside(left: &[f32], right: &[f32], width: usize) -> Vec<f32> {
    let rows = left.chunks_exact(width).zip(right.chunks_exact(width));
    rows.flat_map(|(left, right)| left.iter().chain(right).copied())
        .collect()
}

/// The inverse of [`beside`].
fn apart(rows: &[f32], width: usize) -> [Vec<f32>; 2] {
    [0, width].map(|first| {
        let rows = rows.chunks_exact(2 * width);
        rows.flat_map(|row| row[first..first + width].iter().copied())
            .collect()
    })
}
