//! The file in which a hypervisor's session lies between commands: secret, whole at every moment, and of one command at a time.
//!
//! The file is replaced, never written over, so that a command which is killed leaves the old session or the new one. What keeps others away is
//! therefore a lock on another file beside it, which stays.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::fs::OFlags;

/// A session file is a few hundred bytes; what is longer is another file.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// How often a file that another command uses is looked at again.
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// A session file that nobody else uses until this value is dropped.
#[derive(Debug)]
pub(crate) struct SessionFile {
    path: PathBuf,
    _lock: File,
}

/// Bits of a mode that let others in.
const OTHERS: u32 = 0o077;

/// `path` with something after its name, in the same directory.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

fn options() -> std::fs::OpenOptions {
    let mut options = File::options();
    options.mode(0o600).custom_flags(OFlags::NOFOLLOW.bits() as i32);
    options
}

/// A symbolic link is told as what it is; the system speaks of too many levels of them.
fn told(path: &Path, reason: io::Error) -> anyhow::Error {
    if path.is_symlink() {
        return anyhow::anyhow!(
            "{} is a symbolic link, and what holds a secret must be a file itself",
            path.display()
        );
    }
    anyhow::Error::new(reason).context(format!("open {}", path.display()))
}

/// The token is for one user alone: neither read by others, nor given by them.
fn must_be_private(path: &Path, file: &File) -> anyhow::Result<()> {
    let found = file.metadata().with_context(|| format!("look at {}", path.display()))?;
    let user = rustix::process::geteuid().as_raw();
    if !found.is_file() {
        bail!("{} is no regular file; give another with --session", path.display());
    }
    if found.uid() != user {
        bail!(
            "{} is of user {}, not of {user}; give another file with --session",
            path.display(),
            found.uid()
        );
    }
    if found.mode() & OTHERS != 0 {
        let mode = found.mode() & 0o777;
        bail!(
            "{} holds a secret and others may use it (mode {mode:03o}); if its content is yours alone, chmod 600 it",
            path.display()
        );
    }
    Ok(())
}

impl SessionFile {
    /// Waits until no other command uses the file.
    pub(crate) async fn lock(path: PathBuf) -> anyhow::Result<Self> {
        let lock_path = beside(&path, ".lock");
        let lock = options().write(true).create(true).truncate(false).open(&lock_path);
        let lock = lock.map_err(|reason| told(&lock_path, reason))?;
        must_be_private(&lock_path, &lock)?;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Self { path, _lock: lock }),
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_RETRY).await,
                Err(TryLockError::Error(reason)) => {
                    return Err(reason).with_context(|| format!("lock {}", lock_path.display()));
                }
            }
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What it says; nothing where it is not there.
    pub(crate) fn read(&self) -> anyhow::Result<String> {
        let file = match options().read(true).open(&self.path) {
            Ok(file) => file,
            Err(reason) if reason.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
            Err(reason) => return Err(told(&self.path, reason)),
        };
        must_be_private(&self.path, &file)?;
        let mut text = String::new();
        let mut bounded = file.take(FILE_BYTES_MAX);
        bounded.read_to_string(&mut text).with_context(|| format!("read {}", self.path.display()))?;
        Ok(text)
    }

    /// Puts another content in its place.
    pub(crate) fn replace(&self, text: &str) -> anyhow::Result<()> {
        let draft = beside(&self.path, ".new");
        let put = || {
            // One that was left behind is nobody's: the lock is ours.
            match std::fs::remove_file(&draft) {
                Err(reason) if reason.kind() != io::ErrorKind::NotFound => return Err(reason),
                _ => {}
            }
            let mut file = options().write(true).create_new(true).open(&draft)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&draft, &self.path)
        };
        put().with_context(|| format!("write {}", self.path.display()))
    }
}
