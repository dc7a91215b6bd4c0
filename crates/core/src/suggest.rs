//! "Did you mean": the nearest of a list of names.

/// The candidate most like `name`, if one is like it at all.
#[must_use]
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // A name that was written out or cut short: `lora_rank` for `lora_r`.
    let begins = |c: &str| name.starts_with(c) || c.starts_with(name);
    // Any long name has the letter or two of a short one somewhere.
    let by_chance = |c: &str| c.len() <= 2 && strsim::damerau_levenshtein(name, c) > 1;
    candidates
        .into_iter()
        .filter(|c| begins(c) || !by_chance(c))
        .map(|c| {
            let likeness = strsim::normalized_damerau_levenshtein(name, c)
                .max(strsim::jaro_winkler(name, c) - 0.15);
            let begins = begins(c);
            (likeness + if begins { 0.1 } else { 0.0 }, c)
        })
        .filter(|(score, _)| *score > 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, c)| c)
}

/// The candidate that `name` is with a letter or two mistyped: left out, too many, exchanged.
#[must_use]
pub fn misspelt<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let most = if name.chars().count() < 6 { 1 } else { 2 };
    candidates
        .into_iter()
        .map(|c| (strsim::damerau_levenshtein(name, c), c))
        .filter(|(distance, _)| (1..=most).contains(distance))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, c)| c)
}

/// `; did you mean "x"?`, or nothing.
#[must_use]
pub fn did_you_mean<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(name, candidates)
        .map(|c| format!("; did you mean `{c}`?"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_typos_and_stays_silent_otherwise() {
        let keys = ["learning_rate", "lora_r", "max_length"];
        assert_eq!(nearest("learnig_rate", keys), Some("learning_rate"));
        assert_eq!(nearest("max_lenght", keys), Some("max_length"));
        assert_eq!(
            nearest("lora_rank", ["local_rank", "lora_r"]),
            Some("lora_r")
        );
        assert_eq!(nearest("zzz", keys), None);
        assert_eq!(nearest("ensure_weight_tying", ["r", "p"]), None);
        assert_eq!(nearest("rank", ["r", "p"]), Some("r"));
        assert_eq!(did_you_mean("lora_rr", keys), "; did you mean `lora_r`?");
    }

    #[test]
    fn a_letter_or_two_are_a_misspelling_and_another_word_is_none() {
        let keys = ["attention_factor", "beta_fast", "r"];
        for (name, meant) in [
            ("beta_fats", Some("beta_fast")),
            ("betafast", Some("beta_fast")),
            ("atention_facto", Some("attention_factor")),
            ("attn_factor", None),
            ("beta_fast", None),
            ("rr", Some("r")),
            ("rank", None),
        ] {
            assert_eq!(misspelt(name, keys), meant, "{name}");
        }
    }
}
