//! What can go wrong with certificates and their files; each error says what to do.

use std::io;
use std::path::{Path, PathBuf};

use iommu_types::UnfitName;

use crate::UnfitCertificate;

/// Why something about certificates was not done.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The system refused something with a file.
    #[error("{}: {reason}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        reason: io::Error,
    },
    /// There is a file already.
    #[error("{} is there already; give --force to replace it, or --out for another file", path.display())]
    Exists {
        /// Which file.
        path: PathBuf,
    },
    /// The directory has no authority.
    #[error("{} has no certificate authority; make one with `iommuctl pki init`, or start iommu-server once", path.display())]
    NoAuthority {
        /// The directory.
        path: PathBuf,
    },
    /// The directory has an authority, and not its key.
    #[error("{} has no key of the authority (ca.key), so nothing can be issued or revoked here; do it where the key is", path.display())]
    NoAuthorityKey {
        /// The directory.
        path: PathBuf,
    },
    /// Others may change what is in the directory.
    #[error("{} may be written by others (mode {mode:03o}), who could put a certificate authority of their own there; chmod go-w it", path.display())]
    Exposed {
        /// The directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The directory is of somebody else.
    #[error("{} is of user {owner}, who could put a certificate authority of their own there; chown it, or give another directory", path.display())]
    OfAnother {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// There is no place for another certificate that can be revoked.
    #[error("{} counts {count} certificates that are {what} and not expired, and {limit} is the limit; issue for shorter (--valid), \
         or begin a new authority in another directory", path.display())]
    Full {
        /// The directory.
        path: PathBuf,
        /// How many.
        count: usize,
        /// Issued or revoked.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// A file is not what it should be.
    #[error("{} is not {expected}: {why}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
        /// What is wrong.
        why: String,
    },
    /// A name that no certificate can carry.
    #[error(transparent)]
    UnfitName(#[from] UnfitName),
    /// A certificate that says something else.
    #[error(transparent)]
    UnfitCertificate(#[from] UnfitCertificate),
    /// A host that is neither a name nor an address.
    #[error("{host:?} is neither a host name nor an address")]
    UnfitHost {
        /// As given.
        host: String,
    },
    /// A validity that makes no sense.
    #[error("a validity of {seconds} s is not possible; give at least 1s and at most 36500d")]
    UnfitValidity {
        /// In seconds.
        seconds: u64,
    },
    /// The library that signs refused.
    #[error("signing: {why}")]
    Signing {
        /// What it said.
        why: String,
    },
}

impl PkiError {
    pub(crate) fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |reason| Self::File { path: path.to_owned(), reason }
    }
    pub(crate) fn unreadable(path: &Path, expected: &'static str, why: impl ToString) -> Self {
        Self::Unreadable { path: path.to_owned(), expected, why: why.to_string() }
    }
}

impl From<rcgen::Error> for PkiError {
    fn from(error: rcgen::Error) -> Self {
        Self::Signing { why: error.to_string() }
    }
}
