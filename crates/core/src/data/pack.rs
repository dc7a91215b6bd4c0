//! Packing: which documents share a row of at most `max_length` tokens.

use std::collections::{BTreeMap, VecDeque};

/// Best-fit decreasing over the whole data set: bins of indices into `lengths`, each bin at most
/// `max_length` tokens. Longer documents count as `max_length` (they are truncated before this);
/// empty ones are left out. Bins are in the order of their creation.
///
/// Among bins with the same room the one that has had it longest is taken, and among documents
/// of the same length the first: the result is a function of `lengths` alone.
///
/// # Source
/// TRL's packing strategy `bfd`, without its boundary every 1000 rows.
#[must_use]
pub fn pack_bfd(lengths: &[usize], max_length: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).filter(|&i| lengths[i] > 0).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lengths[i].min(max_length)));
    let mut bins: Vec<Vec<usize>> = Vec::new();
    let mut bins_by_room: BTreeMap<usize, VecDeque<usize>> = BTreeMap::new();
    for index in order {
        let length = lengths[index].min(max_length);
        let best = bins_by_room
            .range_mut(length..)
            .next()
            .map(|(&room, waiting)| (room, waiting.pop_front(), waiting.is_empty()));
        let (room, bin) = match best {
            Some((room, Some(bin), emptied)) => {
                if emptied {
                    bins_by_room.remove(&room);
                }
                (room, bin)
            }
            _ => {
                bins.push(Vec::new());
                (max_length, bins.len() - 1)
            }
        };
        bins[bin].push(index);
        if room > length {
            bins_by_room
                .entry(room - length)
                .or_default()
                .push_back(bin);
        }
    }
    bins
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::batch::Example;
    use crate::data::examples::Examples;
    use crate::data::fixtures::{read_json, report, repository};

    /// Documents whose ids count on from one document to the next.
    fn counted(lengths: &[usize]) -> Vec<Example> {
        let mut next = 0;
        lengths
            .iter()
            .map(|&length| {
                let ids: Vec<u32> = (next..).take(length).collect();
                next += length as u32;
                Example {
                    labels: ids.iter().map(|&id| id as i32).collect(),
                    input_ids: ids,
                }
            })
            .collect()
    }

    #[test]
    fn recorded_packings_are_reproduced() {
        let cases = read_json(&repository().join("packing/packing.json"));
        let mut matched = 0;
        for case in cases.as_array().into_iter().flatten() {
            let strategy = case["strategy"].as_str();
            let lengths: Vec<usize> =
                serde_json::from_value(case["lengths"].clone()).expect("lengths are numbers");
            let max_length = case["seq_length"].as_u64().expect("a number") as usize;
            let documents = match strategy {
                Some("bfd") => counted(&lengths),
                Some("bfd_split") => {
                    let split = Examples::from(counted(&lengths)).split_long(max_length);
                    split.and_then(|e| e.to_vec()).expect("memory is readable")
                }
                Some("wrapped") => {
                    let found = Examples::from(counted(&lengths)).wrap(max_length);
                    let found = found.and_then(|e| e.to_vec()).expect("memory is readable");
                    let found: Vec<_> = found.into_iter().map(|e| e.input_ids).collect();
                    assert_eq!(
                        serde_json::json!(found),
                        case["input_ids"],
                        "{}",
                        case["name"]
                    );
                    matched += 1;
                    continue;
                }
                _ => panic!("{} has no strategy", case["name"]),
            };
            let lengths: Vec<usize> = documents.iter().map(Example::len).collect();
            let packed: Vec<Vec<u32>> = pack_bfd(&lengths, max_length)
                .iter()
                .map(|bin| {
                    let kept = bin.iter().map(|&i| {
                        let ids = &documents[i].input_ids;
                        &ids[..ids.len().min(max_length)]
                    });
                    kept.flatten().copied().collect()
                })
                .collect();
            let expected: Vec<Vec<u32>> =
                serde_json::from_value(case["input_ids"].clone()).expect("ids are numbers");
            assert_eq!(packed, expected, "{} {strategy:?}", case["name"]);
            matched += 1;
        }
        report(&format!("{matched} packings match"));
        assert_eq!(matched, 21);
    }

    proptest::proptest! {
        #[test]
        fn every_document_is_in_one_bin_that_fits(
            lengths in proptest::collection::vec(0usize..40, 0..200),
        ) {
            let bins = pack_bfd(&lengths, 32);
            let mut seen: Vec<usize> = bins.iter().flatten().copied().collect();
            seen.sort_unstable();
            let expected: Vec<usize> = (0..lengths.len()).filter(|&i| lengths[i] > 0).collect();
            proptest::prop_assert_eq!(seen, expected);
            for bin in bins {
                proptest::prop_assert!(bin.iter().map(|&i| lengths[i].min(32)).sum::<usize>() <= 32);
            }
        }
    }
}
