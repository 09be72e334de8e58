//! Certificates: a private authority, what it issues and revokes, and what a peer's certificate says.
//!
//! One authority stands for one trust domain. It signs a credential (certificate and key) for each [`Identity`](iommu_types::Identity), with
//! the identity as the only URI in the subject's alternative names, and one for each server, with the names under which it is reached. What is
//! revoked stands in a list that the authority signs. Everything is ECDSA P-256, and lies in files of one [`Directory`].
//!
//! It promises that a private key is never written where others may read it, that no file is ever seen half written, and that nothing is
//! overwritten unless that was asked for.

mod authority;
mod directory;
mod errors;
mod files;
mod index;
mod peer;
mod revocation;

pub use authority::{AUTHORITY_DAYS, Authority, CREDENTIAL_DAYS, Credential, Validity, is_host};
pub use directory::{AUTHORITY, AUTHORITY_KEY, Directory, Issued, Overwrite, REVOCATIONS, SERVER, Shown};
pub use errors::PkiError;
pub use index::{DECLARED_MAX, ISSUED_MAX, IssuedRecord, REVOKED_MAX};
pub use peer::{ParseSerialError, PeerCertificate, Serial, UnfitCertificate, Usage, not_after_unix_s};
pub use revocation::{Revocations, Revoked};
