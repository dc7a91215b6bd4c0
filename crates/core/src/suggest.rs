//! "Did you mean": the nearest of a list of names.

/// The candidate most like `name`, if one is like it at all.
#[must_use]
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|c| {
            let likeness = strsim::normalized_damerau_levenshtein(name, c)
                .max(strsim::jaro_winkler(name, c) - 0.15);
            // A name that was written out or cut short: `lora_rank` for `lora_r`.
            let begins = name.starts_with(c) || c.starts_with(name);
            (likeness + if begins { 0.1 } else { 0.0 }, c)
        })
        .filter(|(score, _)| *score > 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
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
        assert_eq!(did_you_mean("lora_rr", keys), "; did you mean `lora_r`?");
    }
}
