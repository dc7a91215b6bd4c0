//! The same decoder in candle's tensor operations, in f64, with candle's autograd: written from the
//! formulas, sharing nothing with the engine. Only operations that candle differentiates are used
//! (its fused softmax, norm and rope drop gradients without a word).

use super::Shape;
use candle_core::{D, DType, Device, Result, Tensor, Var};
use ferrotune::core::data::{Example, IGNORE_INDEX};
use std::collections::BTreeMap;

/// A low-rank update of one linear: `scale * x A^T B^T`.
pub(crate) struct LowRank {
    pub(crate) a: Var,
    pub(crate) b: Var,
    pub(crate) scale: f64,
}

/// A model whose every weight is a variable.
pub(crate) struct Oracle {
    shape: Shape,
    weights: BTreeMap<String, Var>,
    /// By module name, such as `model.layers.0.mlp.up_proj`.
    low_rank: BTreeMap<String, LowRank>,
}

/// A variable of `values`.
pub(crate) fn variable(values: &[f32], shape: &[usize]) -> Var {
    let wide: Vec<f64> = values.iter().copied().map(f64::from).collect();
    Tensor::from_vec(wide, shape, &Device::Cpu)
        .and_then(|t| Var::from_tensor(&t))
        .expect("shape fits")
}

impl Oracle {
    pub(crate) fn new(shape: &Shape, seed: u64) -> Self {
        let weights = shape.weights(seed).into_iter();
        Self {
            shape: shape.clone(),
            weights: weights
                .map(|(name, (shape, values))| (name, variable(&values, &shape)))
                .collect(),
            low_rank: BTreeMap::new(),
        }
    }

    pub(crate) fn add_low_rank(&mut self, module: &str, low_rank: LowRank) {
        self.low_rank.insert(module.to_owned(), low_rank);
    }

    /// Sum of the losses over the trained tokens, and its gradient with respect to every base
    /// weight (by its name) and every A and B (`MODULE.lora_A`, `MODULE.lora_B`).
    pub(crate) fn loss_and_gradients(
        &self,
        documents: &[Example],
    ) -> Result<(f64, BTreeMap<String, Vec<f64>>)> {
        let mut loss = Tensor::zeros((), DType::F64, &Device::Cpu)?;
        for document in documents {
            loss = (loss + self.loss(document)?)?;
        }
        let store = loss.backward()?;
        let low_rank = self.low_rank.iter().flat_map(|(module, l)| {
            [
                (format!("{module}.lora_A"), &l.a),
                (format!("{module}.lora_B"), &l.b),
            ]
        });
        let weights = self.weights.iter().map(|(n, v)| (n.clone(), v));
        let mut gradients = BTreeMap::new();
        for (name, variable) in weights.chain(low_rank) {
            let gradient = store
                .get(variable.as_tensor())
                .unwrap_or_else(|| panic!("candle gives no gradient of {name}"));
            let values: Vec<f64> = gradient.flatten_all()?.to_vec1()?;
            assert!(
                values.iter().any(|v| *v != 0.0),
                "candle's gradient of {name} is zero"
            );
            gradients.insert(name, values);
        }
        Ok((loss.to_scalar()?, gradients))
    }

    /// Logits of one document, `[T, V]`.
    pub(crate) fn logits(&self, ids: &[u32]) -> Result<Tensor> {
        let shape = &self.shape;
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let table = self.weight("model.embed_tokens.weight");
        let mut stream =
            (table.index_select(&ids, 0)? * shape.family.embedding_scale(shape.hidden))?;
        for layer in 0..shape.layers {
            let [before_attention, behind_attention, before_mlp, behind_mlp] =
                shape.family.norms().map(|name| (layer, name));
            let normed = self.layer_norm(before_attention, &stream)?;
            let output = self.attention(layer, &normed)?;
            stream = (stream + self.layer_norm(behind_attention, &output)?)?;
            let normed = self.layer_norm(before_mlp, &stream)?;
            let output = self.mlp(layer, &normed)?;
            stream = (stream + self.layer_norm(behind_mlp, &output)?)?;
        }
        let hidden = self.norm("model.norm", &stream)?;
        let head = if shape.tied {
            table
        } else {
            self.weight("lm_head.weight")
        };
        let logits = hidden.matmul(&head.t()?)?;
        cap(logits, shape.family.softcaps()[1])
    }

    fn mlp(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let at = |name: &str| format!("model.layers.{layer}.mlp.{name}");
        let gate = self.linear(&at("gate_proj"), x)?;
        let up = self.linear(&at("up_proj"), x)?;
        let hidden = (activate(self.shape.hidden_act, &gate)? * up)?;
        self.linear(&at("down_proj"), &hidden)
    }

    fn loss(&self, document: &Example) -> Result<Tensor> {
        let logits = self.logits(&document.input_ids)?;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
        let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let log_probability = shifted.broadcast_sub(&log_sum)?;
        let labels = document.labels.iter().skip(1).enumerate();
        let (rows, targets): (Vec<u32>, Vec<u32>) = labels
            .filter(|(_, label)| **label != IGNORE_INDEX)
            .map(|(row, label)| (row as u32, *label as u32))
            .unzip();
        let count = rows.len();
        let rows = log_probability.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
        let targets = Tensor::from_vec(targets, (count, 1), &Device::Cpu)?;
        rows.gather(&targets, 1)?.sum_all()?.neg()
    }

    fn attention(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let shape = &self.shape;
        let (family, name) = (shape.family, format!("model.layers.{layer}.self_attn"));
        let (tokens, width) = (x.dim(0)?, shape.head_dim);
        let heads = |part: &str, count: usize| -> Result<Tensor> {
            let heads = self
                .linear(&format!("{name}.{part}_proj"), x)?
                .reshape((tokens, count, width))?
                .transpose(0, 1)?
                .contiguous()?;
            if part == "v" || !family.has_qk_norm() {
                return Ok(heads);
            }
            self.norm(&format!("{name}.{part}_norm"), &heads)
        };
        let rope = family.rope(layer);
        let q = rotate(&heads("q", shape.heads)?, rope)?;
        let group = shape.heads / shape.kv_heads;
        let spread = |t: Tensor| -> Result<Tensor> {
            t.unsqueeze(1)?
                .broadcast_as((shape.kv_heads, group, tokens, width))?
                .contiguous()?
                .reshape((shape.heads, tokens, width))
        };
        let k = spread(rotate(&heads("k", shape.kv_heads)?, rope)?)?;
        let v = spread(heads("v", shape.kv_heads)?)?;
        let scores = q.matmul(&k.transpose(1, 2)?.contiguous()?)?;
        let scores = cap(
            (scores * family.attention_scale(width))?,
            family.softcaps()[0],
        )?;
        let window = family.window(layer);
        let sees = |query: usize, key: usize| key <= query && query - key < window;
        let mask: Vec<f64> = (0..tokens * tokens)
            .map(|i| {
                if sees(i / tokens, i % tokens) {
                    0.0
                } else {
                    -1e30
                }
            })
            .collect();
        let mask = Tensor::from_vec(mask, (tokens, tokens), &Device::Cpu)?;
        let scores = scores.broadcast_add(&mask)?;
        let weights = scores
            .broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?
            .exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let mixed = weights
            .matmul(&v)?
            .transpose(0, 1)?
            .contiguous()?
            .reshape((tokens, shape.heads * width))?;
        self.linear(&format!("{name}.o_proj"), &mixed)
    }

    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let mut y = x.matmul(&self.weight(&format!("{name}.weight")).t()?)?;
        if let Some(bias) = self.weights.get(&format!("{name}.bias")) {
            y = y.broadcast_add(bias.as_tensor())?;
        }
        let Some(low_rank) = self.low_rank.get(name) else {
            return Ok(y);
        };
        let update = x
            .matmul(&low_rank.a.as_tensor().t()?)?
            .matmul(&low_rank.b.as_tensor().t()?)?;
        y + (update * low_rank.scale)?
    }

    /// A norm of a layer, where there is one.
    fn layer_norm(&self, (layer, name): (usize, Option<&str>), x: &Tensor) -> Result<Tensor> {
        match name {
            None => Ok(x.clone()),
            Some(name) => self.norm(&format!("model.layers.{layer}.{name}"), x),
        }
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight(&format!("{name}.weight"));
        let weight = (weight + self.shape.family.norm_offset())?;
        root_mean_square(x)?.broadcast_mul(&weight)
    }

    fn weight(&self, name: &str) -> &Tensor {
        self.weights
            .get(name)
            .unwrap_or_else(|| panic!("{name} is no weight"))
            .as_tensor()
    }
}

/// x over the root of its mean square.
fn root_mean_square(x: &Tensor) -> Result<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean_square + 1e-5)?.sqrt()?)
}

/// An activation by Transformers' name.
fn activate(name: &str, x: &Tensor) -> Result<Tensor> {
    match name {
        "silu" => x * (x.neg()?.exp()? + 1.0)?.recip()?,
        "gelu" => (x * ((x / 2.0_f64.sqrt())?.erf()? + 1.0)?)? * 0.5,
        "gelu_pytorch_tanh" => {
            let cubed = (x.sqr()? * x)?;
            let u = ((x + (cubed * 0.044_715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
            (x * (u.tanh()? + 1.0)?)? * 0.5
        }
        _ => panic!("no activation is called {name}"),
    }
}

/// `softcap * tanh(x / softcap)`.
fn cap(x: Tensor, softcap: Option<f64>) -> Result<Tensor> {
    match softcap {
        None => Ok(x),
        Some(softcap) => (x / softcap)?.tanh()? * softcap,
    }
}

/// Rotate-half RoPE over `[heads, T, width]`, with a base and a divisor of positions.
fn rotate(x: &Tensor, [base, divisor]: [f64; 2]) -> Result<Tensor> {
    let (_, tokens, width) = x.dims3()?;
    let half = width / 2;
    let angles: Vec<f64> = (0..tokens * half)
        .map(|i| {
            let position = (i / half) as f64 / divisor;
            position / base.powf((2 * (i % half)) as f64 / width as f64)
        })
        .collect();
    let table = |f: fn(f64) -> f64| {
        let values = angles.iter().copied().map(f).collect::<Vec<f64>>();
        Tensor::from_vec(values, (tokens, half), &Device::Cpu)
    };
    let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
    let (low, high) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let first = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
    let second = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 2)
}
