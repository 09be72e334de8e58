//! `iommuctl pki`: certificates in a directory. Needs no server.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{bail, ensure};
use guest_sdk::default_directory;
use iommu_pki::{Directory, IssuedRecord, Overwrite, Revocations, Serial, Usage, Validity};
use iommu_types::Identity;
use serde_json::json;

use crate::pki_args::{PkiCommand, Subject, Whose};
use crate::print::Output;

/// Runs a command on the directory that was given, or on the default one.
pub(crate) fn run(out: Output, directory: Option<PathBuf>, command: &PkiCommand) -> anyhow::Result<()> {
    let directory = Directory::at(directory.map_or_else(default_directory, Ok)?);
    match command {
        PkiCommand::Init { valid } => init(out, &directory, *valid),
        PkiCommand::Issue { subject } => issue(out, &directory, subject),
        PkiCommand::Revoke { whose } => revoke(out, &directory, whose),
        PkiCommand::List => list(out, &directory),
        PkiCommand::Show { file } => show(out, &directory, file),
    }
}

fn date(unix_s: u64) -> String {
    // Beyond the year 9999 there is no such date; no certificate is valid that long.
    let second = UNIX_EPOCH.checked_add(Duration::from_secs(unix_s.min(253_402_300_799)));
    second.map_or_else(|| unix_s.to_string(), |time| humantime::format_rfc3339_seconds(time).to_string())
}

fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn init(out: Output, directory: &Directory, valid: Duration) -> anyhow::Result<()> {
    let made = directory.init(Validity::of(valid)?)?;
    let path = directory.path().display().to_string();
    out.line(&json!({ "directory": path, "made": made }), || {
        if made {
            format!(
                "made a certificate authority in {path}; next: iommuctl pki issue server --host NAME, and one issue for each peer"
            )
        } else {
            format!("{path} has a certificate authority already; nothing was changed")
        }
    });
    Ok(())
}

fn issue(out: Output, directory: &Directory, subject: &Subject) -> anyhow::Result<()> {
    let terms = subject.terms();
    let (validity, into) = (Validity::of(terms.valid)?, terms.out.as_deref());
    let overwrite = if terms.force { Overwrite::Replace } else { Overwrite::Never };
    let (issued, whose) = match (subject, subject.identity()) {
        (Subject::Server { host, .. }, _) => {
            (directory.issue_server(host, validity, into, overwrite)?, "the server".to_owned())
        }
        (_, Some(identity)) => (directory.issue(&identity, validity, into, overwrite)?, identity.to_string()),
        (_, None) => bail!("only a server has no identity"),
    };
    let (path, expires) = (issued.path.display().to_string(), date(issued.not_after_unix_s));
    let value = json!({
        "file": path, "for": whose, "serial": issued.serial.to_string(), "expires": expires,
    });
    out.line(&value, || format!("{path}: certificate and key for {whose}, until {expires}"));
    Ok(())
}

fn identity_of(record: &IssuedRecord) -> Option<Identity> {
    Identity::from_uri(&record.subject).ok()
}

fn revoke(out: Output, directory: &Directory, whose: &Whose) -> anyhow::Result<()> {
    let serials: Vec<Serial> = match whose {
        Whose::Serial { serial } => vec![serial.clone()],
        whose => {
            let issued = directory.issued()?;
            let of_it = issued.iter().filter(|record| identity_of(record).is_some_and(|one| whose.is(&one)));
            // What has expired counts no more, and would only make the list longer.
            let counting = of_it.filter(|record| record.not_after_unix_s >= now_unix_s());
            counting.map(|record| record.serial.clone()).collect()
        }
    };
    ensure!(
        !serials.is_empty(),
        "no certificate that is still in its time was issued for this peer in {}; `iommuctl pki list` shows them",
        directory.path().display()
    );
    let fresh = directory.revoke(&serials)?;
    let numbers: Vec<String> = fresh.iter().map(Serial::to_string).collect();
    out.line(&json!({ "revoked": numbers }), || match numbers.len() {
        0 => "revoked before; nothing was changed".to_owned(),
        _ => format!("revoked {}", numbers.join(", ")),
    });
    Ok(())
}

fn state(revocations: &Revocations, serial: &Serial, not_after_unix_s: u64) -> &'static str {
    if revocations.contains(serial) {
        "revoked"
    } else if not_after_unix_s < now_unix_s() {
        "expired"
    } else {
        "good"
    }
}

fn list(out: Output, directory: &Directory) -> anyhow::Result<()> {
    let (issued, revocations) = (directory.issued()?, directory.revocations()?);
    let subject =
        |record: &IssuedRecord| identity_of(record).map_or(record.subject.clone(), |one| one.to_string());
    let rows: Vec<[String; 4]> = issued
        .iter()
        .map(|record| {
            let state = state(&revocations, &record.serial, record.not_after_unix_s);
            [subject(record), record.serial.to_string(), date(record.not_after_unix_s), state.to_owned()]
        })
        .collect();
    let value = rows
        .iter()
        .map(|[subject, serial, expires, state]| {
            json!({ "for": subject, "serial": serial, "expires": expires, "state": state })
        })
        .collect();
    out.table(&value, &["for", "serial", "expires", "state"], rows.into_iter().map(Vec::from).collect());
    Ok(())
}

fn show(out: Output, directory: &Directory, file: &Path) -> anyhow::Result<()> {
    let beside = directory.path().join(file);
    let path = if !file.exists() && beside.exists() { &beside } else { file };
    let shown = Directory::show(path)?;
    let (uri, hosts, whose) = match &shown.usage {
        Usage::Peer(identity) => (identity.uri().ok(), Vec::new(), identity.to_string()),
        Usage::Server(hosts) => (None, hosts.clone(), format!("a server at {}", hosts.join(", "))),
    };
    // Without the list of the directory nothing is known of revocations; the rest can be said all the same.
    let revocations = directory.revocations().unwrap_or_default();
    let state = state(&revocations, &shown.serial, shown.not_after_unix_s);
    let (begins, expires) = (date(shown.not_before_unix_s), date(shown.not_after_unix_s));
    let value = json!({
        "file": path.display().to_string(), "for": whose, "uri": uri, "hosts": hosts,
        "serial": shown.serial.to_string(), "begins": begins, "expires": expires, "state": state,
    });
    out.page(&value, || {
        let uri = uri.as_ref().map_or_else(String::new, |uri| format!("identity  {uri}\n"));
        format!(
            "for       {whose}\n{uri}serial    {}\nvalid     {begins} to {expires}\nstate     {state}\n",
            shown.serial
        )
    });
    Ok(())
}
