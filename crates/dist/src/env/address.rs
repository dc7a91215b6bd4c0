//! Host names, addresses and ports, as launchers write them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A host name or an address, IPv6 in brackets: returned without them.
///
/// # Errors
/// What is wrong with it.
pub(super) fn host(text: &str) -> Result<String, &'static str> {
    if text.is_empty() {
        return Err("is empty");
    }
    if text.contains("://") {
        return Err("has a scheme");
    }
    if text.chars().any(char::is_whitespace) {
        return Err("has a blank");
    }
    if let Some(inner) = text.strip_prefix('[') {
        let inner = inner.strip_suffix(']').ok_or("has an open bracket")?;
        let address: Ipv6Addr = inner.parse().map_err(|_| "is no IPv6 address")?;
        return not_unspecified(address.into()).map(|()| inner.to_owned());
    }
    match text.matches(':').count() {
        0 => {}
        1 => return Err("has a port"),
        _ => return Err("is an IPv6 address without brackets"),
    }
    let like_ipv4 = text.chars().all(|c| c.is_ascii_digit() || c == '.');
    if like_ipv4 {
        let address: Ipv4Addr = text.parse().map_err(|_| "is no IPv4 address")?;
        return not_unspecified(address.into()).map(|()| text.to_owned());
    }
    let well_formed = text.len() <= 254
        && text
            .strip_suffix('.')
            .unwrap_or(text)
            .split('.')
            .all(|label| !label.is_empty() && label.chars().all(is_of_a_name));
    if well_formed {
        Ok(text.to_owned())
    } else {
        Err("is no host name")
    }
}

/// `host` or `host:port`.
///
/// # Errors
/// What is wrong with the host; a port comes back as text.
pub(super) fn endpoint(text: &str) -> Result<(String, Option<String>), &'static str> {
    if text.contains("://") {
        return Err("has a scheme");
    }
    let after_brackets = text.rfind(']').map_or(0, |end| end + 1);
    let colon = text[after_brackets..].rfind(':');
    let Some(colon) = colon.map(|at| after_brackets + at) else {
        return host(text).map(|host| (host, None));
    };
    let (name, port) = (&text[..colon], &text[colon + 1..]);
    if name.contains(':') && !name.starts_with('[') {
        return Err("is an IPv6 address without brackets");
    }
    Ok((host(name)?, Some(port.to_owned())))
}

/// Whether a host is this machine, whatever machine asks.
pub(super) fn is_loopback(host: &str) -> bool {
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    let by_name = [
        "localhost",
        "localhost.localdomain",
        "ip6-localhost",
        "ip6-loopback",
    ];
    by_name.contains(&name.as_str()) || name.parse::<IpAddr>().is_ok_and(|a| a.is_loopback())
}

/// A decimal number without signs, blanks or leading zeros.
pub(super) fn is_decimal(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_digit())
        && (text.len() == 1 || !text.starts_with('0'))
}

/// A TCP port that one can connect to.
pub(super) fn port(text: &str) -> Option<u16> {
    let port = is_decimal(text).then(|| text.parse().ok())?;
    port.filter(|port| *port > 0)
}

/// The part of a host name before its domain.
pub(super) fn short(host: &str) -> &str {
    if host.parse::<IpAddr>().is_ok() {
        return host;
    }
    host.split('.').next().unwrap_or(host)
}

fn not_unspecified(address: IpAddr) -> Result<(), &'static str> {
    if address.is_unspecified() {
        return Err("is the address to listen on, not one to connect to");
    }
    Ok(())
}

fn is_of_a_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_names_or_addresses_and_nothing_else() {
        for good in [
            "a",
            "a-0.b.svc.cluster.local",
            "10.0.0.1",
            "under_score",
            "dot.",
        ] {
            assert_eq!(host(good).as_deref(), Ok(good));
        }
        assert_eq!(host("[fd00::1]").as_deref(), Ok("fd00::1"));
        for bad in [
            "", "tcp://a", "a b", "a:1", "fd00::1", "[fd00::1", "[a]", "1.2.3", "0.0.0.0", "[::]",
            "a..b", "a/b", ".a",
        ] {
            assert!(host(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn endpoints_keep_their_port_as_text() {
        let some = |host: &str, port: &str| Ok((host.to_owned(), Some(port.to_owned())));
        assert_eq!(endpoint("a:1"), some("a", "1"));
        assert_eq!(endpoint("[fd00::1]:x"), some("fd00::1", "x"));
        assert_eq!(endpoint("a"), Ok(("a".to_owned(), None)));
        assert_eq!(endpoint("[fd00::1]"), Ok(("fd00::1".to_owned(), None)));
        assert!(endpoint("fd00::12:23456").is_err_and(|e| e.contains("IPv6")));
        assert!(endpoint("http://a:1").is_err_and(|e| e.contains("scheme")));
    }

    #[test]
    fn loopback_has_several_names() {
        for here in ["localhost", "LOCALHOST.", "127.0.0.9", "::1"] {
            assert!(is_loopback(here), "{here}");
        }
        assert!(!is_loopback("10.0.0.1") && !is_loopback("localhost.example"));
    }

    #[test]
    fn ports_are_1_to_65535() {
        assert_eq!(port("65535"), Some(65535));
        for bad in ["0", "65536", "", "080", "+1", "http", "-1", " 1"] {
            assert_eq!(port(bad), None, "{bad:?}");
        }
    }
}
