//! The process of a peer: it says that it is ready, then answers line by line until its input ends.

use anyhow::Context;
use clap::ValueEnum;
use iommu_types::{DeviceAddress, Owner};
use tokio::sync::mpsc;

use super::device::Generator;
use super::guest::Guest;
use super::hypervisor::Machines;
use super::words::{Ask, Told};

/// Niceness of a flooder: the lowest priority.
const LOWEST: i32 = 19;

/// Which peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Creates the virtual machines, and shares a device among them if it has one.
    Hypervisor,
    /// The driver of a virtual machine.
    Guest,
    /// A device that does the DMA it is asked for.
    Device,
}

/// What the measurement says on the command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Which peer.
    #[arg(long)]
    part: Part,
    /// Where the server listens.
    #[arg(long)]
    pub(super) server: String,
    /// Its name.
    #[arg(long)]
    pub(super) name: String,
    /// Of a guest: which virtual machine.
    #[arg(long)]
    pub(super) owner: Option<Owner>,
    /// Of a guest: its device; of a device: where it is; of a hypervisor: what it shares.
    #[arg(long)]
    pub(super) device: Option<DeviceAddress>,
    /// Of a hypervisor: a virtual machine, and the device that is assigned to it: NAME=ADDRESS.
    #[arg(long)]
    pub(super) guest: Vec<String>,
    /// Of a hypervisor: the last virtual machine has limits on its rates.
    #[arg(long)]
    pub(super) limited: bool,
    /// Runs at the lowest priority.
    #[arg(long)]
    humble: bool,
}

enum Actor {
    Machines(Machines),
    Guest(Box<Guest>),
    Device(Generator),
}

/// Plays the part until standard input ends.
pub(crate) async fn play(options: &Options) -> anyhow::Result<()> {
    if options.humble {
        rustix::process::nice(LOWEST).context("lower the priority")?;
    }
    let mut actor = match options.part {
        Part::Hypervisor => Actor::Machines(Machines::start(options).await?),
        Part::Guest => Actor::Guest(Box::new(Guest::start(options).await?)),
        Part::Device => Actor::Device(Generator::start(options).await?),
    };
    let vms = if let Actor::Machines(machines) = &actor { machines.numbers() } else { Vec::new() };
    tell(&Told::Ready { vms })?;
    let mut asked = lines();
    while let Some(line) = asked.recv().await {
        let line = line.context("read what is asked")?;
        let ask: Ask = serde_json::from_str(&line).with_context(|| format!("asked {line:?}"))?;
        let told = match &mut actor {
            Actor::Machines(machines) => machines.answer(&ask),
            Actor::Guest(guest) => guest.answer(ask).await,
            Actor::Device(device) => device.answer(ask).await,
        };
        tell(&told.unwrap_or_else(|error| Told::Failed { why: format!("{error:#}") }))?;
    }
    Ok(())
}

/// Standard input, line by line. A thread of its own reads it, and ends with the process.
fn lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

fn tell(told: &Told) -> anyhow::Result<()> {
    crate::print(&(serde_json::to_string(told).context("write an answer as JSON")? + "\n"))
}
