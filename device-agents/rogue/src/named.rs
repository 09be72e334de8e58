//! Attacks by name, for a person at a terminal: each is a few commands of the [language](crate::language).

use clap::ValueEnum;

use crate::language::{Answer, Claim, Command, Connect, Dma, Flood, GuessInterrupts, Kind, Msi, Scan};
use crate::text::{Address, Hex};

/// An attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Attack {
    /// Read 64 bytes at each page from --iova on, 4,096 pages, and look for --canary
    Scan,
    /// Write to --iova, wait for a line on standard input (unmap it meanwhile), and send the same write again
    Replay,
    /// Raise interrupts that are nobody's and everybody's: compatibility format, and 256 guessed indices
    ForgeMsi,
    /// Read at --iova as a device that claims to have translated the address itself
    AlreadyTranslated,
    /// 1,024 batches of 64 writes to --iova, twice as many in flight as there are credits
    Flood,
    /// With the certificate of --name, say Hello at another function of the same device, and then under another name
    Spoof,
    /// Queue a write to --iova, wait for a line on standard input (reset or reassign the device meanwhile), and send it late
    LateDma,
}

/// What an attack is aimed at.
#[derive(Clone, Debug)]
pub struct Aim {
    /// As whom.
    pub connect: Connect,
    /// Where.
    pub iova: Address,
    /// What is looked for.
    pub canary: Option<Hex>,
}

/// A step of an attack.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Told to the device; what must not come is [got through](got_through).
    Tell(Command),
    /// The same, to make ready: what it comes to is no verdict.
    Prepare(Command),
    /// Waits for a line on standard input.
    Wait(&'static str),
}

impl Attack {
    /// What it does, in order.
    pub fn steps(self, aim: &Aim) -> Vec<Step> {
        use Step::{Prepare, Tell, Wait};
        let connect = Prepare(Command::Connect(aim.connect.clone()));
        let iova = aim.iova.0;
        let write =
            || Dma { size: Some(64), fill: 0x66, kind: Kind::Write, iova: aim.iova, ..Dma::default() };
        match self {
            Self::Scan => {
                let to = Address(iova.saturating_add(4095 * 4096));
                let (from, stride, canary) = (aim.iova, Address(4096), aim.canary.clone());
                vec![connect, Tell(Command::Scan(Scan { from, to, stride, size: 64, canary, write: None }))]
            }
            Self::Replay => vec![
                connect,
                Prepare(Command::Dma(write())),
                Wait("written; unmap it, then press Enter"),
                Tell(Command::Replay),
            ],
            Self::ForgeMsi => vec![
                connect,
                Tell(Command::Msi(Msi { address: Address(0xfee0_0000), data: Hex(vec![0x30, 0, 0, 0]) })),
                Tell(Command::GuessInterrupts(GuessInterrupts { from: 0, to: 255 })),
            ],
            Self::AlreadyTranslated => {
                vec![connect, Tell(Command::Dma(Dma { address_type: 2, ..Dma::read(iova, 64) }))]
            }
            Self::Flood => vec![
                connect,
                Tell(Command::Flood(Flood {
                    kind: Kind::Write,
                    iova: aim.iova,
                    stride: Address(0),
                    span: 0,
                    size: 64,
                    operations: 64,
                    batches: 1024,
                    in_flight: Some(128),
                })),
            ],
            Self::Spoof => {
                let mut other = aim.connect.shown_as(&aim.connect);
                other.address.source_id = iommu_types::SourceId::new(other.address.source_id.get() ^ 1);
                let nobody = Connect { name: "nobody".to_owned(), ..aim.connect.shown_as(&aim.connect) };
                vec![Tell(Command::Connect(other)), Tell(Command::Connect(nobody))]
            }
            Self::LateDma => vec![
                connect,
                Prepare(Command::Dma(Dma { later: true, generation: Claim::Welcome, ..write() })),
                Wait("queued; reset or reassign the device, then press Enter"),
                Tell(Command::Release),
            ],
        }
    }
}

/// Whether an answer says that something was done that an attacker wanted.
pub fn got_through(answer: &Answer, looks_for_canary: bool) -> bool {
    match answer {
        Answer::Connected { .. } | Answer::Done { .. } => true,
        Answer::Batch { succeeded, .. } => *succeeded > 0,
        Answer::Scanned { canary_at, .. } if looks_for_canary => !canary_at.is_empty(),
        Answer::Scanned { answered, .. } => *answered > 0,
        Answer::Counted(counted) => counted.succeeded > 0,
        _ => false,
    }
}
