//! The day on which a rendering that prints its date was made.

const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

/// The latest date in a text, as `2026-11-23` or `23 Nov 2026`, in seconds since 1970-01-01 UTC.
pub(super) fn latest(text: &str) -> Option<i64> {
    let words: Vec<&str> = text
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
        .filter(|word| !word.is_empty())
        .collect();
    let number = |word: &str| word.parse::<i64>().ok();
    let iso = words.iter().filter_map(|word| {
        let parts: Vec<&str> = word.split('-').collect();
        match parts[..] {
            [year, month, day] if year.len() == 4 => {
                seconds(number(year)?, number(month)?, number(day)?)
            }
            _ => None,
        }
    });
    let spoken = words.windows(3).filter_map(|three| {
        let month = MONTHS.iter().position(|m| three[1].starts_with(m))?;
        let year = Some(three[2]).filter(|year| year.len() == 4)?;
        seconds(number(year)?, month as i64 + 1, number(three[0])?)
    });
    iso.chain(spoken).max()
}

/// Midnight of a day of the Gregorian calendar.
fn seconds(year: i64, month: i64, day: i64) -> Option<i64> {
    if !(1970..3000).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Years begin in March, so that a leap day is the last of its year.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    Some((days - 719_468) * 86_400)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_date_is_found() {
        assert_eq!(latest("Today Date: 23 Nov 2026\n"), Some(1_795_392_000));
        assert_eq!(latest("26 Jul 2024, 2026-11-23."), Some(1_795_392_000));
        assert_eq!(latest("1970-01-01"), Some(0));
        assert_eq!(latest("December 2023, 99 Nov 2026, 1-2-3"), None);
    }
}
