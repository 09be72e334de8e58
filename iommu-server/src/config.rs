//! Configuration: flags, their environment twins, a TOML file and the built-in defaults, in this order, parsed into a
//! [`Config`] that makes sense before a port is bound. What does not is a [`ConfigError`] that names the flag and the remedy.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use iommu_proto::credentials::default_directory;
use iommu_types::{DeviceAddress, Owner};
use serde::Deserialize;

use self::parse::{
    admin, at_least_a_tick, device, device_flag, driver, driver_flag, duration, log_format, memory,
};

use crate::bounds;
use crate::cli::{LogFormat, ServeArgs};

mod parse;

pub use self::parse::parse_size;
pub use iommu_types::is_name;

/// What the server starts with when neither flags nor a file say otherwise.
pub const DEFAULT_TOML: &str = include_str!("default.toml");

/// A setting that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{flag}: {why}\n  remedy: {remedy}")]
pub struct ConfigError {
    /// The flag (or file) at fault.
    pub flag: String,
    /// What is wrong.
    pub why: String,
    /// What to do.
    pub remedy: String,
}

fn error(flag: &str, why: impl Into<String>, remedy: impl Into<String>) -> ConfigError {
    ConfigError { flag: flag.to_owned(), why: why.into(), remedy: remedy.into() }
}

/// A declared device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSetting {
    /// Where.
    pub address: DeviceAddress,
    /// Name with which its agent says Hello.
    pub name: String,
    /// Whose, if anybody's.
    pub owner: Option<Owner>,
}

/// A declared driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverSetting {
    /// Its owner.
    pub owner: Owner,
    /// Name with which it opens its session.
    pub name: String,
}

/// Names that may take a role; `*` admits any name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names(pub Vec<String>);

impl Names {
    /// Whether the name is one of them.
    pub fn admit(&self, name: &str) -> bool {
        self.0.iter().any(|known| known == "*" || known == name)
    }
}

/// Settings that make sense together.
#[derive(Clone, Debug)]
pub struct Config {
    /// TCP addresses to listen on.
    pub listen: Vec<SocketAddr>,
    /// UNIX sockets to listen on.
    pub listen_unix: Vec<PathBuf>,
    /// Where certificates lie; none for a server without TLS.
    pub pki: Option<PathBuf>,
    /// Users whose processes may connect over UNIX sockets, besides the server's own and root.
    pub unix_uids: Vec<u32>,
    /// Where /metrics is.
    pub admin: Option<SocketAddr>,
    /// Physical memory.
    pub memory_bytes: u64,
    /// File behind it.
    pub memory_file: Option<PathBuf>,
    /// Devices.
    pub devices: Vec<DeviceSetting>,
    /// Drivers.
    pub drivers: Vec<DriverSetting>,
    /// Who may create bare machines.
    pub bare: Names,
    /// Who may create virtual machines.
    pub hypervisors: Names,
    /// Who may look.
    pub observers: Names,
    /// Who may look and steer.
    pub operators: Names,
    /// How long a driver's things outlive its connection.
    pub grace: Duration,
    /// How long a drain may take.
    pub drain_deadline: Duration,
    /// How often a peer is pinged, and how long it may take to answer.
    pub keepalive: Duration,
    /// How long a peer may leave its stream unread.
    pub stream_stalled: Duration,
    /// How log lines look.
    pub log_format: LogFormat,
    /// What is logged.
    pub log: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    listen: Option<Vec<SocketAddr>>,
    listen_unix: Option<Vec<PathBuf>>,
    pki: Option<PathBuf>,
    unix_uids: Option<Vec<u32>>,
    admin: Option<String>,
    memory: Option<String>,
    memory_file: Option<PathBuf>,
    grace: Option<String>,
    drain_deadline: Option<String>,
    keepalive: Option<String>,
    stream_stalled: Option<String>,
    log_format: Option<String>,
    log: Option<String>,
    device: Option<Vec<FileDevice>>,
    driver: Option<Vec<FileDriver>>,
    bare: Option<Vec<String>>,
    hypervisors: Option<Vec<String>>,
    observers: Option<Vec<String>>,
    operators: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileDevice {
    address: String,
    name: String,
    owner: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileDriver {
    owner: String,
    name: String,
}

fn parse_file(flag: &str, text: &str) -> Result<File, ConfigError> {
    toml::from_str(text).map_err(|reason| {
        error(flag, reason.to_string(), "correct the file; the settings are those of the flags, see --help")
    })
}

/// Plaintext is for this machine only.
fn check_listeners(plaintext: bool, listen: &[SocketAddr], unix: &[PathBuf]) -> Result<(), ConfigError> {
    if plaintext && let Some(address) = listen.iter().find(|address| !address.ip().is_loopback()) {
        return Err(error(
            "--listen",
            format!("{address} is not a loopback address, and plaintext peers name themselves"),
            "leave --insecure-plaintext away, or listen on 127.0.0.1 or [::1], or use --listen-unix",
        ));
    }
    if listen.is_empty() && unix.is_empty() {
        return Err(error("--listen", "there is nothing to listen on", "give --listen or --listen-unix"));
    }
    Ok(())
}

/// Where certificates lie, for a server that needs them.
fn pki(
    plaintext: bool,
    listen: &[SocketAddr],
    given: Option<PathBuf>,
) -> Result<Option<PathBuf>, ConfigError> {
    if plaintext || listen.is_empty() {
        return Ok(None);
    }
    match given.map_or_else(default_directory, Ok) {
        Ok(path) => Ok(Some(path)),
        Err(why) => {
            let remedy = "give --pki DIR, or listen on UNIX sockets alone (--listen-unix)";
            Err(error("--pki", why.to_string(), remedy))
        }
    }
}

fn check_declarations(devices: &[DeviceSetting], drivers: &[DriverSetting]) -> Result<(), ConfigError> {
    for (index, driver) in drivers.iter().enumerate() {
        let before = &drivers[..index];
        if before.iter().any(|other| other.owner == driver.owner || other.name == driver.name) {
            let why = format!("{} or its name {:?} is declared twice", driver.owner, driver.name);
            return Err(error("--driver", why, "give each driver its own number and name"));
        }
    }
    for (index, device) in devices.iter().enumerate() {
        let before = &devices[..index];
        if before.iter().any(|other| other.address == device.address) {
            return Err(error(
                "--device",
                format!("{} is declared twice", device.address),
                "declare it once",
            ));
        }
        if let Some(owner) = device.owner
            && !drivers.iter().any(|driver| driver.owner == owner)
        {
            let why = format!("{} is given to {owner}, which is not declared", device.address);
            return Err(error("--device", why, format!("declare it: --driver {owner}=NAME")));
        }
    }
    if devices.len() > bounds::DEVICES_MAX as usize || drivers.len() > bounds::OWNERS_MAX as usize {
        return Err(error("--device", "too many devices or drivers", "declare fewer"));
    }
    Ok(())
}

impl Config {
    /// The settings of a command line, with the file it names and the built-in defaults behind it.
    pub fn from_args(args: ServeArgs) -> Result<Self, ConfigError> {
        let defaults = parse_file("the built-in configuration", DEFAULT_TOML)?;
        let file = match &args.config {
            None => File::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|e| {
                    error("--config", format!("{}: {e}", path.display()), "name a file that can be read")
                })?;
                parse_file("--config", &text)?
            }
        };
        Self::layered(args, file, defaults)
    }

    fn layered(args: ServeArgs, file: File, defaults: File) -> Result<Self, ConfigError> {
        let listen_unix =
            if args.listen_unix.is_empty() { file.listen_unix.unwrap_or_default() } else { args.listen_unix };
        let mut listen = if args.listen.is_empty() { file.listen.unwrap_or_default() } else { args.listen };
        if listen.is_empty() && listen_unix.is_empty() {
            listen = defaults.listen.clone().unwrap_or_default();
        }
        check_listeners(args.insecure_plaintext, &listen, &listen_unix)?;
        let pki = pki(args.insecure_plaintext, &listen, args.pki.or(file.pki))?;
        let pick = |flag: Option<String>, file: Option<String>, default: Option<String>| {
            flag.or(file).or(default).unwrap_or_default()
        };
        let (devices, drivers) =
            declarations(&args.device, &args.driver, file.device, file.driver, &defaults)?;
        check_declarations(&devices, &drivers)?;
        Ok(Self {
            listen,
            listen_unix,
            pki,
            unix_uids: if args.unix_uid.is_empty() {
                file.unix_uids.unwrap_or_default()
            } else {
                args.unix_uid
            },
            admin: admin(&pick(args.admin, file.admin, defaults.admin))?,
            memory_bytes: memory(&pick(args.memory, file.memory, defaults.memory))?,
            memory_file: args.memory_file.or(file.memory_file),
            devices,
            drivers,
            bare: Names(file.bare.or(defaults.bare).unwrap_or_default()),
            hypervisors: Names(file.hypervisors.or(defaults.hypervisors).unwrap_or_default()),
            observers: Names(file.observers.or(defaults.observers).unwrap_or_default()),
            operators: Names(file.operators.or(defaults.operators).unwrap_or_default()),
            grace: duration("--grace", &pick(args.grace, file.grace, defaults.grace))?,
            drain_deadline: duration(
                "--drain-deadline",
                &pick(args.drain_deadline, file.drain_deadline, defaults.drain_deadline),
            )?,
            keepalive: at_least_a_tick(
                "--keepalive",
                &pick(args.keepalive, file.keepalive, defaults.keepalive),
            )?,
            stream_stalled: at_least_a_tick(
                "--stream-stalled",
                &pick(args.stream_stalled, file.stream_stalled, defaults.stream_stalled),
            )?,
            log_format: match args.log_format {
                Some(format) => format,
                None => log_format(&pick(None, file.log_format, defaults.log_format))?,
            },
            log: pick(args.log, file.log, defaults.log),
        })
    }
}

/// Devices and drivers: from the flags if there are any, else from the file, else the built-in ones. Taken together, because
/// devices name drivers.
fn declarations(
    device_flags: &[String],
    driver_flags: &[String],
    file_devices: Option<Vec<FileDevice>>,
    file_drivers: Option<Vec<FileDriver>>,
    defaults: &File,
) -> Result<(Vec<DeviceSetting>, Vec<DriverSetting>), ConfigError> {
    let from_file = |flag: &str, devices: &[FileDevice], drivers: &[FileDriver]| {
        let devices: Result<Vec<_>, _> =
            devices.iter().map(|d| device(flag, &d.address, &d.name, d.owner.as_deref())).collect();
        let drivers: Result<Vec<_>, _> = drivers.iter().map(|d| driver(flag, &d.owner, &d.name)).collect();
        Ok::<_, ConfigError>((devices?, drivers?))
    };
    let in_file = file_devices.is_some() || file_drivers.is_some();
    let (mut devices, mut drivers) = if in_file {
        from_file("--config", &file_devices.unwrap_or_default(), &file_drivers.unwrap_or_default())?
    } else {
        from_file(
            "the built-in configuration",
            defaults.device.as_deref().unwrap_or_default(),
            defaults.driver.as_deref().unwrap_or_default(),
        )?
    };
    if !device_flags.is_empty() {
        devices = device_flags.iter().map(|text| device_flag(text)).collect::<Result<_, _>>()?;
    }
    if !driver_flags.is_empty() {
        drivers = driver_flags.iter().map(|text| driver_flag(text)).collect::<Result<_, _>>()?;
    }
    if device_flags.is_empty() && !driver_flags.is_empty() && !in_file {
        // The built-in devices belong to the built-in drivers; other drivers come with devices of their own.
        devices.retain(|device| device.owner.is_none_or(|owner| drivers.iter().any(|d| d.owner == owner)));
    }
    Ok((devices, drivers))
}

#[cfg(test)]
mod tests;
