//! File names that come from files, adapters or the network.

/// Longest name that every common file system takes, in bytes.
const MAX_BYTES: usize = 255;

/// Characters that separate, quote or glob on some system.
const FORBIDDEN: &str = "/\\:*?\"<>|";

/// Device names that Windows resolves in every directory, with or without an extension.
const DEVICES: [&str; 6] = ["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"];

/// Passes `name` if it is one plain path component on POSIX and Windows alike.
///
/// # Errors
/// What is wrong with it, in words: empty, `.` or `..`, a separator, a drive or stream colon, a
/// control or text-direction character, a reserved device name, a blank or dot at the end, a blank
/// at the start, or more than 255 bytes.
pub fn safe_file_name(name: &str) -> Result<&str, String> {
    match defect(name) {
        None => Ok(name),
        Some(defect) => {
            let shown: String = name.chars().take(80).collect();
            Err(format!(
                "file name {shown:?} {defect}; expected one plain name without any directory"
            ))
        }
    }
}

fn defect(name: &str) -> Option<String> {
    if name.is_empty() {
        return Some("is empty".into());
    }
    if name.len() > MAX_BYTES {
        return Some(format!("has {} bytes, more than {MAX_BYTES}", name.len()));
    }
    if name == "." || name == ".." {
        return Some("is a directory reference".into());
    }
    if let Some(c) = name.chars().find(|c| FORBIDDEN.contains(*c)) {
        return Some(format!("contains {c:?}"));
    }
    if let Some(c) = name.chars().find(|&c| is_invisible(c)) {
        return Some(format!("contains the control character {c:?}"));
    }
    if name.ends_with(['.', ' ']) || name.starts_with(' ') {
        return Some("starts with a blank or ends in a blank or dot".into());
    }
    is_device(name).then(|| "is a reserved device name on Windows".into())
}

/// Control characters, and those that reorder or hide text.
fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

fn is_device(name: &str) -> bool {
    let stem = name.split('.').next().unwrap_or(name).trim_end();
    let stem = stem.to_uppercase();
    if DEVICES.contains(&stem.as_str()) {
        return true;
    }
    let port = stem
        .strip_prefix("COM")
        .or_else(|| stem.strip_prefix("LPT"));
    port.is_some_and(|p| {
        let mut chars = p.chars();
        matches!(chars.next(), Some('0'..='9' | '¹' | '²' | '³')) && chars.next().is_none()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_names_pass() {
        for name in [
            "model-00001-of-00002.safetensors",
            "adapter_config.json",
            ".gitattributes",
            "Modell für Übung.json",
            "console.json",
            "com10.txt",
            "a..b",
            &"x".repeat(255),
        ] {
            assert_eq!(safe_file_name(name), Ok(name));
        }
    }

    #[test]
    fn names_that_leave_the_directory_or_the_file_system_are_refused() {
        let long = "x".repeat(256);
        let wide = "ü".repeat(128);
        let bad = [
            "",
            ".",
            "..",
            "/",
            "\\",
            "/etc/passwd",
            "../secret",
            "..\\secret",
            "a/b",
            "a\\b",
            "a/../b",
            "./a",
            "a/",
            "a\\",
            "C:",
            "C:\\a",
            "c:a",
            "\\\\server\\share",
            "//server/share",
            "\\\\?\\C:\\a",
            "file:stream",
            "a:b",
            "a\0b",
            "\0",
            "a\nb",
            "a\r",
            "\t",
            "\u{7f}",
            "\u{1b}[2J",
            "a*",
            "a?",
            "\"a\"",
            "<a",
            "a>",
            "a|b",
            "a.",
            "a ",
            " a",
            "...",
            "CON",
            "nul",
            "Aux.txt",
            "prn.tar.gz",
            "COM1",
            "lpt9.json",
            "COM¹",
            "CONIN$",
            "nul .txt",
            "\u{202e}gpj.exe",
            "a\u{200b}b",
            "\u{feff}a",
            &long,
            &wide,
        ];
        assert!(bad.len() >= 40);
        for name in bad {
            let message = safe_file_name(name).expect_err(name);
            assert!(message.contains("expected one plain name"), "{message}");
            assert!(message.len() < 400, "{message}");
        }
    }
}
