//! The examples of a data set: in memory, or in the file that preparation left them in.
//!
//! Of each example memory holds where its tokens lie and how many of them are trained. Choosing,
//! repeating, shuffling and cutting examples moves no token.

use crate::data::batch::Example;
use crate::io::read_exact_at;
use crate::{Error, Result};
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

/// A token id and its label, whose bits are those of an i32.
pub(super) type Pair = [u32; 2];

/// Where an example lies among the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    begin: u64,
    length: u32,
    trained: u32,
}

#[derive(Clone, Debug)]
enum Tokens {
    Held(Arc<Vec<Pair>>),
    File(Arc<TokenFile>),
}

/// A file with tokens from a byte on.
#[derive(Debug)]
pub(super) struct TokenFile {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) first_byte: u64,
}

/// Examples that can be asked for one by one.
#[derive(Clone, Debug)]
pub struct Examples {
    places: Vec<Place>,
    tokens: Tokens,
}

impl Default for Examples {
    fn default() -> Self {
        Self::from(Vec::new())
    }
}

impl From<Vec<Example>> for Examples {
    fn from(examples: Vec<Example>) -> Self {
        examples.into_iter().collect()
    }
}

impl FromIterator<Example> for Examples {
    fn from_iter<I: IntoIterator<Item = Example>>(examples: I) -> Self {
        let mut collector = Collector::in_memory();
        for example in examples {
            collector.hold(&example, example.trained_tokens());
        }
        collector.held()
    }
}

impl Examples {
    /// Examples one after the other in a file; of each its length and how many tokens are trained.
    pub(super) fn in_file(file: TokenFile, sizes: impl Iterator<Item = [u32; 2]>) -> Self {
        let mut begin = 0;
        let place = |[length, trained]: [u32; 2]| {
            let place = Place {
                begin,
                length,
                trained,
            };
            begin += u64::from(length);
            place
        };
        Self {
            places: sizes.map(place).collect(),
            tokens: Tokens::File(Arc::new(file)),
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The number of tokens of each.
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = usize> {
        self.places.iter().map(|place| place.length as usize)
    }

    /// The number of tokens of each that are predicted.
    pub fn trained_tokens(&self) -> impl ExactSizeIterator<Item = usize> {
        self.places.iter().map(|place| place.trained as usize)
    }

    /// Tokens that memory holds: none of those in a file.
    #[must_use]
    pub fn tokens_in_memory(&self) -> usize {
        match &self.tokens {
            Tokens::Held(pairs) => pairs.len(),
            Tokens::File(_) => 0,
        }
    }

    /// Example `index`.
    ///
    /// # Errors
    /// [`Error::Read`] if it lies in a file that cannot be read.
    ///
    /// # Panics
    /// If there is none of that number.
    pub fn get(&self, index: usize) -> Result<Example> {
        let place = self.places[index];
        let length = place.length as usize;
        match &self.tokens {
            Tokens::Held(pairs) => {
                let begin = place.begin as usize;
                Ok(example(&pairs[begin..begin + length]))
            }
            Tokens::File(tokens) => {
                let mut pairs: Vec<Pair> = vec![[0; 2]; length];
                let at = tokens.first_byte + place.begin * size_of::<Pair>() as u64;
                read_exact_at(&tokens.file, bytemuck::cast_slice_mut(&mut pairs), at)
                    .map_err(Error::read(&tokens.path))?;
                Ok(example(&pairs))
            }
        }
    }

    /// Calls `each` with every example in order.
    ///
    /// # Errors
    /// As [`Examples::get`], and what `each` returns.
    pub fn for_each(&self, mut each: impl FnMut(usize, &Example) -> Result<()>) -> Result<()> {
        (0..self.len()).try_for_each(|i| each(i, &self.get(i)?))
    }

    /// All of them in memory.
    ///
    /// # Errors
    /// As [`Examples::get`].
    pub fn to_vec(&self) -> Result<Vec<Example>> {
        (0..self.len()).map(|i| self.get(i)).collect()
    }

    /// Those of these numbers, in this order; a number may come again.
    ///
    /// # Panics
    /// If there is none of a number.
    #[must_use]
    pub fn select(&self, indices: impl IntoIterator<Item = usize>) -> Self {
        Self {
            places: indices.into_iter().map(|i| self.places[i]).collect(),
            tokens: self.tokens.clone(),
        }
    }

    /// Documents longer than `max_length` in pieces, in order; the strategy `bfd_split` is this, then
    /// [`pack_bfd`](super::pack_bfd). The first token of a piece is not predicted.
    ///
    /// # Errors
    /// As [`Examples::get`].
    pub fn split_long(&self, max_length: usize) -> Result<Self> {
        let mut places = Vec::with_capacity(self.len());
        for (i, place) in self.places.iter().enumerate() {
            if place.length as usize <= max_length || max_length == 0 {
                places.push(*place);
                continue;
            }
            let whole = self.get(i)?;
            let mut begin = place.begin;
            for labels in whole.labels.chunks(max_length) {
                let piece = Place {
                    begin,
                    length: labels.len() as u32,
                    trained: Example::trained_labels(labels) as u32,
                };
                places.push(piece);
                begin += labels.len() as u64;
            }
        }
        Ok(Self {
            places,
            tokens: self.tokens.clone(),
        })
    }

    /// One text after another, cut every `max_length` tokens; the strategy `wrapped`. Each piece is one
    /// document, in which texts see those before them: for texts that are pre-training data alone.
    /// Examples that do not lie one after the other are gathered in memory.
    ///
    /// # Errors
    /// As [`Examples::get`].
    ///
    /// # Source
    /// TRL's packing strategy `wrapped`.
    pub fn wrap(&self, max_length: usize) -> Result<Self> {
        let follows = |pair: &[Place]| pair[0].begin + u64::from(pair[0].length) == pair[1].begin;
        if !self.places.windows(2).all(follows) {
            let mut collector = Collector::in_memory();
            self.for_each(|_, example| {
                collector.hold(example, example.trained_tokens());
                Ok(())
            })?;
            return collector.held().wrap(max_length);
        }
        let begin = self.places.first().map_or(0, |place| place.begin);
        let all: u64 = self
            .places
            .iter()
            .map(|place| u64::from(place.length))
            .sum();
        let mut blocks = Self {
            places: Vec::new(),
            tokens: self.tokens.clone(),
        };
        let step = if max_length == 0 {
            all
        } else {
            max_length as u64
        };
        let mut done = 0;
        while done < all {
            let length = step.min(all - done);
            blocks.places.push(Place {
                begin: begin + done,
                length: length as u32,
                trained: 0,
            });
            done += length;
        }
        for i in 0..blocks.len() {
            blocks.places[i].trained = blocks.get(i)?.trained_tokens() as u32;
        }
        Ok(blocks)
    }
}

fn example(pairs: &[Pair]) -> Example {
    Example {
        input_ids: pairs.iter().map(|pair| pair[0]).collect(),
        labels: pairs.iter().map(|pair| pair[1] as i32).collect(),
    }
}

/// Takes examples one by one, into memory or into a file.
pub(super) struct Collector<'f> {
    /// Length, and trained tokens, of each.
    sizes: Vec<[u32; 2]>,
    held: Vec<Pair>,
    to: Option<&'f mut dyn Write>,
}

impl<'f> Collector<'f> {
    pub(super) fn in_memory() -> Self {
        Self {
            sizes: Vec::new(),
            held: Vec::new(),
            to: None,
        }
    }

    pub(super) fn to(file: &'f mut dyn Write) -> Self {
        Self {
            to: Some(file),
            ..Self::in_memory()
        }
    }

    /// Takes one of which so many labels are trained.
    pub(super) fn push(&mut self, example: &Example, trained: usize) -> io::Result<()> {
        self.hold(example, trained);
        let Some(file) = &mut self.to else {
            return Ok(());
        };
        file.write_all(bytemuck::cast_slice(&self.held))?;
        self.held.clear();
        Ok(())
    }

    fn hold(&mut self, example: &Example, trained: usize) {
        self.sizes.push([example.len() as u32, trained as u32]);
        let pairs = example.input_ids.iter().zip(&example.labels);
        self.held
            .extend(pairs.map(|(id, label)| [*id, *label as u32]));
    }

    pub(super) fn len(&self) -> usize {
        self.sizes.len()
    }

    /// Of what went into a file: length, and trained tokens, of each.
    pub(super) fn into_sizes(self) -> Vec<[u32; 2]> {
        self.sizes
    }

    /// What was held.
    pub(super) fn held(self) -> Examples {
        let mut begin = 0;
        let place = |[length, trained]: [u32; 2]| {
            let place = Place {
                begin,
                length,
                trained,
            };
            begin += u64::from(length);
            place
        };
        Examples {
            places: self.sizes.into_iter().map(place).collect(),
            tokens: Tokens::Held(Arc::new(self.held)),
        }
    }
}
