//! The authority: one key that signs what every peer and every server shows.

use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use iommu_types::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use time::OffsetDateTime;

use crate::{PkiError, Serial};

/// How long an authority lives unless said otherwise: longer than anybody wants to hand out a new one everywhere.
pub const AUTHORITY_DAYS: u64 = 3650;
/// How long a credential lives unless said otherwise.
pub const CREDENTIAL_DAYS: u64 = 365;
/// Certificates are valid from a little before they are made: clocks of other machines are not this one's.
const CLOCK_SKEW: Duration = Duration::from_secs(300);
const VALIDITY_MAX: Duration = Duration::from_secs(36_500 * 86_400);
const SERIAL_BYTES: usize = 16;
/// Bytes of the random part of an authority's name.
const NAME_BYTES: usize = 4;

/// From when until when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Seconds since the UNIX epoch.
    pub not_before_unix_s: u64,
    /// Seconds since the UNIX epoch.
    pub not_after_unix_s: u64,
}

impl Validity {
    /// From now on for so long.
    pub fn of(duration: Duration) -> Result<Self, PkiError> {
        if duration < Duration::from_secs(1) || duration > VALIDITY_MAX {
            return Err(PkiError::UnfitValidity { seconds: duration.as_secs() });
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let not_before_unix_s = now.saturating_sub(CLOCK_SKEW).as_secs();
        Ok(Self { not_before_unix_s, not_after_unix_s: now.saturating_add(duration).as_secs() })
    }
    /// From now on for so many days.
    pub fn of_days(days: u64) -> Result<Self, PkiError> {
        Self::of(Duration::from_secs(days.saturating_mul(86_400)))
    }
    fn apply(self, params: &mut CertificateParams) -> Result<(), PkiError> {
        params.not_before = at(self.not_before_unix_s)?;
        params.not_after = at(self.not_after_unix_s)?;
        Ok(())
    }
}

/// The time, in seconds since the UNIX epoch.
pub(crate) fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

pub(crate) fn at(unix_s: u64) -> Result<OffsetDateTime, PkiError> {
    let time = i64::try_from(unix_s).ok().and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok());
    time.ok_or(PkiError::UnfitValidity { seconds: unix_s })
}

/// A certificate and its key.
#[derive(Clone)]
pub struct Credential {
    /// The certificate.
    pub certificate_pem: String,
    /// Its key. Secret.
    pub key_pem: String,
    /// Number of the certificate.
    pub serial: Serial,
    /// Last second of its validity.
    pub not_after_unix_s: u64,
}

impl Credential {
    /// Certificate and key, as they stand in one file.
    pub fn pem(&self) -> String {
        format!("{}{}", self.certificate_pem, self.key_pem)
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("serial", &self.serial)
            .field("not_after_unix_s", &self.not_after_unix_s)
            .finish_non_exhaustive()
    }
}

fn random<const BYTES: usize>() -> Result<[u8; BYTES], PkiError> {
    let mut bytes = [0; BYTES];
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(length) if length == BYTES => Ok(bytes),
        _ => Err(PkiError::Signing { why: "the system gave no random bytes".to_owned() }),
    }
}

/// A positive number of full length, so that it is the same with and without leading zeros.
fn fresh_serial() -> Result<Serial, PkiError> {
    let mut bytes: [u8; SERIAL_BYTES] = random()?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(Serial::from_bytes(&bytes))
}

fn named(name: impl Into<String>) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name.into());
    distinguished
}

/// What can sign.
pub struct Authority {
    pub(crate) issuer: Issuer<'static, KeyPair>,
    certificate_pem: String,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

impl Authority {
    /// A key for an authority, as PEM. Secret.
    pub(crate) fn fresh_key() -> Result<String, PkiError> {
        Ok(KeyPair::generate()?.serialize_pem())
    }
    /// A new authority with that key. Its name is its own, so that a certificate of another authority is recognised as that.
    pub(crate) fn create(key_pem: &str, validity: Validity) -> Result<Self, PkiError> {
        let key = KeyPair::from_pem(key_pem)?;
        let mut params = CertificateParams::default();
        validity.apply(&mut params)?;
        let mark: String = random::<NAME_BYTES>()?.iter().map(|byte| format!("{byte:02x}")).collect();
        params.distinguished_name = named(format!("iommu authority {mark}"));
        params.serial_number = Some(SerialNumber::from_slice(fresh_serial()?.bytes()));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate_pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), certificate_pem })
    }
    /// The authority of a certificate and its key.
    pub(crate) fn load(certificate_pem: String, key_pem: &str) -> Result<Self, PkiError> {
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, KeyPair::from_pem(key_pem)?)?;
        Ok(Self { issuer, certificate_pem })
    }
    /// Its certificate, by which others know it.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }
    /// A credential for a peer.
    pub fn issue(&self, identity: &Identity, validity: Validity) -> Result<Credential, PkiError> {
        let uri = identity.uri()?;
        let uri = uri.as_str().try_into().map_err(PkiError::from)?;
        let name = format!("{} {}", identity.role.word(), identity.name);
        self.sign(name, vec![SanType::URI(uri)], ExtendedKeyUsagePurpose::ClientAuth, validity)
    }
    /// A credential for a server that is reached under these names and addresses, besides those of the machine that it runs on.
    pub fn issue_server(&self, hosts: &[String], validity: Validity) -> Result<Credential, PkiError> {
        let local = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
        let mut names = Vec::new();
        for host in local.iter().chain(hosts) {
            let name = match host.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) if is_host(host) => SanType::DnsName(host.as_str().try_into()?),
                Err(_) => return Err(PkiError::UnfitHost { host: host.clone() }),
            };
            if !names.contains(&name) {
                names.push(name);
            }
        }
        self.sign("iommu-server".to_owned(), names, ExtendedKeyUsagePurpose::ServerAuth, validity)
    }
    fn sign(
        &self,
        name: String,
        alternative_names: Vec<SanType>,
        usage: ExtendedKeyUsagePurpose,
        validity: Validity,
    ) -> Result<Credential, PkiError> {
        let (key, serial) = (KeyPair::generate()?, fresh_serial()?);
        let mut params = CertificateParams::default();
        validity.apply(&mut params)?;
        params.distinguished_name = named(name);
        params.serial_number = Some(SerialNumber::from_slice(serial.bytes()));
        params.subject_alt_names = alternative_names;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        let certificate_pem = params.signed_by(&key, &self.issuer)?.pem();
        let key_pem = key.serialize_pem();
        Ok(Credential { certificate_pem, key_pem, serial, not_after_unix_s: validity.not_after_unix_s })
    }
}

/// Whether a certificate of a server can carry this as a host name.
pub fn is_host(host: &str) -> bool {
    (1..=253).contains(&host.len())
        && host.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}
