//! A hypervisor's session over several commands: kept in a file, locked while a command uses it.
//!
//! What a hypervisor made goes with its session, so the next command goes on with the session of the one before. The file holds what that needs: a
//! secret token, and the last request ID. IDs are set aside before they are used, so that a command which is killed leaves none that is used twice.

use std::path::PathBuf;

use anyhow::{Context, bail};
use guest_sdk::{Hypervisor, SavedSession, SdkError, TransportError};
use iommu_types::UnfitName;
use serde_json::{Value, json};

use crate::args::{Cli, SessionArgs};
use crate::session_file::SessionFile;

/// Request IDs that one command may use.
const REQUESTS_PER_COMMAND: u64 = 16;

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
    _file: SessionFile,
}

fn path(args: &SessionArgs) -> anyhow::Result<PathBuf> {
    if let Some(path) = &args.session {
        return Ok(path.clone());
    }
    let name = &args.hypervisor;
    if !iommu_types::is_name(name) {
        return Err(UnfitName { name: name.clone() }).context("--as");
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

/// The last request ID of a command that begins after `last_request_id`.
fn set_aside(last_request_id: u64) -> anyhow::Result<u64> {
    let last = last_request_id.checked_add(REQUESTS_PER_COMMAND);
    last.with_context(|| {
        format!("last_request_id: no request IDs are left after {last_request_id}; remove the file")
    })
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
    set_aside(last_request_id)?;
    Ok(Some(SavedSession { resume_token, last_request_id }))
}

/// Opens the session of the file, or another one where it has none and the command may.
pub(crate) async fn open(cli: &Cli, args: &SessionArgs, absent: Absent) -> anyhow::Result<Session> {
    // Whoever comes second waits: a session is on one connection at a time.
    let file = SessionFile::lock(path(args)?).await?;
    let name = &args.hypervisor;
    let saved = read(&file.read()?, cli, args).with_context(|| format!("read {}", file.path().display()))?;
    let resumed = match &saved {
        None => None,
        Some(saved) => match crate::connection(cli).resume_hypervisor(name, saved).await {
            Ok(hypervisor) => Some(hypervisor),
            // The file stays as it is until there is another session to put into it.
            Err(SdkError::Transport(TransportError::StateLost)) => None,
            Err(error) => return Err(error.into()),
        },
    };
    let hypervisor = match (resumed, absent) {
        (Some(hypervisor), _) => hypervisor,
        (None, Absent::Open) => crate::connection(cli).hypervisor(name).await?,
        (None, Absent::Refuse) if saved.is_some() => {
            bail!(
                "the session of {name} is over, and what it had is reclaimed; `iommuctl vm create` or `iommuctl vm keep` opens another"
            )
        }
        (None, Absent::Refuse) => {
            bail!(
                "{name} has no session in {}; `iommuctl vm create` or `iommuctl vm keep` opens one",
                file.path().display()
            )
        }
    };
    let SavedSession { resume_token, last_request_id } = hypervisor.save().await;
    let text = json!({
        "server": cli.server,
        "name": name,
        "resume_token": hex(&resume_token),
        "last_request_id": set_aside(last_request_id)?,
    });
    file.replace(&format!("{text:#}\n"))?;
    Ok(Session { hypervisor, _file: file })
}
