//! Who is at the other end of a TCP connection: mutual TLS, by default on every TCP listener.
//!
//! The handshake asks for a certificate of the private authority and takes the identity in it (`verifier`); it runs in a task of its own for
//! each connection, bounded in number and time (`handshake`), on a thread that yields to DMA (`desk`). Certificates lie in a directory that the server fills at its first start
//! (`bootstrap`), and rotate without a restart (`reload`). TLS 1.3 alone: every client of ours and every gRPC library speaks it, and with it
//! certificates are never shown in the clear. Nothing is resumed, because a resumed session would not show its certificate again (ADR 0009).

pub mod bootstrap;
pub(crate) mod desk;
pub(crate) mod handshake;
mod material;
pub mod metrics;
mod peers;
pub mod reload;
mod verifier;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use iommu_pki::{Directory, PkiError, Serial};
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use self::material::{Material, Stamps};
use self::metrics::TlsMetrics;

/// Why the server has no certificates to serve with.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Something about the directory or a file.
    #[error(
        "--pki: {0}\n  remedy: give a directory that this user owns and nobody else writes; it is filled at the first start"
    )]
    Pki(#[from] PkiError),
    /// A file that is needed is not there.
    #[error("--pki: there is no {}\n  remedy: {remedy}", path.display())]
    Missing {
        /// Which.
        path: PathBuf,
        /// How to get it.
        remedy: &'static str,
    },
    /// A file does not fit.
    #[error("--pki: {} cannot be used: {why}\n  remedy: issue or copy it anew (`iommuctl pki`), or give another directory", path.display())]
    Unfit {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: String,
    },
}

/// What the server shows and whom it believes, now.
#[derive(Debug)]
pub struct Tls {
    directory: Directory,
    current: RwLock<Arc<Material>>,
    /// Locked for a whole reload: of two at once, the one that read first would put back what the other has replaced.
    reloads: Mutex<Reloads>,
    asked: Notify,
    /// What is counted about handshakes and reloads.
    pub metrics: TlsMetrics,
}

/// What is known of the files.
#[derive(Debug)]
struct Reloads {
    /// As they looked when they were read.
    seen: Stamps,
    /// The last reload, where it failed: why, and when that was told.
    failed: Option<(String, Instant)>,
}

impl Tls {
    /// Reads the certificates of a directory.
    pub fn open(directory: Directory) -> Result<Self, TlsError> {
        let stamps = Stamps::of(&directory);
        let material = Material::load(&directory)?;
        Ok(Self {
            directory,
            current: RwLock::new(Arc::new(material)),
            reloads: Mutex::new(Reloads { seen: stamps, failed: None }),
            asked: Notify::new(),
            metrics: TlsMetrics::default(),
        })
    }
    /// Where they lie.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
    fn current(&self) -> Arc<Material> {
        Arc::clone(&self.current.read())
    }
    /// Asks for the files to be read anew, changed or not.
    pub fn reload_soon(&self) {
        self.asked.notify_one();
    }
    /// Whether a certificate is on the list that is in force.
    pub fn is_revoked(&self, serial: &Serial) -> bool {
        self.current().revoked.contains(serial)
    }
    /// Last second of the server's own certificate, since the UNIX epoch.
    pub fn own_not_after_unix_s(&self) -> u64 {
        self.current().own_not_after_unix_s
    }
}
