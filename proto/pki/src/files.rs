//! Files that are whole or not there, and private where they are secret.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::PkiError;

/// Largest file that is read: an index or a list of as many certificates as may be issued and revoked (see [`index`](crate::index)) has less.
const FILE_BYTES_MAX: u64 = 16 << 20;

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

/// Makes a directory for its owner alone, with those above it; one that is there must be this user's, or root's, and not writable by others.
pub(crate) fn private_directory(path: &Path) -> Result<(), PkiError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(PkiError::file(path))?;
    let found = std::fs::metadata(path).map_err(PkiError::file(path))?;
    let (mode, owner) = (found.mode() & 0o777, found.uid());
    if !is_trusted(owner, rustix::process::geteuid().as_raw()) {
        return Err(PkiError::OfAnother { path: path.to_owned(), owner });
    }
    if mode & 0o022 != 0 {
        return Err(PkiError::Exposed { path: path.to_owned(), mode });
    }
    Ok(())
}

/// Whether a directory of that user may be relied on by this one. Root could do as it likes anyway.
fn is_trusted(owner: u32, user: u32) -> bool {
    owner == user || owner == 0
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

/// Adds a line to a file of lines. What a crash left of the line before stays a line of its own.
pub(crate) fn append(path: &Path, line: &str) -> Result<(), PkiError> {
    let add = || {
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        let mut added = String::with_capacity(line.len() + 1);
        if let Some(end) = file.metadata()?.len().checked_sub(1) {
            let mut last = [0];
            file.read_exact_at(&mut last, end)?;
            if last != *b"\n" {
                added.push('\n');
            }
        }
        added.push_str(line);
        file.write_all(added.as_bytes())?;
        file.sync_all()
    };
    add().map_err(PkiError::file(path))
}

/// Reads a file of ours: certificates are small, and what is not is not ours.
pub(crate) fn read(path: &Path) -> Result<String, PkiError> {
    let bounded = || {
        let mut text = String::new();
        File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(io::Error::other("it is larger than what is kept of certificates"));
        }
        Ok(text)
    };
    bounded().map_err(PkiError::file(path))
}

/// Keeps other processes from changing the directory until it is dropped.
pub(crate) fn lock(path: &Path) -> Result<File, PkiError> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = file.map_err(PkiError::file(path))?;
    file.lock().map_err(PkiError::file(path))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_a_crash_cut_takes_no_other_with_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("lines");
        for (there, after) in
            [(None, "new\n"), (Some("one\n"), "one\nnew\n"), (Some("one\ntw"), "one\ntw\nnew\n")]
        {
            if let Some(there) = there {
                std::fs::write(&path, there).expect("written");
            }
            append(&path, "new\n").expect("added");
            assert_eq!(read(&path).expect("read"), after, "{there:?}");
        }
    }

    #[test]
    fn what_is_too_large_is_not_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("large");
        for (bytes, fits) in [(FILE_BYTES_MAX, true), (FILE_BYTES_MAX + 1, false)] {
            File::create(&path).and_then(|file| file.set_len(bytes)).expect("made");
            assert_eq!(read(&path).is_ok(), fits, "{bytes} bytes");
        }
    }

    #[test]
    fn a_directory_is_relied_on_where_it_is_ours_or_roots() {
        for (owner, user, trusted) in
            [(1000, 1000, true), (0, 1000, true), (0, 0, true), (1000, 0, false), (1001, 1000, false)]
        {
            assert_eq!(is_trusted(owner, user), trusted, "of {owner}, for {user}");
        }
    }
}
