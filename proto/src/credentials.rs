//! With what a client shows who it is: files, found by the identity that it opens.
//!
//! The files are read anew at every connect, so that rotated ones are used without a restart. The default directory is the one that a server
//! on this machine makes at its first start, so that peers of one user find theirs with nothing to do.

use std::path::{Path, PathBuf};

use iommu_types::{AUTHORITY_FILE, Identity, Role};

/// Names the directory where no flag does.
const DIRECTORY_VARIABLE: &str = "IOMMU_PKI";

/// There is no default directory for certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "neither IOMMU_PKI nor XDG_STATE_HOME nor HOME is set, so there is no default directory for certificates; give --pki DIR"
)]
pub struct NoDirectory;

/// Where certificates are unless said otherwise: `$IOMMU_PKI`, `$XDG_STATE_HOME/iommu/pki`, or `~/.local/state/iommu/pki`.
pub fn default_directory() -> Result<PathBuf, NoDirectory> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    directory_of(set(DIRECTORY_VARIABLE), set("XDG_STATE_HOME"), set("HOME"))
}

fn directory_of(
    given: Option<PathBuf>,
    state: Option<PathBuf>,
    home: Option<PathBuf>,
) -> Result<PathBuf, NoDirectory> {
    // The XDG specification wants relative paths ignored.
    let state = state.filter(|path| path.is_absolute()).or_else(|| Some(home?.join(".local/state")));
    given.or_else(|| Some(state?.join("iommu/pki"))).ok_or(NoDirectory)
}

/// Why the server does not take a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It has expired, or is not valid yet.
    Expired,
    /// It was revoked.
    Revoked,
    /// Another authority signed it.
    UnknownAuthority,
    /// None was shown.
    NoCertificate,
    /// It names no identity that the server knows how to read.
    NoIdentity,
    /// Something else, in the words of TLS.
    Other(String),
}

impl Refused {
    fn words(&self) -> String {
        match self {
            Self::Expired => "it has expired, or a clock is wrong".to_owned(),
            Self::Revoked => "it was revoked".to_owned(),
            Self::UnknownAuthority => "another authority signed it than the one the server trusts".to_owned(),
            Self::NoCertificate => "none was shown".to_owned(),
            Self::NoIdentity => "it does not name exactly one identity of a peer".to_owned(),
            Self::Other(alert) => format!("TLS alert {alert}"),
        }
    }
}

/// Why no connection came about, where certificates are the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CredentialError {
    /// There is no directory to look in.
    #[error(transparent)]
    NoDirectory(#[from] NoDirectory),
    /// A file is not there.
    #[error("there is no {}: {remedy}", path.display())]
    Missing {
        /// Which.
        path: PathBuf,
        /// How to get it.
        remedy: String,
    },
    /// A file cannot be read, or is not what it should be.
    #[error("{} cannot be used: {why}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// The identity has a name that no certificate can carry.
    #[error(transparent)]
    UnfitName(#[from] iommu_types::UnfitName),
    /// The server's certificate is not one of the authority, or not for the name under which it was called.
    #[error(
        "the server is not the one that {} vouches for: {why}; copy the server's ca.crt, or have its certificate issued with this \
         name (`iommuctl pki issue server --host NAME --force`)",
        authority.display()
    )]
    ServerNotTrusted {
        /// The file of the authority.
        authority: PathBuf,
        /// What was found.
        why: String,
    },
    /// The server does not take the certificate.
    #[error("the server refuses the certificate in {}: {}; {remedy}", path.display(), refused.words())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why.
        refused: Refused,
        /// What to do.
        remedy: String,
    },
    /// There is no TLS at the other end.
    #[error(
        "the server does not speak TLS there ({why}); if it runs with --insecure-plaintext, write http:// instead of https://"
    )]
    NotTls {
        /// What came instead.
        why: String,
    },
}

/// Where a client's files are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "credentials do nothing until something connects with them"]
pub struct Credentials {
    directory: Option<PathBuf>,
    credential: Option<PathBuf>,
    authority: Option<PathBuf>,
}

/// The files of one identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Files {
    pub(crate) authority: PathBuf,
    pub(crate) credential: PathBuf,
}

impl Credentials {
    /// Those of the [default directory](default_directory), found by identity when a connection is made.
    pub fn from_default_directory() -> Self {
        Self::default()
    }
    /// Those of a directory, found by identity when a connection is made.
    pub fn from_directory(directory: impl Into<PathBuf>) -> Self {
        Self { directory: Some(directory.into()), ..Self::default() }
    }
    /// A file with certificate and key, and one with the certificate of the authority.
    pub fn from_files(credential: impl Into<PathBuf>, authority: impl Into<PathBuf>) -> Self {
        Self { directory: None, credential: Some(credential.into()), authority: Some(authority.into()) }
    }
    /// As the flags `--pki`, `--credential` and `--ca` say; what is not given comes from the directory.
    pub fn from_flags(
        directory: Option<PathBuf>,
        credential: Option<PathBuf>,
        authority: Option<PathBuf>,
    ) -> Self {
        Self { directory, credential, authority }
    }
    pub(crate) fn files(&self, identity: &Identity) -> Result<Files, CredentialError> {
        let directory = || self.directory.clone().map_or_else(default_directory, Ok);
        let authority = match &self.authority {
            Some(path) => path.clone(),
            None => directory()?.join(AUTHORITY_FILE),
        };
        let credential = match &self.credential {
            Some(path) => path.clone(),
            None => directory()?.join(identity.credential_file()?),
        };
        Ok(Files { authority, credential })
    }
}

/// The command that makes a credential for an identity.
fn issue_command(identity: &Identity) -> String {
    let name = &identity.name;
    match identity.role {
        Role::Device(address) => format!("iommuctl pki issue device {address} --name {name}"),
        Role::Driver(owner) => format!("iommuctl pki issue driver {owner} --name {name}"),
        _ => format!("iommuctl pki issue {} {name}", identity.role.word()),
    }
}

pub(crate) fn missing(path: &Path, identity: &Identity) -> CredentialError {
    let remedy = if path.file_name().is_some_and(|name| name == AUTHORITY_FILE) {
        "start iommu-server once (it makes one in its --pki directory) and give that directory, or copy the file from the server's machine"
            .to_owned()
    } else {
        format!(
            "make one where the authority's key is with `{}`, or start iommu-server with this peer in its configuration",
            issue_command(identity)
        )
    };
    CredentialError::Missing { path: path.to_owned(), remedy }
}

pub(crate) fn refused(path: &Path, refused: Refused, identity: &Identity) -> CredentialError {
    let remedy = match refused {
        Refused::UnknownAuthority => {
            "use the --pki directory of that server, or have the certificate issued there".to_owned()
        }
        Refused::Expired
        | Refused::Revoked
        | Refused::NoCertificate
        | Refused::NoIdentity
        | Refused::Other(_) => {
            format!("have a new one issued with `{} --force`", issue_command(identity))
        }
    };
    CredentialError::Refused { path: path.to_owned(), refused, remedy }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_directory_is_the_first_that_is_set() {
        let path = |text: &str| Some(PathBuf::from(text));
        let rows = [
            ((path("/given"), path("/state"), path("/home/x")), Some("/given")),
            ((None, path("/state"), path("/home/x")), Some("/state/iommu/pki")),
            ((None, path("relative"), path("/home/x")), Some("/home/x/.local/state/iommu/pki")),
            ((None, None, path("/home/x")), Some("/home/x/.local/state/iommu/pki")),
            ((None, path("relative"), None), None),
            ((None, None, None), None),
        ];
        for ((given, state, home), expected) in rows {
            assert_eq!(directory_of(given, state, home).ok(), expected.map(PathBuf::from));
        }
    }

    #[test]
    fn files_win_over_the_directory_and_the_identity_picks_the_rest() {
        let identity = Identity { name: "alice".to_owned(), role: Role::Operator };
        let flags = Credentials::from_flags(Some("/pki".into()), Some("/mine.pem".into()), None);
        let files = flags.files(&identity).expect("files");
        assert_eq!((files.authority, files.credential), ("/pki/ca.crt".into(), "/mine.pem".into()));
        let files = Credentials::from_directory("/pki").files(&identity).expect("files");
        assert_eq!(files.credential, PathBuf::from("/pki/operator-alice.pem"));
    }
}
