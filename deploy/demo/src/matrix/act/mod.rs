//! The actors of the matrix beside the hostile devices: each is a process that is told what to do line by line, and knows of the server what
//! crosses the wire.

mod driver;
mod hypervisor;
pub(crate) mod language;
mod machine;

use std::io::Write;

use anyhow::{Context, bail};
use guest_sdk::{Connection, Owner, SdkError};
use iommu_proto::errors::WireError;
use rogue::lines::Lines;

use self::language::{Ask, Refused, Reply};

/// What the parent says on the command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Where the server listens.
    #[arg(long)]
    server: String,
    /// Name under which the session is opened.
    #[arg(long)]
    name: String,
    /// driver, hypervisor or machine.
    #[arg(long)]
    role: String,
    /// For a driver: its owner, as driver:0 or vm:1.
    #[arg(long)]
    owner: Option<Owner>,
}

/// Plays one role until the lines end.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let connection = Connection::to(&options.server);
    let mut actor = match (options.role.as_str(), options.owner) {
        ("driver", Some(owner)) => {
            Actor::Driver(driver::Driver::open(connection, &options.name, owner).await?)
        }
        ("hypervisor", None) => Actor::Hypervisor(connection.hypervisor(&options.name).await?),
        ("machine", None) => Actor::Machine(machine::System::open(connection, &options.name).await?),
        (role, owner) => bail!("role {role} with owner {owner:?}"),
    };
    let mut lines = Lines::of_stdin();
    while let Some(line) = lines.next().await.context("read a line")? {
        let ask: Ask = serde_json::from_str(&line).with_context(|| format!("was told {line:?}"))?;
        let reply = match &mut actor {
            Actor::Driver(driver) => driver.obey(ask).await,
            Actor::Hypervisor(hypervisor) => hypervisor::obey(hypervisor, ask).await,
            Actor::Machine(system) => system.obey(ask).await,
        };
        tell(&reply.unwrap_or_else(|refused| Reply { refused: Some(refused), ..Reply::default() }))?;
    }
    Ok(())
}

enum Actor {
    Driver(driver::Driver),
    Hypervisor(guest_sdk::Hypervisor),
    Machine(machine::System),
}

fn tell(reply: &Reply) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(reply)?)?;
    out.flush().map_err(Into::into)
}

/// A refusal in the words of the [language]: of the operation, or of any call.
impl<E: WireError> From<SdkError<E>> for Refused {
    fn from(error: SdkError<E>) -> Self {
        let message = error.to_string();
        let (reason, facts) = match &error {
            SdkError::Refused(refused) => (refused.reason(), refused.metadata()),
            SdkError::Call(refused) => (refused.reason(), refused.metadata()),
            SdkError::Transport(_) => ("TRANSPORT", Default::default()),
        };
        let limit = facts.get("limit").map_or_else(String::new, |limit| format!(":{limit}"));
        Self { reason: format!("{reason}{limit}"), message }
    }
}

/// What makes no sense.
fn nonsense(what: impl std::fmt::Debug) -> Refused {
    Refused { reason: "NONSENSE".to_owned(), message: format!("{what:?}") }
}
