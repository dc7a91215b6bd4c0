//! Generation: the same layers over new tokens only, with keys and values of the past kept.

use super::inputs::Marks;
use super::layer::Layer;
use super::room::Wide;
use super::{Inputs, Model, Normed, Pass, Run, prompt};
use crate::adapter::Prompt;
use crate::data::PackedBatch;
use crate::params::FlatBuffer;
use crate::{Error, Result};
use ferrotune_kernels::{DType, Indices, Tensor, attention};
use std::borrow::Cow;

/// Keys and values of one document, for every layer.
#[derive(Debug)]
pub struct KvCache {
    /// Per layer: keys and values `[capacity, K E]`.
    layers: Vec<[Tensor; 2]>,
    /// The document so far.
    tokens: Vec<u32>,
    len: usize,
    capacity: usize,
    /// Whether updates that tokens call up act from here on.
    invoked: bool,
}

impl KvCache {
    /// Room for a document of `capacity` tokens, prompt and answer together.
    #[must_use]
    pub fn new(model: &Model, dtype: DType, capacity: usize) -> Self {
        let width = model.config.kv_width();
        // A prompt stands before the document.
        let capacity = capacity + model.prompt.map_or(0, |prompt| prompt.tokens);
        let tensor = || Tensor::empty(&model.device, dtype, capacity, width);
        let layers = (0..model.layers.len())
            .map(|_| [tensor(), tensor()])
            .collect();
        Self {
            layers,
            tokens: Vec::with_capacity(capacity),
            len: 0,
            capacity,
            invoked: false,
        }
    }

    /// Tokens seen so far, those of a prompt included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was seen yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Documents that go on through one of several adapters over a base.
#[derive(Clone, Copy, Debug)]
pub struct MemberDocuments<'a> {
    /// Which adapter of the model; `None` for the base alone.
    pub number: Option<usize>,
    /// Its values.
    pub params: &'a FlatBuffer,
    /// How many they are.
    pub documents: usize,
}

impl Model {
    /// Logits `[S, V]` f32 of the token that follows each document, after appending
    /// `new_tokens[s]` (at least one) to document s.
    ///
    /// # Errors
    /// If a token id lies outside the vocabulary, or a cache is full.
    pub fn extend(
        &self,
        pass: Pass<'_>,
        params: &FlatBuffer,
        caches: &mut [&mut KvCache],
        new_tokens: &[&[u32]],
    ) -> Result<Tensor> {
        self.extend_with(pass, params, &[], caches, new_tokens)
    }

    /// [`Model::extend`] of documents that go through adapters of [`Model::load_together`]: those of the first of
    /// `members`, behind them those of the second, and so on.
    ///
    /// # Errors
    /// As there.
    pub fn extend_together(
        &self,
        pass: Pass<'_>,
        members: &[MemberDocuments<'_>],
        caches: &mut [&mut KvCache],
        new_tokens: &[&[u32]],
    ) -> Result<Tensor> {
        let params = FlatBuffer::empty_on(&self.device);
        self.extend_with(pass, &params, members, caches, new_tokens)
    }

    fn extend_with(
        &self,
        pass: Pass<'_>,
        params: &FlatBuffer,
        members: &[MemberDocuments<'_>],
        caches: &mut [&mut KvCache],
        new_tokens: &[&[u32]],
    ) -> Result<Tensor> {
        let restarted = self.restart_longer(caches, new_tokens);
        let restarted = self.behind_prompt(caches, restarted);
        let new_tokens: Vec<&[u32]> = restarted.iter().map(AsRef::as_ref).collect();
        let batch = new_batch(caches, &new_tokens)?;
        let prompt_rows = self.prompt.map(|Prompt { tokens, .. }| {
            prompt::prompt_rows(&batch, tokens, |s| caches[s].len == 0)
        });
        let marks = Marks {
            prompt_rows: prompt_rows.unwrap_or_default(),
            silent: self.silent(caches, &batch),
        };
        let inputs = Inputs::of(self, pass, &Cow::Borrowed(&batch), marks, false);
        let mut first = 0;
        let own = members.iter().map(|member| {
            let documents = first..first + member.documents;
            first = documents.end;
            let batch = new_batch(&caches[documents.clone()], &new_tokens[documents])?;
            let inputs = Inputs::of(self, pass, &Cow::Owned(batch), Marks::default(), false);
            Ok((inputs, FlatBuffer::empty_on(&self.device)))
        });
        let mut own: Vec<_> = own.collect::<Result<_>>()?;
        let mut run = Run::new(params, pass, &inputs)?;
        for (member, (inputs, grads)) in members.iter().zip(&mut own) {
            run.join(member.number, Run::new(member.params, pass, inputs)?, grads);
        }
        let workspace = pass.workspace;
        let mut stream = self.embed(&run)?;
        let first_norm = self.layers.first().map_or(&self.norm, |l| &l.input_norm);
        let mut normed = first_norm.forward(&run, &stream)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let next_norm = self.layers.get(i + 1).map_or(&self.norm, |l| &l.input_norm);
            let (middle, middle_normed) = layer.attend_cached(&run, i, caches, &stream, normed)?;
            workspace.give(stream);
            (stream, normed) = layer.mlp_once(&run, middle, middle_normed, next_norm)?;
        }
        let hidden = normed.into_read(&run, stream);
        for (cache, tokens) in caches.iter_mut().zip(&new_tokens) {
            cache.len += tokens.len();
            cache.tokens.truncate(cache.len - tokens.len());
            cache.tokens.extend_from_slice(tokens);
        }
        let mut last = Tensor::empty(
            workspace.device(),
            run.dtype,
            caches.len(),
            self.config.hidden_size,
        );
        for (s, end) in batch.cu_seqlens[1..].iter().enumerate() {
            let row = *end as usize - 1;
            last.view_mut()
                .row_range(s..s + 1)
                .copy_from(hidden.view().row_range(row..row + 1));
        }
        workspace.give(hidden);
        run.end();
        self.project(pass, params, last.view())
    }
}

impl Model {
    /// The tokens to append to each document: where these make it so long that its angles are others, or may change
    /// where updates act, all of it from the start.
    fn restart_longer<'a>(
        &self,
        caches: &mut [&mut KvCache],
        new_tokens: &[&'a [u32]],
    ) -> Vec<Cow<'a, [u32]>> {
        let append = |(cache, &tokens): (&mut &mut KvCache, &&'a [u32])| {
            let lengths = [cache.len, cache.len + tokens.len()].map(|len| len as u32);
            let mut ropes = self.config.ropes.iter();
            let same = ropes.all(|rope| rope.variant(lengths[0]) == rope.variant(lengths[1]));
            // Several tokens are a question, which may call updates up anew; an answer comes one by one.
            let asks = self.invocation.is_some() && tokens.len() > 1;
            if (same && !asks) || cache.len == 0 {
                return tokens.into();
            }
            cache.len = 0;
            let prompt = self.prompt.map_or(0, |prompt| prompt.tokens);
            [&cache.tokens[prompt..], tokens].concat().into()
        };
        caches.iter_mut().zip(new_tokens).map(append).collect()
    }
}

impl Model {
    /// Where updates that tokens call up do not act among new tokens.
    fn silent(&self, caches: &mut [&mut KvCache], batch: &PackedBatch) -> Vec<u32> {
        let Some(invocation) = &self.invocation else {
            return Vec::new();
        };
        for (cache, bounds) in caches.iter_mut().zip(batch.cu_seqlens.windows(2)) {
            if cache.len == 0 {
                let document = &batch.input_ids[bounds[0] as usize..bounds[1] as usize];
                cache.invoked = invocation.is_in(document);
            }
        }
        invocation.silent(batch, |s| (caches[s].len > 0).then_some(caches[s].invoked))
    }
}

impl Model {
    /// The tokens to append, behind the virtual ones of a prompt where a document begins.
    fn behind_prompt<'a>(
        &self,
        caches: &[&mut KvCache],
        new_tokens: Vec<Cow<'a, [u32]>>,
    ) -> Vec<Cow<'a, [u32]>> {
        let Some(Prompt { tokens, .. }) = self.prompt else {
            return new_tokens;
        };
        let begin = |(cache, new): (&&mut KvCache, Cow<'a, [u32]>)| {
            if cache.len > 0 {
                return new;
            }
            let mut all = vec![prompt::PLACEHOLDER; tokens];
            all.extend_from_slice(&new);
            all.into()
        };
        caches.iter().zip(new_tokens).map(begin).collect()
    }
}

impl Layer {
    /// The attention block over new tokens; returns the residual stream after it and its norm.
    fn attend_cached(
        &self,
        run: &Run<'_>,
        index: usize,
        caches: &mut [&mut KvCache],
        input: &Tensor,
        mut normed: Normed,
    ) -> Result<(Tensor, Normed)> {
        let workspace = run.workspace;
        let mut qkv = workspace.take(run.dtype, run.rows, self.qkv.out_features());
        let x = Normed::wide(&mut normed.y, input);
        self.qkv.forward(run, x, qkv.view_mut())?;
        run.give(normed.y.into_iter().chain(normed.statistics));
        let positioned = self.position_all(run, &mut qkv)?;
        let mut attended = self.o.take_input(run);
        let [q, k, v] = self.split(&qkv, positioned.as_ref());
        for (s, bounds) in run.inputs.cu_seqlens.windows(2).enumerate() {
            let rows = bounds[0] as usize..bounds[1] as usize;
            let (start, end) = (caches[s].len, caches[s].len + rows.len());
            let [keys, values] = &mut caches[s].layers[index];
            keys.view_mut()
                .row_range(start..end)
                .copy_from(k.row_range(rows.clone()));
            values
                .view_mut()
                .row_range(start..end)
                .copy_from(v.row_range(rows.clone()));
            let mut lse = workspace.take(DType::F32, rows.len(), self.attention.heads);
            let bounds = |end: usize| Indices::new(vec![0, end as u32], workspace.device());
            attention::forward(
                &self.attention,
                q.row_range(rows.clone()),
                keys.view().row_range(0..end),
                values.view().row_range(0..end),
                &bounds(rows.len()),
                &bounds(end),
                (attended.view_mut().row_range(rows)).columns(0..self.o.in_features),
                lse.view_mut(),
            )?;
            workspace.give(lse);
        }
        run.give(positioned);
        let mut output = workspace.take(run.dtype, run.rows, self.o.out_features());
        let x = Wide::WithRoom(attended.view_mut());
        self.o.forward(run, x, output.view_mut())?;
        run.give([attended, qkv]);
        let residual = &self.attention_residual;
        let joined = residual.forward(run, output, input, &self.mlp_norm)?;
        Ok(joined.without_saved(workspace))
    }

    /// The mlp block with nothing kept.
    fn mlp_once(
        &self,
        run: &Run<'_>,
        middle: Tensor,
        mut normed: Normed,
        next_norm: &super::Norm,
    ) -> Result<(Tensor, Normed)> {
        let workspace = run.workspace;
        let mut gate_up = workspace.take(run.dtype, run.rows, self.gate_up.out_features());
        let x = Normed::wide(&mut normed.y, &middle);
        self.gate_up.forward(run, x, gate_up.view_mut())?;
        run.give(normed.y.into_iter().chain(normed.statistics));
        let mut activated = self.down.take_input(run);
        self.activate(&gate_up, &mut activated)?;
        workspace.give(gate_up);
        let mut output = workspace.take(run.dtype, run.rows, self.down.out_features());
        let x = Wide::WithRoom(activated.view_mut());
        self.down.forward(run, x, output.view_mut())?;
        workspace.give(activated);
        let residual = &self.mlp_residual;
        let joined = residual.forward(run, output, &middle, next_norm)?;
        workspace.give(middle);
        Ok(joined.without_saved(workspace))
    }
}

/// The new tokens as one packed batch whose positions go on where the caches end.
fn new_batch(caches: &[&mut KvCache], new_tokens: &[&[u32]]) -> Result<PackedBatch> {
    let mut batch = PackedBatch {
        cu_seqlens: vec![0],
        ..PackedBatch::default()
    };
    for (s, (cache, tokens)) in caches.iter().zip(new_tokens).enumerate() {
        let end = cache.len + tokens.len();
        if tokens.is_empty() || end > cache.capacity {
            let message = format!(
                "document {s}: {} new tokens after {} do not fit a cache of {}",
                tokens.len(),
                cache.len,
                cache.capacity
            );
            return Err(Error::config("max_new_tokens", message));
        }
        batch.input_ids.extend_from_slice(tokens);
        batch
            .labels
            .resize(batch.input_ids.len(), crate::data::IGNORE_INDEX);
        batch.position_ids.extend(cache.len as u32..end as u32);
        batch.cu_seqlens.push(batch.input_ids.len() as u32);
        batch.sequence_ids.push(s as u64);
        batch.rope_lengths.push(end as u32);
    }
    Ok(batch)
}
