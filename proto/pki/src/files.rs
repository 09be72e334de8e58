//! Files that are whole or not there, and private where they are secret.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::PkiError;

/// Who may read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Secrecy {
    /// Its owner alone.
    Secret,
    /// Everybody who can reach it.
    Public,
}

impl Secrecy {
    fn mode(self) -> u32 {
        match self {
            Self::Secret => 0o600,
            Self::Public => 0o644,
        }
    }
}

/// Makes a directory for its owner alone, with those above it; one that is there must not be writable by others.
pub(crate) fn private_directory(path: &Path) -> Result<(), PkiError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(PkiError::file(path))?;
    let mode = std::fs::metadata(path).map_err(PkiError::file(path))?.mode() & 0o777;
    if mode & 0o022 != 0 {
        return Err(PkiError::Exposed { path: path.to_owned(), mode });
    }
    Ok(())
}

/// A file beside `path` that nobody else writes. Gone when this value is dropped.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        // It may have become the file itself; there is nobody to tell.
        let _gone = std::fs::remove_file(&self.0);
    }
}

fn draft(path: &Path, content: &[u8], secrecy: Secrecy) -> io::Result<Draft> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let draft = path.with_file_name(format!(".{name}.{}-{number}.new", std::process::id()));
    // One that a process with this number left behind is nobody's.
    let _gone = std::fs::remove_file(&draft);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(secrecy.mode()).open(&draft)?;
    let draft = Draft(draft);
    // The mask of this process may have taken bits away that others need.
    file.set_permissions(Permissions::from_mode(secrecy.mode()))?;
    file.write_all(content)?;
    file.sync_all()?;
    Ok(draft)
}

fn sync_directory_of(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

/// Writes a file that is not there yet.
pub(crate) fn write_new(path: &Path, content: &[u8], secrecy: Secrecy) -> Result<(), PkiError> {
    let draft = draft(path, content, secrecy).map_err(PkiError::file(path))?;
    match std::fs::hard_link(&draft.0, path) {
        Ok(()) => sync_directory_of(path).map_err(PkiError::file(path)),
        Err(reason) if reason.kind() == io::ErrorKind::AlreadyExists => {
            Err(PkiError::Exists { path: path.to_owned() })
        }
        Err(reason) => Err(PkiError::File { path: path.to_owned(), reason }),
    }
}

/// Writes a file in the place of one that may be there.
pub(crate) fn replace(path: &Path, content: &[u8], secrecy: Secrecy) -> Result<(), PkiError> {
    let put = || {
        let draft = draft(path, content, secrecy)?;
        std::fs::rename(&draft.0, path)?;
        sync_directory_of(path)
    };
    put().map_err(PkiError::file(path))
}

/// Adds a line to a file of lines.
pub(crate) fn append(path: &Path, line: &str) -> Result<(), PkiError> {
    let add = || {
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        file.write_all(line.as_bytes())?;
        file.sync_all()
    };
    add().map_err(PkiError::file(path))
}

/// Reads a file of ours: certificates are small, and what is not is not ours.
pub(crate) fn read(path: &Path) -> Result<String, PkiError> {
    std::fs::read_to_string(path).map_err(PkiError::file(path))
}

/// Keeps other processes from changing the directory until it is dropped.
pub(crate) fn lock(path: &Path) -> Result<File, PkiError> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = file.map_err(PkiError::file(path))?;
    file.lock().map_err(PkiError::file(path))?;
    Ok(file)
}
