//! The directory in which everything lies.
//!
//! | File | What | Mode |
//! |---|---|---|
//! | `ca.crt` | the authority, by which all know each other | 644 |
//! | `ca.key` | its key; needed to issue and to revoke, not to serve | 600 |
//! | `ca.crl` | what is revoked | 644 |
//! | `server.pem` | certificate and key of the server | 600 |
//! | `operator-iommuctl.pem` and the like | certificate and key of one peer | 600 |
//! | `issued` | what was issued, a line each | 600 |

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use iommu_types::Identity;
use x509_parser::pem::parse_x509_pem;

use crate::authority::{Authority, Credential, Validity, now_unix_s};
use crate::files::{self, Secrecy};
use crate::index::{DECLARED_MAX, ISSUED_MAX, IssuedRecord, REVOKED_MAX};
use crate::peer::{self, Usage};
use crate::{PkiError, Revocations, Revoked, Serial};

/// Certificate of the authority.
pub const AUTHORITY: &str = iommu_types::AUTHORITY_FILE;
/// Key of the authority.
pub const AUTHORITY_KEY: &str = "ca.key";
/// What is revoked.
pub const REVOCATIONS: &str = "ca.crl";
/// Certificate and key of the server.
pub const SERVER: &str = "server.pem";
const ISSUED: &str = "issued";
const LOCK: &str = ".lock";
/// Subject of a server in the index.
const SERVER_SUBJECT: &str = "server";

/// Whether a file may take the place of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// What is there stays.
    Never,
    /// What is there is replaced.
    Replace,
}

/// What was issued, and where it lies.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The file.
    pub path: PathBuf,
    /// Number of the certificate.
    pub serial: Serial,
    /// Last second of its validity.
    pub not_after_unix_s: u64,
}

/// A certificate in a file.
#[derive(Clone, Debug)]
pub struct Shown {
    /// What it is for.
    pub usage: Usage,
    /// Its number.
    pub serial: Serial,
    /// First second of its validity.
    pub not_before_unix_s: u64,
    /// Last second of its validity.
    pub not_after_unix_s: u64,
}

/// The directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    path: PathBuf,
}

/// Those of the records that nobody takes any more.
fn expired(records: &[IssuedRecord], now_unix_s: u64) -> HashSet<&Serial> {
    records.iter().filter(|record| !record.counts(now_unix_s)).map(|record| &record.serial).collect()
}

impl Directory {
    /// At a path, which need not be there yet.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
    /// Whether it has an authority.
    pub fn has_authority(&self) -> bool {
        self.file(AUTHORITY).exists()
    }
    /// Whether it has the key of the authority.
    pub fn has_authority_key(&self) -> bool {
        self.file(AUTHORITY_KEY).exists()
    }
    /// Whether the peer has a credential in it.
    pub fn has(&self, identity: &Identity) -> Result<bool, PkiError> {
        Ok(self.file(&identity.credential_file()?).exists())
    }

    /// Makes an authority, unless there is one. `true` when this call made it. A crash in between leaves a key without a certificate, and the
    /// next call goes on with that key.
    pub fn init(&self, validity: Validity) -> Result<bool, PkiError> {
        files::private_directory(&self.path)?;
        let _lock = files::lock(&self.file(LOCK))?;
        if self.has_authority() {
            return Ok(false);
        }
        let key_file = self.file(AUTHORITY_KEY);
        if !self.has_authority_key() {
            files::write_new(&key_file, Authority::fresh_key()?.as_bytes(), Secrecy::Secret)?;
        }
        let authority = Authority::create(&files::read(&key_file)?, validity)?;
        // A list of an authority that never came to be says nothing about this one.
        let list = Revocations::default().sign(&authority)?;
        files::replace(&self.file(REVOCATIONS), list.as_bytes(), Secrecy::Public)?;
        // The certificate last: who sees it sees everything.
        files::write_new(&self.file(AUTHORITY), authority.certificate_pem().as_bytes(), Secrecy::Public)?;
        Ok(true)
    }

    /// The authority, to issue and to revoke.
    pub fn authority(&self) -> Result<Authority, PkiError> {
        if !self.has_authority() {
            return Err(PkiError::NoAuthority { path: self.path.clone() });
        }
        if !self.has_authority_key() {
            return Err(PkiError::NoAuthorityKey { path: self.path.clone() });
        }
        let (certificate, key) = (self.file(AUTHORITY), self.file(AUTHORITY_KEY));
        let certificate_pem = files::read(&certificate)?;
        Authority::load(certificate_pem, &files::read(&key)?)
            .map_err(|error| PkiError::unreadable(&key, "the key of an authority", error))
    }

    /// Issues a credential for a peer, into its file or another.
    pub fn issue(
        &self,
        identity: &Identity,
        validity: Validity,
        into: Option<&Path>,
        overwrite: Overwrite,
    ) -> Result<Issued, PkiError> {
        let (uri, file) = (identity.uri()?, identity.credential_file()?);
        let path = into.map_or_else(|| self.file(&file), Path::to_owned);
        self.put(path, uri, overwrite, ISSUED_MAX, |authority| authority.issue(identity, validity))
    }

    /// The same for a peer that was declared while a server runs. However many of those come and go, others can be issued and revoked all the same: they take
    /// [`DECLARED_MAX`] of the records.
    pub fn issue_declared(
        &self,
        identity: &Identity,
        validity: Validity,
        overwrite: Overwrite,
    ) -> Result<Issued, PkiError> {
        let (uri, path) = (identity.uri()?, self.file(&identity.credential_file()?));
        self.put(path, uri, overwrite, DECLARED_MAX, |authority| authority.issue(identity, validity))
    }

    /// Issues a credential for a server that is reached under these names, into its file or another.
    pub fn issue_server(
        &self,
        hosts: &[String],
        validity: Validity,
        into: Option<&Path>,
        overwrite: Overwrite,
    ) -> Result<Issued, PkiError> {
        let path = into.map_or_else(|| self.file(SERVER), Path::to_owned);
        self.put(path, SERVER_SUBJECT.to_owned(), overwrite, ISSUED_MAX, |authority| {
            authority.issue_server(hosts, validity)
        })
    }

    fn put(
        &self,
        path: PathBuf,
        subject: String,
        overwrite: Overwrite,
        records_max: usize,
        issue: impl FnOnce(&Authority) -> Result<Credential, PkiError>,
    ) -> Result<Issued, PkiError> {
        let authority = self.authority()?;
        let _lock = files::lock(&self.file(LOCK))?;
        if overwrite == Overwrite::Never && path.exists() {
            return Err(PkiError::Exists { path });
        }
        let credential = issue(&authority)?;
        let (serial, not_after_unix_s) = (credential.serial.clone(), credential.not_after_unix_s);
        // First the line, then the file: a certificate that nobody could revoke must not come to be.
        let (records, now) = (self.issued()?, now_unix_s());
        let count = records.iter().filter(|record| record.counts(now)).count();
        self.bounded(count + 1, records_max, "issued")?;
        if let Some(compacted) = IssuedRecord::compacted(&records, now) {
            // The list first: what the index has forgotten would stay on it for ever.
            self.forget_expired(&authority, &expired(&records, now))?;
            files::replace(&self.file(ISSUED), compacted.as_bytes(), Secrecy::Secret)?;
        }
        let record = IssuedRecord { serial: serial.clone(), not_after_unix_s, subject };
        files::append(&self.file(ISSUED), &record.line())?;
        let pem = credential.pem();
        match overwrite {
            Overwrite::Never => files::write_new(&path, pem.as_bytes(), Secrecy::Secret)?,
            Overwrite::Replace => files::replace(&path, pem.as_bytes(), Secrecy::Secret)?,
        }
        Ok(Issued { path, serial, not_after_unix_s })
    }

    fn forget_expired(&self, authority: &Authority, expired: &HashSet<&Serial>) -> Result<(), PkiError> {
        let mut list = self.revocations()?;
        let before = list.revoked.len();
        list.revoked.retain(|revoked| !expired.contains(&revoked.serial));
        if list.revoked.len() == before {
            return Ok(());
        }
        files::replace(&self.file(REVOCATIONS), list.sign(authority)?.as_bytes(), Secrecy::Public)
    }

    fn bounded(&self, count: usize, limit: usize, what: &'static str) -> Result<(), PkiError> {
        if count > limit {
            return Err(PkiError::Full { path: self.path.clone(), count: count - 1, what, limit });
        }
        Ok(())
    }

    /// Revokes certificates; gives those that were not revoked before. What has expired is taken by nobody, so it is neither put on the list nor kept
    /// there; where the index does not know a certificate it is in its time.
    pub fn revoke(&self, serials: &[Serial]) -> Result<Vec<Serial>, PkiError> {
        if serials.is_empty() {
            return Ok(Vec::new());
        }
        let authority = self.authority()?;
        let _lock = files::lock(&self.file(LOCK))?;
        let mut list = self.revocations()?;
        let (records, now) = (self.issued()?, now_unix_s());
        let expired = expired(&records, now);
        let mut there: HashSet<Serial> = list.revoked.iter().map(|revoked| revoked.serial.clone()).collect();
        let asked = serials.iter().filter(|serial| !expired.contains(serial));
        let fresh: Vec<Serial> = asked.filter(|serial| there.insert((*serial).clone())).cloned().collect();
        if !fresh.is_empty() {
            list.revoked.retain(|revoked| !expired.contains(&revoked.serial));
            self.bounded(list.revoked.len() + fresh.len(), REVOKED_MAX, "revoked")?;
            list.revoked
                .extend(fresh.iter().map(|serial| Revoked { serial: serial.clone(), at_unix_s: now }));
            files::replace(&self.file(REVOCATIONS), list.sign(&authority)?.as_bytes(), Secrecy::Public)?;
        }
        Ok(fresh)
    }

    /// Revokes everything that was issued for a peer and is still in its time; gives those that were not revoked before.
    pub fn revoke_all_of(&self, identity: &Identity) -> Result<Vec<Serial>, PkiError> {
        let (uri, now) = (identity.uri()?, now_unix_s());
        let its = self.issued()?.into_iter().filter(|record| record.subject == uri && record.counts(now));
        self.revoke(&its.map(|record| record.serial).collect::<Vec<_>>())
    }

    /// What is revoked.
    pub fn revocations(&self) -> Result<Revocations, PkiError> {
        let path = self.file(REVOCATIONS);
        Revocations::read(&files::read(&path)?)
            .map_err(|error| PkiError::unreadable(&path, "a list of revoked certificates", error))
    }

    /// Everything that was issued here, oldest first.
    pub fn issued(&self) -> Result<Vec<IssuedRecord>, PkiError> {
        let path = self.file(ISSUED);
        if !path.exists() {
            return Ok(Vec::new());
        }
        Ok(IssuedRecord::parse_all(&files::read(&path)?))
    }

    /// What the certificate in a file says; the first, where there are several.
    pub fn show(path: &Path) -> Result<Shown, PkiError> {
        let unreadable = |why: String| PkiError::unreadable(path, "a certificate", why);
        let text = files::read(path)?;
        let (_, pem) = parse_x509_pem(text.as_bytes()).map_err(|error| unreadable(error.to_string()))?;
        let certificate = peer::parse(&pem.contents).map_err(|error| unreadable(error.to_string()))?;
        let not_before = certificate.validity().not_before.timestamp();
        Ok(Shown {
            usage: peer::usage(&certificate)?,
            serial: peer::serial(&certificate),
            not_before_unix_s: u64::try_from(not_before).unwrap_or(0),
            not_after_unix_s: peer::not_after(&certificate),
        })
    }
}
