//! The certificates as they were read at one moment, made into what a handshake needs.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use iommu_pki::{AUTHORITY, Directory, REVOCATIONS, Revocations, SERVER, Serial, not_after_unix_s};
use iommu_proto::tls::ALPN;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};

use super::TlsError;
use super::verifier::PeerVerifier;
use crate::bounds;

const FILES: [&str; 3] = [AUTHORITY, REVOCATIONS, SERVER];

/// What tells a file from the one that was there before.
type Stamp = Option<(u64, i64, i64, u64)>;

/// The files as they looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamps([Stamp; FILES.len()]);

impl Stamps {
    /// Now.
    pub(super) fn of(directory: &Directory) -> Self {
        Self(FILES.map(|name| {
            let seen = std::fs::metadata(directory.file(name)).ok()?;
            Some((seen.ino(), seen.mtime(), seen.mtime_nsec(), seen.len()))
        }))
    }
}

/// What a handshake needs.
#[derive(Debug)]
pub(super) struct Material {
    pub(super) config: Arc<ServerConfig>,
    pub(super) revoked: HashSet<Serial>,
    pub(super) own_not_after_unix_s: u64,
}

fn read(path: &Path) -> Result<String, TlsError> {
    let bounded = || {
        let mut text = String::new();
        let mut file = File::open(path)?.take(bounds::CERTIFICATE_FILE_BYTES_MAX + 1);
        file.read_to_string(&mut text)?;
        if text.len() as u64 > bounds::CERTIFICATE_FILE_BYTES_MAX {
            return Err(io::Error::other("it is larger than certificates are"));
        }
        Ok(text)
    };
    bounded().map_err(|reason: io::Error| match reason.kind() {
        io::ErrorKind::NotFound => TlsError::Missing { path: path.to_owned(), remedy: remedy(path) },
        _ => unfit(path, reason),
    })
}

fn remedy(path: &Path) -> &'static str {
    match path.file_name().and_then(|name| name.to_str()) {
        Some(SERVER) => {
            "issue one where the authority's key is (`iommuctl pki issue server --host NAME --out FILE`) and copy it here"
        }
        Some(REVOCATIONS) => {
            "copy the list from where the authority is: without it revoked certificates would pass"
        }
        _ => "copy the authority's certificate here, or give an empty directory to have one made",
    }
}

fn unfit(path: &Path, why: impl ToString) -> TlsError {
    TlsError::Unfit { path: path.to_owned(), why: why.to_string() }
}

impl Material {
    /// Reads the files, as they are now.
    pub(super) fn load(directory: &Directory) -> Result<Self, TlsError> {
        let (authority, list, own) =
            (directory.file(AUTHORITY), directory.file(REVOCATIONS), directory.file(SERVER));
        let (authority_pem, list_pem, own_pem) = (read(&authority)?, read(&list)?, read(&own)?);

        let mut roots = RootCertStore::empty();
        for root in certificates(&authority, &authority_pem)? {
            roots.add(root).map_err(|error| unfit(&authority, error))?;
        }
        let revoked =
            Revocations::read_genuine(&list_pem, &authority_pem).map_err(|error| unfit(&list, error))?;
        let lists: Result<Vec<_>, _> =
            CertificateRevocationListDer::pem_slice_iter(list_pem.as_bytes()).collect();
        let lists = lists.map_err(|error| unfit(&list, error))?;

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .with_crls(lists)
            .only_check_end_entity_revocation()
            .build()
            .map_err(|error| unfit(&authority, error))?;
        let shown = certificates(&own, &own_pem)?;
        let first = shown.first().ok_or_else(|| unfit(&own, "it holds no certificate"))?;
        let own_not_after_unix_s = not_after_unix_s(first).map_err(|error| unfit(&own, error))?;
        let key = PrivateKeyDer::from_pem_slice(own_pem.as_bytes())
            .map_err(|error| unfit(&own, format!("it holds no key ({error})")))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|builder| {
                builder
                    .with_client_cert_verifier(Arc::new(PeerVerifier::new(chain)))
                    .with_single_cert(shown, key)
            })
            .map_err(|error| unfit(&own, error))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // Whoever resumes does not show a certificate, and would outlive its revocation.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let revoked = revoked.revoked.into_iter().map(|revoked| revoked.serial).collect();
        Ok(Self { config: Arc::new(config), revoked, own_not_after_unix_s })
    }
}

fn certificates(path: &Path, pem: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let all = all.map_err(|error| unfit(path, error))?;
    if all.is_empty() {
        return Err(unfit(path, "it holds no certificate"));
    }
    Ok(all)
}
