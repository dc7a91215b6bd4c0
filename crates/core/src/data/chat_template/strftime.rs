//! Dates for `strftime_now`: the proleptic Gregorian calendar, in UTC.

use std::fmt::Write;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// Year, month from 1 and day from 1 of a number of days since 1970-01-01.
fn civil(days: i64) -> (i64, i64, i64) {
    // Years run from March to February, in cycles of 400 years = 146097 days.
    let shifted = days + 719_468;
    let cycle = shifted.div_euclid(146_097);
    let day = shifted.rem_euclid(146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (
        year + cycle * 400 + i64::from(month <= 2),
        month,
        day_of_month,
    )
}

fn days_before_year(year: i64) -> i64 {
    let y = year - 1;
    365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) - 719_162
}

/// Formats a moment (seconds since 1970-01-01 UTC) by a C format; an unknown directive is kept.
pub(super) fn strftime(format: &str, seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let month_name = MONTHS[(month - 1) as usize];
    let day_name = DAYS[(days + 4).rem_euclid(7) as usize];
    let hour = second / 3600;
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        let (plain, directive) = match directive {
            Some('-') => (true, chars.next()),
            other => (false, other),
        };
        let mut number = |value: i64, width: usize| {
            let width = if plain { 0 } else { width };
            let _ = write!(out, "{value:0width$}");
        };
        match directive {
            Some('Y') => number(year, 4),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(second / 60 % 60, 2),
            Some('S') => number(second % 60, 2),
            Some('j') => number(days - days_before_year(year) + 1, 3),
            Some('B') => out.push_str(month_name),
            Some('b' | 'h') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('e') => drop(write!(out, "{day:2}")),
            Some('F') => drop(write!(out, "{year:04}-{month:02}-{day:02}")),
            Some('T') => drop(write!(
                out,
                "{hour:02}:{:02}:{:02}",
                second / 60 % 60,
                second % 60
            )),
            Some('%') => out.push('%'),
            Some(other) => {
                out.push('%');
                out.push(other);
            }
            None => out.push('%'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_match_the_calendar() {
        let leap = 1_709_210_096; // 2024-02-29 12:34:56 UTC, a Thursday
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S", leap), "2024-02-29 12:34:56");
        assert_eq!(
            strftime("%d %b %Y, %A, %j", leap),
            "29 Feb 2024, Thursday, 060"
        );
        assert_eq!(
            strftime("%-m/%-d/%y %I %p 100%%", leap),
            "2/29/24 12 PM 100%"
        );
        assert_eq!(strftime("%F", 0), "1970-01-01");
        assert_eq!(strftime("%F %j", -86_400), "1969-12-31 365");
        assert_eq!(strftime("%F %B", 1_721_952_000), "2024-07-26 July");
    }
}
