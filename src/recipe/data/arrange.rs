//! What becomes of examples before an epoch is planned: held out, taken more or less often, shuffled, cut.

use super::Prepared;
use ferrotune_core::config::{PackingStrategy, TrainConfig};
use ferrotune_core::data::{Dataset, Example, Examples, RecordKind};
use ferrotune_core::io::blake3_of_bytes;
use ferrotune_core::{Error, Result};
use ferrotune_kernels::rng::{Stream, key_for};

/// Training examples, and those held out of them. `weights` says how often those of each file are taken.
pub(super) fn training(
    config: &TrainConfig,
    mut dataset: Dataset,
    weights: &[f64],
) -> Result<Prepared> {
    let data = &config.data;
    let mut held_out = hold_out(&mut dataset, data.test_split_size)?;
    let mut stream = Stream::new(key_for(config.runtime.data_seed(), "rows of the data set"));
    if weights.iter().any(|w| *w != 1.0) {
        let ends = dataset.file_ends.clone();
        let weighed = weigh(&dataset.examples, &ends, weights, &mut stream);
        dataset.replace(weighed);
    }
    if data.shuffle_dataset {
        let mut order: Vec<usize> = (0..dataset.examples.len()).collect();
        stream.shuffle(&mut order);
        dataset.examples = dataset.examples.select(order);
    }
    cut(config, data.packing, &mut dataset)?;
    if let Some(held_out) = &mut held_out {
        cut(config, data.packs_evaluation(), held_out)?;
    }
    Ok((dataset, held_out))
}

/// Takes about `share` of the examples out. Which ones is a function of what they say: the same row is
/// on the same side in every run, whatever stands around it, and so are its copies.
fn hold_out(dataset: &mut Dataset, share: f64) -> Result<Option<Dataset>> {
    if share == 0.0 {
        return Ok(None);
    }
    let (mut kept, mut out) = (Vec::new(), Vec::new());
    let mut ends = Vec::new();
    let mut file_ends = dataset.file_ends.iter().peekable();
    dataset.examples.for_each(|i, example| {
        while file_ends.next_if(|end| **end <= i).is_some() {
            ends.push(kept.len());
        }
        let side = if is_held_out(example, share) {
            &mut out
        } else {
            &mut kept
        };
        side.push(i);
        Ok(())
    })?;
    ends.resize(dataset.file_ends.len(), kept.len());
    let counts = [kept.len(), out.len()];
    if counts.contains(&0) {
        return Err(Error::config(
            "test_split_size",
            format!(
                "{share} leaves {} rows to train on and {} to evaluate on; give more rows, or an \
                 eval_file",
                counts[0], counts[1]
            ),
        ));
    }
    let mut held_out = Dataset {
        kind: dataset.kind,
        ..Dataset::default()
    };
    held_out.report.rows = counts[1] as u64;
    dataset.report.rows -= counts[1] as u64;
    held_out.replace(dataset.examples.select(out));
    dataset.replace(dataset.examples.select(kept));
    dataset.file_ends = ends;
    Ok(Some(held_out))
}

fn is_held_out(example: &Example, share: f64) -> bool {
    let bytes: Vec<u8> = example
        .input_ids
        .iter()
        .flat_map(|id| id.to_le_bytes())
        .collect();
    let digest = blake3_of_bytes(&bytes);
    let first = u64::from_str_radix(&digest[..13], 16).unwrap_or(0);
    (first as f64) < share * (1_u64 << 52) as f64
}

/// The examples of each file as often as its weight says; of a fraction, some that the seed chooses.
fn weigh(examples: &Examples, ends: &[usize], weights: &[f64], stream: &mut Stream) -> Examples {
    let mut all = Vec::new();
    let mut begin = 0;
    for (&end, &weight) in ends.iter().zip(weights) {
        let of_file = begin..end;
        begin = end;
        for _ in 0..weight as usize {
            all.extend(of_file.clone());
        }
        let mut some: Vec<usize> = of_file.clone().collect();
        stream.shuffle(&mut some);
        some.truncate((of_file.len() as f64 * weight.fract()).round() as usize);
        some.sort_unstable();
        all.extend(some);
    }
    examples.select(all)
}

/// Cuts examples where packing does not truncate them.
pub(super) fn cut(config: &TrainConfig, packing: bool, dataset: &mut Dataset) -> Result<()> {
    let data = &config.data;
    let Some(max_length) = data.max_length.filter(|_| packing) else {
        return Ok(());
    };
    match data.packing_strategy {
        PackingStrategy::Bfd => {}
        PackingStrategy::BfdSplit => dataset.replace(dataset.examples.split_long(max_length)?),
        PackingStrategy::Wrapped => {
            check_is_text(dataset)?;
            dataset.replace(dataset.examples.wrap(max_length)?);
        }
    }
    Ok(())
}

/// In wrapped blocks, rows see those before them.
fn check_is_text(dataset: &Dataset) -> Result<()> {
    match dataset.kind {
        None | Some(RecordKind::Text) => Ok(()),
        Some(kind) => Err(Error::config(
            "packing_strategy",
            format!(
                "`wrapped` lets rows see each other, which is for pre-training on text alone, and \
                 these rows are {kind}; use bfd or bfd_split"
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(files: &[usize]) -> Dataset {
        let mut dataset = Dataset::default();
        let mut examples = Vec::new();
        for &rows in files {
            let first = examples.len() as u32;
            examples.extend((first..first + rows as u32).map(|id| Example {
                input_ids: vec![id, 7],
                labels: vec![id as i32, 7],
            }));
            dataset.file_ends.push(examples.len());
        }
        dataset.examples = examples.into();
        dataset.report.rows = dataset.examples.len() as u64;
        dataset
    }

    fn ids(dataset: &Dataset) -> Vec<u32> {
        let examples = dataset.examples.to_vec().expect("memory is readable");
        examples.iter().map(|e| e.input_ids[0]).collect()
    }

    #[test]
    fn held_out_rows_depend_on_what_they_say_alone() {
        let (mut all, mut some) = (dataset(&[600, 400]), dataset(&[600]));
        let out = hold_out(&mut all, 0.2)
            .expect("enough rows")
            .expect("a share");
        let of_some = hold_out(&mut some, 0.2)
            .expect("enough rows")
            .expect("a share");
        assert!(
            (150..250).contains(&out.examples.len()),
            "{}",
            out.examples.len()
        );
        let firsts: Vec<u32> = ids(&out).into_iter().filter(|id| *id < 600).collect();
        assert_eq!(firsts, ids(&of_some));
        let mut both = [ids(&all), ids(&out)].concat();
        both.sort_unstable();
        assert_eq!(both, (0..1000).collect::<Vec<_>>());
        let in_first = ids(&all).iter().filter(|id| **id < 600).count();
        assert_eq!(all.file_ends, [in_first, all.examples.len()]);
        assert_eq!(all.report.rows + out.report.rows, 1000);
        assert!(hold_out(&mut dataset(&[1]), 0.5).is_err());
    }

    #[test]
    fn weights_repeat_and_choose_rows() {
        let mut config = TrainConfig::default();
        config.data.max_length = None;
        let (weighed, none) =
            training(&config, dataset(&[4, 100]), &[2.0, 0.25]).expect("nothing to refuse");
        assert!(none.is_none());
        assert_eq!(&ids(&weighed)[..8], [0, 1, 2, 3, 0, 1, 2, 3]);
        let rest = &ids(&weighed)[8..];
        assert_eq!(rest.len(), 25);
        assert!(rest.is_sorted() && rest.iter().all(|id| (4..104).contains(id)));
        assert_eq!(weighed.report.tokens, 2 * 33);
    }

    #[test]
    fn only_text_is_wrapped() {
        let mut config = TrainConfig::default();
        config.data.packing = true;
        config.data.packing_strategy = PackingStrategy::Wrapped;
        config.data.max_length = Some(3);
        let mut text = dataset(&[4]);
        text.kind = Some(RecordKind::Text);
        let (wrapped, _) = training(&config, text, &[]).expect("text is wrapped");
        let lengths = wrapped.lengths();
        assert_eq!((lengths, wrapped.report.longest), (vec![3, 3, 2], 3));
        let mut chat = dataset(&[4]);
        chat.kind = Some(RecordKind::Messages);
        let error = training(&config, chat, &[]).expect_err("rows must not see each other");
        assert!(error.to_string().contains("`messages`"), "{error}");
    }
}
