//! The operating system of a bare machine that never turns translation on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use guest_sdk::{BareClient, BareMachine, Connection, MachineDevice};
use rogue::text::Hex;

use super::language::{Ask, Refused, Reply};
use super::nonsense;

/// Global status (VT-d 5.10 §11.4.4.2) and fault status (§11.4.7.1).
const GSTS: u32 = 0x1c;
const FSTS: u32 = 0x34;

/// A session, and its machine.
pub(super) struct System {
    client: BareClient,
    machine: Option<BareMachine>,
    interrupts: Arc<AtomicU64>,
}

impl System {
    pub(super) async fn open(connection: Connection, name: &str) -> anyhow::Result<Self> {
        let client = connection.bare(name).await.context("open a session for bare machines")?;
        Ok(Self { client, machine: None, interrupts: Arc::default() })
    }

    fn machine(&self) -> Result<&BareMachine, Refused> {
        self.machine.as_ref().ok_or_else(|| nonsense("there is no machine yet"))
    }

    pub(super) async fn obey(&mut self, ask: Ask) -> Result<Reply, Refused> {
        match ask {
            Ask::Machine { bytes, devices } => {
                let device = |(source, name): (String, String)| -> Result<MachineDevice, Refused> {
                    Ok(MachineDevice { source_id: source.parse().map_err(nonsense)?, name })
                };
                let devices = devices.into_iter().map(device).collect::<Result<_, _>>()?;
                let machine = self.client.create(bytes, None, devices).await?;
                let mut watch = machine.watch_interrupts().await?;
                let counted = Arc::clone(&self.interrupts);
                tokio::spawn(async move {
                    while let Some(Ok(_)) = watch.next().await {
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                });
                let segment = machine.segment().into();
                self.machine = Some(machine);
                Ok(Reply::value(segment))
            }
            Ask::Interrupts => Ok(Reply::value(self.interrupts.load(Ordering::Relaxed))),
            Ask::Unit => {
                let machine = self.machine()?;
                let (faults, status) = (machine.read32(FSTS).await?, machine.read32(GSTS).await?);
                Ok(Reply { value: faults.into(), further: status.into(), ..Reply::default() })
            }
            Ask::Read { gpa, bytes } => {
                let read = self.machine()?.read_memory(gpa.0, bytes).await?;
                Ok(Reply { bytes: Hex(read.to_vec()), ..Reply::default() })
            }
            Ask::Write { gpa, data } => {
                self.machine()?.write_memory(gpa.0, data.0).await?;
                Ok(Reply::default())
            }
            other => Err(nonsense(other)),
        }
    }
}
