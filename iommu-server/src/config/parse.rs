//! How single settings are read from text. Each error names the flag and the remedy.

use std::net::SocketAddr;
use std::time::Duration;

use iommu_types::{DeviceAddress, Owner, PAGE_SIZE_BYTES, is_name};

use super::{ConfigError, DeviceSetting, DriverSetting, error};
use crate::bounds;
use crate::cli::LogFormat;

const MEMORY_BYTES_MIN: u64 = 16 << 20;
const MEMORY_BYTES_MAX: u64 = 1 << 42; // well inside the host address width of 46 bits

/// Bytes of a text such as `1GiB`, `512MiB`, `65536`.
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim().find(|c: char| !c.is_ascii_digit()).unwrap_or(text.trim().len());
    let (number, unit) = text.trim().split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" | "K" => 10,
        "MiB" | "M" => 20,
        "GiB" | "G" => 30,
        "TiB" | "T" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

const NAME_REMEDY: &str = "use 1 to 64 letters, digits, dots, dashes or underscores";

pub(super) fn device(
    flag: &str,
    address: &str,
    name: &str,
    owner: Option<&str>,
) -> Result<DeviceSetting, ConfigError> {
    let address: DeviceAddress = address.parse().map_err(|e: iommu_types::ParseAddressError| {
        error(flag, e.to_string(), "write ADDRESS=NAME@OWNER, as in 00:01.0=engine0@driver:0")
    })?;
    if address.segment != 0 {
        return Err(error(
            flag,
            format!("{address} is not on the host"),
            "use segment 0; bare machines declare their own devices",
        ));
    }
    if !is_name(name) {
        return Err(error(flag, format!("{name:?} is not a name"), NAME_REMEDY));
    }
    let owner = owner.map(str::parse).transpose().map_err(|e: iommu_types::ParseOwnerError| {
        error(flag, e.to_string(), "write ADDRESS=NAME@driver:NUMBER")
    })?;
    Ok(DeviceSetting { address, name: name.to_owned(), owner })
}

pub(super) fn driver(flag: &str, owner: &str, name: &str) -> Result<DriverSetting, ConfigError> {
    let owner: Owner = owner.parse().map_err(|e: iommu_types::ParseOwnerError| {
        error(flag, e.to_string(), "write driver:NUMBER=NAME, as in driver:0=driver0")
    })?;
    if !matches!(owner, Owner::Driver(_)) {
        return Err(error(flag, format!("{owner} is not a driver"), "write driver:NUMBER=NAME"));
    }
    if !is_name(name) {
        return Err(error(flag, format!("{name:?} is not a name"), NAME_REMEDY));
    }
    Ok(DriverSetting { owner, name: name.to_owned() })
}

pub(super) fn device_flag(text: &str) -> Result<DeviceSetting, ConfigError> {
    let Some((address, rest)) = text.split_once('=') else {
        return Err(error(
            "--device",
            format!("{text:?} has no name"),
            "write ADDRESS=NAME or ADDRESS=NAME@OWNER",
        ));
    };
    let (name, owner) = match rest.split_once('@') {
        Some((name, owner)) => (name, Some(owner)),
        None => (rest, None),
    };
    device("--device", address, name, owner)
}

pub(super) fn driver_flag(text: &str) -> Result<DriverSetting, ConfigError> {
    let Some((owner, name)) = text.split_once('=') else {
        return Err(error("--driver", format!("{text:?} has no name"), "write driver:NUMBER=NAME"));
    };
    driver("--driver", owner, name)
}

pub(super) fn duration(flag: &str, text: &str) -> Result<Duration, ConfigError> {
    humantime::parse_duration(text)
        .map_err(|e| error(flag, format!("{text:?}: {e}"), "write a number and a unit, such as 5s or 500ms"))
}

pub(super) fn at_least_a_tick(flag: &str, text: &str) -> Result<Duration, ConfigError> {
    let time = duration(flag, text)?;
    if time < bounds::WATCHDOG_TICK {
        return Err(error(flag, format!("{text} is shorter than the server looks"), "give at least 100ms"));
    }
    Ok(time)
}

pub(super) fn memory(text: &str) -> Result<u64, ConfigError> {
    let remedy = "write a size such as 1GiB, a multiple of 4096 from 16MiB to 4TiB";
    let bytes =
        parse_size(text).ok_or_else(|| error("--memory", format!("{text:?} is not a size"), remedy))?;
    if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&bytes) || bytes % PAGE_SIZE_BYTES != 0 {
        return Err(error("--memory", format!("{bytes} bytes is out of bounds"), remedy));
    }
    Ok(bytes)
}

pub(super) fn admin(text: &str) -> Result<Option<SocketAddr>, ConfigError> {
    if text == "off" {
        return Ok(None);
    }
    let address: SocketAddr = text
        .parse()
        .map_err(|_| error("--admin", format!("{text:?} is not an address"), "write HOST:PORT, or off"))?;
    if !address.ip().is_loopback() {
        return Err(error(
            "--admin",
            format!("{address} is not a loopback address, and the admin port has no authentication"),
            "use 127.0.0.1 or [::1]",
        ));
    }
    Ok(Some(address))
}

pub(super) fn log_format(text: &str) -> Result<LogFormat, ConfigError> {
    clap::ValueEnum::from_str(text, true)
        .map_err(|_| error("--log-format", format!("{text:?} is no format"), "write human or json"))
}
