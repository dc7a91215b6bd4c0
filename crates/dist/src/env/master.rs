//! Where rank 0 is.

use super::reader::{Flag, Reader};
use super::{Code, EnvError, Scope, address};

/// Where the port of the store is, if nothing says so; torchrun's default too.
pub(super) const DEFAULT_PORT: u16 = 29500;
const LOOPBACK: &str = "127.0.0.1";

/// A place where the address of rank 0 may stand.
#[derive(Clone, Debug)]
pub(super) enum MasterIn<'a> {
    /// A variable with a host.
    Host(&'a str),
    /// A variable with a host and perhaps a port.
    Endpoint(&'a str),
    /// A host that a file or a list names.
    Named { source: String, host: String },
}

/// Where rank 0 listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Master {
    pub(super) addr: String,
    /// None: any free one.
    pub(super) port: Option<u16>,
    /// The launcher listens on that port itself.
    pub(super) reserved: bool,
}

impl Reader<'_> {
    /// The port of rank 0: a flag, else the first of `names` that is set, else `default`.
    fn port(&mut self, names: &[&str], default: Option<u16>) -> Result<Option<u16>, EnvError> {
        if let Some((name, text)) = self.flag(Flag::MasterPort) {
            self.said_by_flag(Flag::MasterPort, name, text);
            return self.parse_port(name, text).map(Some);
        }
        let set = names.iter().find_map(|n| Some((*n, self.variable(n)?)));
        if let Some((name, text)) = set {
            self.said_by_variable("master_port", name);
            return self.parse_port(name, text).map(Some);
        }
        match default {
            Some(port) => self.said("master_port", format!("default {port}")),
            None => self.said("master_port", "any free port"),
        }
        Ok(default)
    }

    pub(super) fn parse_port(&self, name: &str, text: &str) -> Result<u16, EnvError> {
        address::port(text).ok_or_else(|| {
            let fix = "correct the port where the job defines it";
            let value = Some(text.to_owned());
            self.error_of(Code::Port, name, value, "a TCP port, 1 to 65535", fix)
        })
    }

    fn bad_address(&self, name: &str, text: &str, problem: &str) -> EnvError {
        self.error_of(
            Code::MasterAddr,
            name,
            Some(text.to_owned()),
            format!("a host name or an address, IPv6 in brackets, but this {problem}"),
            "give the bare host name of rank 0's pod; a port has a variable of its own",
        )
    }

    /// Where rank 0 is, by a flag, else by the first of `places` that says so.
    pub(super) fn master(
        &mut self,
        places: &[MasterIn<'_>],
        ports: &[&str],
        default_port: u16,
    ) -> Result<Option<Master>, EnvError> {
        let Some((source, addr, port)) = self.master_host(places)? else {
            return Ok(None);
        };
        self.said("master_addr", source.clone());
        if let (Some((_, beside)), Some((name, text))) = (
            self.flag(Flag::MasterAddr).zip(port.as_ref()),
            self.flag(Flag::MasterPort),
        ) && beside != text
        {
            let expected = format!("the port {beside} that is beside the host, or no other");
            let fix = "give the port once";
            let value = Some(text.to_owned());
            return Err(self.error_of(Code::Conflict, name, value, expected, fix));
        }
        let port = match port {
            Some(text) if self.flag(Flag::MasterPort).is_none() => {
                self.said("master_port", source.clone());
                let name = source.split(['=', ' ']).next().unwrap_or(&source);
                Some(self.parse_port(name, &text)?)
            }
            _ => self.port(ports, Some(default_port))?,
        };
        Ok(Some(Master {
            addr,
            port,
            reserved: false,
        }))
    }

    /// Source, host and the port beside it.
    fn master_host(
        &self,
        places: &[MasterIn<'_>],
    ) -> Result<Option<(String, String, Option<String>)>, EnvError> {
        if let Some((name, text)) = self.flag(Flag::MasterAddr) {
            let (host, port) =
                address::endpoint(text).map_err(|e| self.bad_address(name, text, e))?;
            return Ok(Some((format!("{name} {text}"), host, port)));
        }
        for place in places {
            let (name, endpoint) = match place {
                MasterIn::Host(name) => (*name, false),
                MasterIn::Endpoint(name) => (*name, true),
                MasterIn::Named { source, host } => {
                    let host =
                        address::host(host).map_err(|e| self.bad_address(source, host, e))?;
                    return Ok(Some((source.clone(), host, None)));
                }
            };
            let Some(text) = self.variable(name) else {
                continue;
            };
            let parsed = if endpoint {
                address::endpoint(text)
            } else {
                address::host(text).map(|host| (host, None))
            };
            let (host, port) = parsed.map_err(|e| self.bad_address(name, text, e))?;
            return Ok(Some((format!("{name}={text}"), host, port)));
        }
        Ok(None)
    }

    /// As [`Reader::master`]; without an answer, this machine if it is the only one, else an error
    /// about `name`.
    pub(super) fn master_of(
        &mut self,
        places: &[MasterIn<'_>],
        ports: &[&str],
        default_port: u16,
        (single_node, scope): (bool, Scope),
        name: &str,
    ) -> Result<Master, EnvError> {
        if let Some(master) = self.master(places, ports, default_port)? {
            return Ok(master);
        }
        if !single_node {
            return Err(self.error(
                Code::MasterAddr,
                name,
                "the host name of the machine of rank 0, since there are several machines",
                "set it to an address that every machine can reach (mpirun: `-x MASTER_ADDR`), \
                 or pass --master-addr HOST",
            ));
        }
        // Ranks that were started one by one must know the port without talking to each other.
        let default = (scope == Scope::Process).then_some(default_port);
        self.loopback(ports, default)
    }

    /// Rank 0 on this machine, which is the only one.
    pub(super) fn loopback(
        &mut self,
        ports: &[&str],
        default: Option<u16>,
    ) -> Result<Master, EnvError> {
        self.said("master_addr", "a single machine");
        Ok(Master {
            addr: LOOPBACK.to_owned(),
            port: self.port(ports, default)?,
            reserved: false,
        })
    }
}
