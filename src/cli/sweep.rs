//! `--sweep lora_r=8,16 learning_rate=1e-4,2e-4`: a run for every choice of values, all over one base.

use super::Failure;
use ferrotune::core::config::Axis;

const FLAG: &str = "--sweep";

/// Takes the axes of a sweep out of words that also hold configuration keys.
pub(super) fn take(words: &[String]) -> Result<(Vec<Axis>, Vec<String>), Failure> {
    let (mut axes, mut rest): (Vec<Axis>, _) = (Vec::new(), Vec::new());
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        let inline = word.strip_prefix(FLAG).and_then(|w| w.strip_prefix('='));
        if word != FLAG && inline.is_none() {
            rest.push(word.clone());
            continue;
        }
        let mut texts: Vec<&str> = inline.into_iter().collect();
        while let Some(text) = words.next_if(|w| !w.starts_with('-') && w.contains('=')) {
            texts.push(text);
        }
        if texts.is_empty() {
            let message = format!("{FLAG} needs a key with values, such as lora_r=8,16");
            return Err(Failure::Usage(message));
        }
        for text in texts {
            let axis = axis(text)?;
            if axes.iter().any(|other| other.key == axis.key) {
                let message = format!(
                    "{FLAG} has `{}` twice; give all its values at once",
                    axis.key
                );
                return Err(Failure::Usage(message));
            }
            axes.push(axis);
        }
    }
    Ok((axes, rest))
}

fn axis(text: &str) -> Result<Axis, Failure> {
    let (key, values) = text.split_once('=').unwrap_or((text, ""));
    let values = split(values);
    if key.is_empty() || values.is_empty() || values.iter().any(String::is_empty) {
        let message = format!("{FLAG} {text}: expected a key with values, such as lora_r=8,16");
        return Err(Failure::Usage(message));
    }
    let key = key.replace('-', "_");
    Ok(Axis { key, values })
}

/// Between commas, but for those inside brackets.
fn split(values: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut depth = 0_usize;
    for c in values.chars() {
        match c {
            '[' | '{' => depth += 1,
            ']' | '}' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(line: &str) -> Result<(Vec<Axis>, Vec<String>), Failure> {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        take(&words)
    }

    fn axis_of(key: &str, values: &[&str]) -> Axis {
        Axis {
            key: key.into(),
            values: values.iter().map(|&value| value.into()).collect(),
        }
    }

    #[test]
    fn axes_are_told_from_other_keys() {
        let line = "--seed 1 --sweep lora-r=8,16 learning_rate=1e-4 --packing --sweep=lora_target_modules=[a,b],c";
        let (axes, rest) = taken(line).expect("well formed");
        assert_eq!(
            axes,
            [
                axis_of("lora_r", &["8", "16"]),
                axis_of("learning_rate", &["1e-4"]),
                axis_of("lora_target_modules", &["[a,b]", "c"]),
            ]
        );
        assert_eq!(rest, ["--seed", "1", "--packing"]);
    }

    #[test]
    fn an_axis_without_values_or_named_twice_is_a_usage_error() {
        for line in [
            "--sweep",
            "--sweep lora_r",
            "--sweep lora_r=",
            "--sweep lora_r=1,,2",
            "--sweep =1",
            "--sweep seed=1 seed=2",
        ] {
            match taken(line) {
                Err(Failure::Usage(message)) => assert!(message.contains("--sweep"), "{message}"),
                other => panic!("{line}: {other:?}"),
            }
        }
    }
}
