//! The list of what is revoked, signed by the authority.

use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};
use time::OffsetDateTime;
use x509_parser::pem::{Pem, parse_x509_pem};
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

use crate::authority::{Authority, at};
use crate::peer;
use crate::{PkiError, Serial, UnfitCertificate};

/// When the list says that a new one comes. Servers take a list until there is another, however old: one that nobody renews must not lock
/// everybody out.
const NEXT_UPDATE_DAYS: i64 = 3650;

/// One revoked certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revoked {
    /// Its number.
    pub serial: Serial,
    /// When it was revoked, in seconds since the UNIX epoch.
    pub at_unix_s: u64,
}

/// The list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revocations {
    /// Number of the list; each one has a larger one than the one before.
    pub number: u64,
    /// What is revoked.
    pub revoked: Vec<Revoked>,
}

fn malformed(why: impl ToString) -> UnfitCertificate {
    UnfitCertificate::Malformed { why: why.to_string() }
}

fn parse(pem: &Pem) -> Result<CertificateRevocationList<'_>, UnfitCertificate> {
    CertificateRevocationList::from_der(&pem.contents).map(|(_, list)| list).map_err(malformed)
}

impl Revocations {
    /// Reads a list. Whether it is genuine is for those to check who act on it.
    pub fn read(pem: &str) -> Result<Self, UnfitCertificate> {
        let (_, pem) = parse_x509_pem(pem.as_bytes()).map_err(malformed)?;
        Ok(Self::of(&parse(&pem)?))
    }
    /// Reads the lists of all authorities, as a server takes them: each must be signed by one of them, and none may be without.
    pub fn read_genuine(lists_pem: &str, authorities_pem: &str) -> Result<Self, UnfitCertificate> {
        let blocks = |text: &str| Pem::iter_from_buffer(text.as_bytes()).collect::<Result<Vec<_>, _>>();
        let (lists, authorities) =
            (blocks(lists_pem).map_err(malformed)?, blocks(authorities_pem).map_err(malformed)?);
        let lists = lists.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        let authorities: Vec<X509Certificate<'_>> =
            authorities.iter().map(|pem| peer::parse(&pem.contents)).collect::<Result<_, _>>()?;
        let signed = |list: &CertificateRevocationList<'_>, by: &X509Certificate<'_>| {
            list.issuer() == by.subject() && list.verify_signature(by.public_key()).is_ok()
        };
        if !lists.iter().all(|list| authorities.iter().any(|authority| signed(list, authority))) {
            return Err(malformed("it is signed by another authority"));
        }
        if authorities.is_empty() || !authorities.iter().all(|by| lists.iter().any(|list| signed(list, by))) {
            return Err(malformed("an authority has no list"));
        }
        let all = lists.iter().map(Self::of);
        Ok(all.fold(Self::default(), |mut all, list| {
            all.number = all.number.max(list.number);
            all.revoked.extend(list.revoked);
            all
        }))
    }
    fn of(list: &CertificateRevocationList<'_>) -> Self {
        let number = list.crl_number().and_then(|number| u64::try_from(number.clone()).ok()).unwrap_or(0);
        let revoked = list.iter_revoked_certificates().map(|entry| Revoked {
            serial: Serial::from_bytes(entry.raw_serial()),
            at_unix_s: u64::try_from(entry.revocation_date.timestamp()).unwrap_or(0),
        });
        Self { number, revoked: revoked.collect() }
    }
    /// Whether a certificate is on it.
    pub fn contains(&self, serial: &Serial) -> bool {
        self.revoked.iter().any(|revoked| revoked.serial == *serial)
    }
    /// The list as PEM, signed, with the next number.
    pub fn sign(&self, authority: &Authority) -> Result<String, PkiError> {
        let now = OffsetDateTime::now_utc();
        let entry = |revoked: &Revoked| {
            Ok::<_, PkiError>(RevokedCertParams {
                serial_number: SerialNumber::from_slice(revoked.serial.bytes()),
                revocation_time: at(revoked.at_unix_s)?,
                reason_code: None,
                invalidity_date: None,
            })
        };
        let list = CertificateRevocationListParams {
            this_update: now,
            next_update: now + time::Duration::days(NEXT_UPDATE_DAYS),
            crl_number: SerialNumber::from(self.number.saturating_add(1)),
            issuing_distribution_point: None,
            revoked_certs: self.revoked.iter().map(entry).collect::<Result<_, _>>()?,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(list.signed_by(&authority.issuer)?.pem()?)
    }
}
