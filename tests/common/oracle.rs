//! The same decoder in candle's tensor operations, in f64, with candle's autograd: written from the
//! formulas, sharing nothing with the engine. Only operations that candle differentiates are used
//! (its fused softmax, norm and rope drop gradients without a word).

use super::Shape;
use super::family::Rope;
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
        let (shape, family) = (&self.shape, self.shape.family);
        let tokens = ids.len();
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let table = self.weight(&format!("{}.weight", family.embedding()));
        let mut stream = (table.index_select(&ids, 0)? * family.embedding_scale(shape.hidden))?;
        if let Some(positions) = family.positions() {
            let rows = self.weight(&format!("{positions}.weight"));
            stream = (stream + rows.narrow(0, 0, tokens)?)?;
        }
        let join = |stream: Tensor, output: Tensor| stream + (output * family.residual_scale())?;
        for layer in 0..shape.layers {
            let [before_attention, behind_attention, before_mlp, behind_mlp] =
                family.norms().map(|name| (layer, name));
            let normed = self.layer_norm(before_attention, &stream)?;
            let output = self.attention(layer, &normed)?;
            stream = join(stream, self.layer_norm(behind_attention, &output)?)?;
            let normed = self.layer_norm(before_mlp, &stream)?;
            let output = self.mlp(layer, &normed)?;
            stream = join(stream, self.layer_norm(behind_mlp, &output)?)?;
        }
        let hidden = self.norm(family.final_norm(), &stream)?;
        let head = if shape.tied {
            table
        } else {
            self.weight("lm_head.weight")
        };
        let logits = (hidden.matmul(&head.t()?)? * family.logits_scale())?;
        cap(logits, family.softcaps()[1])
    }

    /// Names of the linears of a layer: to q, k and v, to the output, to the mlp's width, and back.
    fn linears(&self, layer: usize) -> [Vec<String>; 4] {
        let family = self.shape.family;
        let named = family.linears(&self.shape).into_iter();
        let names: Vec<String> = named
            .map(|(name, _)| family.in_layer(layer, name))
            .collect();
        // Seven, or q, k and v in one, and gate and up in one.
        let ends = if names.len() == 7 {
            [3, 4, 6]
        } else {
            [1, 2, 3]
        };
        let [qkv, o, up] = ends;
        [&names[..qkv], &names[qkv..o], &names[o..up], &names[up..]].map(<[String]>::to_vec)
    }

    /// The outputs of `names` side by side.
    fn side_by_side(&self, names: &[String], x: &Tensor) -> Result<Tensor> {
        let outputs: Result<Vec<Tensor>> = names.iter().map(|n| self.linear(n, x)).collect();
        Tensor::cat(&outputs?, D::Minus1)
    }

    fn mlp(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let [_, _, up, down] = self.linears(layer);
        let (wide, act) = (self.side_by_side(&up, x)?, self.shape.hidden_act);
        let width = self.shape.intermediate;
        let hidden = if self.shape.family.has_gate() {
            let gate = wide.narrow(1, 0, width)?.contiguous()?;
            (activate(act, &gate)? * wide.narrow(1, width, width)?)?
        } else {
            activate(act, &wide)?
        };
        self.linear(&down[0], &hidden)
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
        let (shape, family) = (&self.shape, self.shape.family);
        let (tokens, width) = (x.dim(0)?, shape.head_dim);
        let [qkv, o, _, _] = self.linears(layer);
        let qkv = self.side_by_side(&qkv, x)?;
        let rope = family.rope(shape, layer, tokens);
        let heads = |part: &str, first: usize, count: usize| -> Result<Tensor> {
            let mut heads = qkv.narrow(1, first * width, count * width)?;
            let norm = family.in_layer(layer, &format!("self_attn.{part}_norm"));
            let over = family.qk_norms(shape).map(|[over, _]| over);
            if over.is_some_and(|over| over > width) && part != "v" {
                heads = self.norm(&norm, &heads)?;
            }
            let heads = heads
                .reshape((tokens, count, width))?
                .transpose(0, 1)?
                .contiguous()?;
            match over {
                Some(over) if over == width && part != "v" => self.norm(&norm, &heads),
                _ => Ok(heads),
            }
        };
        let q = rotate(&heads("q", 0, shape.heads)?, &rope)?;
        let group = shape.heads / shape.kv_heads;
        let spread = |t: Tensor| -> Result<Tensor> {
            t.unsqueeze(1)?
                .broadcast_as((shape.kv_heads, group, tokens, width))?
                .contiguous()?
                .reshape((shape.heads, tokens, width))
        };
        let k = spread(rotate(&heads("k", shape.heads, shape.kv_heads)?, &rope)?)?;
        let v = spread(heads("v", shape.heads + shape.kv_heads, shape.kv_heads)?)?;
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
        self.linear(&o[0], &mixed)
    }

    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight(&format!("{name}.weight"));
        let mut y = match self.shape.family.is_conv1d() {
            true => x.matmul(weight)?,
            false => x.matmul(&weight.t()?)?,
        };
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
            Some(name) => self.norm(&self.shape.family.in_layer(layer, name), x),
        }
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight(&format!("{name}.weight"));
        let weight = (weight + self.shape.family.norm_offset())?;
        if !self.shape.family.has_layer_norm() {
            return root_mean_square(x)?.broadcast_mul(&weight);
        }
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        root_mean_square(&centred)?
            .broadcast_mul(&weight)?
            .broadcast_add(self.weight(&format!("{name}.bias")))
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
        "gelu_pytorch_tanh" | "gelu_new" => {
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

/// Rotate-half RoPE over `[heads, T, width]`; what has no frequency stays.
fn rotate(x: &Tensor, rope: &Rope) -> Result<Tensor> {
    let (_, tokens, width) = x.dims3()?;
    let half = rope.frequencies.len();
    if half == 0 {
        return Ok(x.clone());
    }
    let angles: Vec<f64> = (0..tokens * half)
        .map(|i| (i / half) as f64 * rope.frequencies[i % half])
        .collect();
    let table = |f: fn(f64) -> f64| {
        let values = angles.iter().map(|angle| f(*angle) * rope.scale);
        Tensor::from_vec(values.collect::<Vec<f64>>(), (tokens, half), &Device::Cpu)
    };
    let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
    let (low, high) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let rest = x.narrow(2, 2 * half, width - 2 * half)?;
    let first = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
    let second = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second, rest], 2)
}
