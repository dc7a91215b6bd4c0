//! What makes rows of parameters: an embedding, and behind it an LSTM or not, and linears.

use super::config::{EncoderKind, Kind, PromptConfig};
use super::linear::Linear;
use super::lstm::Lstm;
use super::{EMBEDDING, Shape};
use ferrotune_core::Result;
use ferrotune_core::params::{FlatBuffer, ParamId};

/// Embedding, LSTM, linears with a function between them.
#[derive(Clone, Debug)]
pub(super) struct Encoder {
    embedding: ParamId,
    lstm: Option<Lstm>,
    linears: Vec<Linear>,
    between: Function,
    /// Width inside the LSTM, by which PyTorch starts all its tensors.
    hidden: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Function {
    Relu,
    Tanh,
}

impl Function {
    fn of(self, values: &[f32]) -> Vec<f32> {
        let each = |v: &f32| match self {
            Self::Relu => v.max(0.0),
            Self::Tanh => v.tanh(),
        };
        values.iter().map(each).collect()
    }

    /// The gradient of its input, from its output and the gradient of that.
    fn backward(self, y: &[f32], d_y: &[f32]) -> Vec<f32> {
        let each = |(y, d): (&f32, &f32)| match self {
            Self::Relu if *y > 0.0 => *d,
            Self::Relu => 0.0,
            Self::Tanh => d * (1.0 - y * y),
        };
        y.iter().zip(d_y).map(each).collect()
    }
}

impl Encoder {
    /// The encoder of `config`, its tensors declared by `add`; `None` where rows are parameters.
    pub(super) fn new(
        config: &PromptConfig,
        shape: &Shape,
        mut add: impl FnMut(String, Vec<usize>) -> ParamId,
    ) -> Option<Self> {
        if config.rows_only {
            return None;
        }
        let add: &mut dyn FnMut(String, Vec<usize>) -> ParamId = &mut add;
        let tokens = config.tokens;
        let chain =
            |name: &str, widths: &[usize], add: &mut dyn FnMut(String, Vec<usize>) -> ParamId| {
                let pairs = widths.windows(2).enumerate();
                // Every second module is the function between.
                pairs
                    .map(|(i, w)| Linear::new(&format!("{name}.{}", 2 * i), [w[1], w[0]], add))
                    .collect::<Vec<Linear>>()
            };
        match config.kind {
            Kind::Prompt { .. }
            | Kind::Prefix {
                projection: None, ..
            } => None,
            Kind::Prefix {
                projection: Some(hidden),
                ..
            } => {
                let keys = shape.keys.heads * shape.keys.head_dim;
                let hidden = hidden.unwrap_or(keys);
                let widths = [keys, hidden, 2 * shape.layers * keys];
                Some(Self {
                    embedding: add(EMBEDDING.into(), vec![tokens, keys]),
                    lstm: None,
                    linears: chain("prompt_encoder.transform", &widths, add),
                    between: Function::Tanh,
                    hidden,
                })
            }
            Kind::PTuning { encoder, hidden } => {
                let width = shape.hidden;
                let hidden = hidden.unwrap_or(width);
                let embedding = add(EMBEDDING.into(), vec![tokens, width]);
                let (lstm, widths) = match encoder {
                    EncoderKind::Mlp => (None, vec![width, hidden, hidden, width]),
                    EncoderKind::Lstm { layers } => {
                        let name = "prompt_encoder.lstm_head";
                        let lstm = Lstm::new(name, width, hidden, layers, add);
                        (Some(lstm), vec![2 * hidden, 2 * hidden, width])
                    }
                };
                Some(Self {
                    embedding,
                    lstm,
                    linears: chain("prompt_encoder.mlp_head", &widths, add),
                    between: Function::Relu,
                    hidden,
                })
            }
        }
    }

    /// How many values each output of the tensor called `name` is made of, for its start.
    pub(super) fn fan_in(&self, name: &str, shape: &[usize]) -> usize {
        if name.contains("lstm_head") {
            return self.hidden;
        }
        if let [_, inputs] = shape {
            return *inputs;
        }
        // A bias starts in the bounds of its weight.
        let number = name.trim_end_matches(".bias").rsplit('.').next();
        let index = number.and_then(|n| n.parse::<usize>().ok()).map(|n| n / 2);
        let linear = index.and_then(|i| self.linears.get(i));
        linear.map_or(1, |linear| linear.shape[1])
    }

    /// The rows, one behind the other.
    pub(super) fn forward(&self, params: &FlatBuffer) -> Result<Vec<f32>> {
        let (mut outputs, _) = self.run(params)?;
        Ok(outputs.pop().unwrap_or_default())
    }

    /// Input of every linear in turn and the output of the last, with what the LSTM's backward needs.
    fn run(&self, params: &FlatBuffer) -> Result<(Vec<Vec<f32>>, Option<LstmSaved>)> {
        let mut x = params.get(self.embedding).to_vec();
        let mut saved = None;
        if let Some(lstm) = &self.lstm {
            let (y, steps) = lstm.forward(params, &x)?;
            (x, saved) = (y, Some(steps));
        }
        let mut values = vec![x];
        for (i, linear) in self.linears.iter().enumerate() {
            let y = linear.forward(params, &values[i])?;
            let last = i + 1 == self.linears.len();
            values.push(if last { y } else { self.between.of(&y) });
        }
        Ok((values, saved))
    }

    /// Adds the gradients of the parameters, from that of the rows.
    pub(super) fn backward(
        &self,
        params: &FlatBuffer,
        grads: &mut FlatBuffer,
        d_rows: &[f32],
    ) -> Result<()> {
        let (values, saved) = self.run(params)?;
        let mut d = d_rows.to_vec();
        for (i, linear) in self.linears.iter().enumerate().rev() {
            if i + 1 < self.linears.len() {
                d = self.between.backward(&values[i + 1], &d);
            }
            d = linear.backward(params, grads, &values[i], &d)?;
        }
        if let (Some(lstm), Some(saved)) = (&self.lstm, &saved) {
            d = lstm.backward(params, grads, saved, &d)?;
        }
        let to = grads.get_mut(self.embedding).iter_mut();
        to.zip(&d).for_each(|(to, d)| *to += d);
        Ok(())
    }
}

type LstmSaved = Vec<[super::lstm::Steps; 2]>;
