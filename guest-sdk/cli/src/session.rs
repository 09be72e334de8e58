//! A hypervisor's session over several commands: kept in a file, locked while a command uses it.
//!
//! What a hypervisor made goes with its session, so the next command goes on with the session of the one before. The file holds what that needs: a
//! secret token, and the last request ID. IDs are set aside before they are used, so that a command which is killed leaves none that is used twice.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use anyhow::{Context, bail};
use guest_sdk::{Hypervisor, SavedSession, SdkError, TransportError};
use serde_json::{Value, json};

use crate::args::{Cli, SessionArgs};

/// Request IDs that one command may use.
const REQUESTS_PER_COMMAND: u64 = 16;
/// A session file is a few hundred bytes; what is longer is another file.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Whether a command may open a session where there is none: that takes the name over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Absent {
    Open,
    Refuse,
}

/// A session that is open, and its file, which nobody else uses meanwhile.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) hypervisor: Hypervisor,
    _locked: File,
}

fn path(args: &SessionArgs) -> anyhow::Result<PathBuf> {
    if let Some(path) = &args.session {
        return Ok(path.clone());
    }
    let name = &args.hypervisor;
    if !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')) {
        bail!("--as: a name has letters, digits, dots, dashes or underscores");
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    if let Some(directory) = runtime.filter(|directory| directory.is_absolute()) {
        return Ok(directory.join(format!("iommuctl-{name}.session")));
    }
    let home = std::env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute());
    let home = home
        .context("neither XDG_RUNTIME_DIR nor HOME is set; say with --session where the session is kept")?;
    Ok(home.join(format!(".iommuctl-{name}.session")))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The session in a file of this server and this name; `None` in an empty one.
fn read(text: &str, cli: &Cli, args: &SessionArgs) -> anyhow::Result<Option<SavedSession>> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    let value: Value = serde_json::from_str(text).context("it is no session")?;
    let field = |name: &str| value[name].as_str().with_context(|| format!("it has no {name}"));
    let (server, name) = (field("server")?, field("name")?);
    if server != cli.server || name != args.hypervisor {
        bail!("it is a session of {name} with {server}; give another file with --session");
    }
    let resume_token = crate::memory::from_hex(field("resume_token")?).context("resume_token")?;
    let last_request_id = value["last_request_id"].as_u64().context("it has no last_request_id")?;
    Ok(Some(SavedSession { resume_token, last_request_id }))
}

fn write(file: &mut File, text: &str) -> std::io::Result<()> {
    file.rewind()?;
    file.set_len(0)?;
    file.write_all(text.as_bytes())?;
    file.flush()
}

/// Opens the session of the file, or another one where it has none and the command may.
pub(crate) async fn open(cli: &Cli, args: &SessionArgs, absent: Absent) -> anyhow::Result<Session> {
    let path = path(args)?;
    let name = &args.hypervisor;
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    // Whoever comes second waits: a session is on one connection at a time.
    file.lock().with_context(|| format!("lock {}", path.display()))?;
    let mut text = String::new();
    (&file)
        .take(FILE_BYTES_MAX)
        .read_to_string(&mut text)
        .with_context(|| format!("read {}", path.display()))?;
    let saved = read(&text, cli, args).with_context(|| format!("read {}", path.display()))?;
    let resumed = match &saved {
        None => None,
        Some(saved) => match crate::connection(cli).resume_hypervisor(name, saved).await {
            Ok(hypervisor) => Some(hypervisor),
            Err(SdkError::Transport(TransportError::StateLost)) => {
                write(&mut file, "").with_context(|| format!("write {}", path.display()))?;
                None
            }
            Err(error) => return Err(error.into()),
        },
    };
    let hypervisor = match (resumed, absent) {
        (Some(hypervisor), _) => hypervisor,
        (None, Absent::Open) => crate::connection(cli).hypervisor(name).await?,
        (None, Absent::Refuse) if saved.is_some() => {
            bail!("the session of {name} is over, and what it had is reclaimed; `iommuctl vm keep` keeps one")
        }
        (None, Absent::Refuse) => {
            bail!(
                "{name} has no session in {}; `iommuctl vm create` or `iommuctl vm keep` opens one",
                path.display()
            )
        }
    };
    let SavedSession { resume_token, last_request_id } = hypervisor.save().await;
    let text = json!({
        "server": cli.server,
        "name": name,
        "resume_token": hex(&resume_token),
        "last_request_id": last_request_id + REQUESTS_PER_COMMAND,
    });
    write(&mut file, &format!("{text:#}\n")).with_context(|| format!("write {}", path.display()))?;
    Ok(Session { hypervisor, _locked: file })
}
