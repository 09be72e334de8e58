//! Peers that come and go while the server runs: where the key of the authority lies in the directory, each gets a certificate when it is
//! declared, and loses it when it is no more, so that who is declared after it under the same number is not mistaken for it.

use std::sync::Arc;

use iommu_pki::{CREDENTIAL_DAYS, Directory, Overwrite, PkiError, Usage, Validity};
use iommu_types::{Identity, Owner, Role};

use super::Tls;
use super::bootstrap::{tell_of_another, unless_there};

impl Tls {
    fn issue_if_possible(&self, peer: &Identity) -> Result<(), PkiError> {
        if !self.directory.has_authority_key() {
            return Ok(());
        }
        let validity = Validity::of_days(CREDENTIAL_DAYS)?;
        // A virtual machine is never the one that had its number and name in an earlier run, whatever became of that one's file.
        let is_new = matches!(peer.role, Role::Driver(Owner::Vm(_)));
        if is_new && !self.directory.revoke_all_of(peer)?.is_empty() {
            self.reload(true);
        }
        if !self.directory.has(peer)? {
            return unless_there(self.directory.issue_declared(peer, validity, Overwrite::Never)).map(drop);
        }
        match Directory::show(&self.directory.file(&peer.credential_file()?))?.usage {
            Usage::Peer(other) if other == *peer && !is_new => Ok(()),
            // Of one that had the number or the address in an earlier run of the server: it is no more.
            Usage::Peer(other) => {
                self.directory.revoke_all_of(&other)?;
                self.reload(true);
                self.directory.issue_declared(peer, validity, Overwrite::Replace).map(drop)
            }
            Usage::Server(_) => {
                tell_of_another(&self.directory, peer);
                Ok(())
            }
        }
    }

    fn revoke_if_possible(&self, peer: &Identity) -> Result<(), PkiError> {
        if !self.directory.has_authority_key() {
            return Ok(());
        }
        let path = self.directory.file(&peer.credential_file()?);
        let revoked = self.directory.revoke_all_of(peer);
        // Whoever is declared next gets a new one. It may be gone already.
        let _gone = std::fs::remove_file(path);
        // Before the number is free: a certificate of this one opens nothing of the next. Where nothing was revoked the list is as it was.
        self.reload(false);
        revoked.map(drop)
    }

    /// A peer was declared.
    pub async fn comes(self: &Arc<Self>, peer: Identity) {
        self.off_the_runtime(peer, Self::issue_if_possible, "certificate not issued").await;
    }

    /// A peer is no more.
    pub async fn goes(self: &Arc<Self>, peer: Identity) {
        self.off_the_runtime(peer, Self::revoke_if_possible, "certificate not revoked").await;
    }

    /// Files are written and keys made where nobody waits for them. What fails is told; the peer can be given a certificate by hand.
    async fn off_the_runtime(
        self: &Arc<Self>,
        peer: Identity,
        what: fn(&Self, &Identity) -> Result<(), PkiError>,
        failed: &'static str,
    ) {
        let tls = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || {
            if let Err(reason) = what(&tls, &peer) {
                tracing::warn!(%peer, %reason, "{failed}");
            }
        });
        if done.await.is_err() {
            tracing::error!("{failed}: the task ended early");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_virtual_machine_is_never_the_one_of_an_earlier_run_and_a_driver_is() {
        let parent = tempfile::tempdir().expect("a directory");
        let directory = Directory::at(parent.path().join("pki"));
        directory.init(Validity::of_days(1).expect("a validity")).expect("an authority");
        let validity = Validity::of_days(1).expect("a validity");
        directory.issue_server(&[], validity, None, Overwrite::Never).expect("issued");
        let run = || Arc::new(Tls::open(directory.clone()).expect("certificates"));
        for (owner, is_the_same) in [(Owner::Vm(3), false), (Owner::Driver(3), true)] {
            let peer = Identity { name: "guest".to_owned(), role: Role::Driver(owner) };
            let file = directory.file(&peer.credential_file().expect("a name"));
            let serial = || Directory::show(&file).expect("a certificate").serial;
            run().comes(peer.clone()).await;
            let before = serial();
            let later = run();
            later.comes(peer.clone()).await;
            assert_eq!(serial() == before, is_the_same, "{peer}");
            assert_eq!(later.is_revoked(&before), !is_the_same, "{peer}");
            // Where the file was taken away meanwhile too.
            let taken = serial();
            std::fs::remove_file(&file).expect("removed");
            later.comes(peer.clone()).await;
            assert!(serial() != taken && later.is_revoked(&taken) != is_the_same, "{peer}");
            // Gone, it leaves nothing that opens anything.
            let last = serial();
            later.goes(peer.clone()).await;
            assert!(!file.exists() && later.is_revoked(&last), "{peer}");
        }
    }
}
