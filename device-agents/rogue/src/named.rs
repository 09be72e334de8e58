//! Attacks by name, for a person at a terminal: each is a few commands of the [language](crate::language).

use clap::ValueEnum;

use crate::language::{
    Answer, Claim, Command, Connect, Counted, Dma, End, Flood, GuessInterrupts, Kind, Msi, Scan,
};
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
    /// Told to the device; what it comes to is a [verdict].
    Tell(Command),
    /// The same, to make ready. Where that [leaves nothing to go on with](is_ready), a refused write included, the attack was not made.
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

/// What an attack came to; of several steps, the last of these that any of them came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// It was told no.
    Refused,
    /// Nobody said anything: it was not carried out, or not to its end. That holds nothing against the server, and nothing for it.
    NotMade,
    /// Something was done that an attacker wanted.
    GotThrough,
}

/// Ends of a session that refuse what was tried in it: the identity that was claimed, or what was sent. Every other end has to do with the
/// connection, its certificate (which is the attacker's own, whatever it claims), a newer session, or the server itself.
const REFUSALS: [&str; 4] =
    ["IDENTITY_REFUSED", "PROTOCOL_VIOLATION", "MALFORMED_MESSAGE", "MESSAGE_TOO_LARGE"];

/// The same where many operations were sent. For a connection alone, it says that the server is full.
const TOO_MANY: &str = "LIMIT_REACHED";

fn ended(end: &End, after_many: bool) -> Verdict {
    let reason = end.reason.as_str();
    let is_refusal = REFUSALS.contains(&reason) || (after_many && reason == TOO_MANY);
    if is_refusal { Verdict::Refused } else { Verdict::NotMade }
}

/// What an answer says of the attack that it was given to.
pub fn verdict(answer: &Answer, looks_for_canary: bool) -> Verdict {
    let got_through = match answer {
        Answer::Connected { .. } | Answer::Done { .. } => true,
        Answer::Batch { succeeded, .. } => *succeeded > 0,
        Answer::Scanned { canary_at, .. } if looks_for_canary => !canary_at.is_empty(),
        Answer::Scanned { answered, .. } => *answered > 0,
        Answer::Counted(counted) => counted.succeeded > 0,
        _ => false,
    };
    match answer {
        _ if got_through => Verdict::GotThrough,
        Answer::Ended(end) => ended(end, false),
        Answer::Scanned { ended: Some(end), .. } | Answer::Counted(Counted { ended: Some(end), .. }) => {
            ended(end, true)
        }
        Answer::Wrong { .. } => Verdict::NotMade,
        _ => Verdict::Refused,
    }
}

/// Whether an answer to what [makes ready](Step::Prepare) leaves anything to go on with.
pub fn is_ready(answer: &Answer) -> bool {
    !matches!(answer, Answer::Ended(_) | Answer::Wrong { .. } | Answer::Fault(_))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::language::Fault;

    #[test]
    fn what_was_not_tried_was_not_refused() {
        let end = |reason: &str| End { reason: reason.to_owned(), message: String::new() };
        let counted = |succeeded, reason: Option<&str>| {
            Answer::Counted(Counted { succeeded, ended: reason.map(end), ..Counted::default() })
        };
        let scanned = |answered, canary_at, reason: Option<&str>| Answer::Scanned {
            tried: 9,
            answered,
            answered_at: Vec::new(),
            canary_at,
            refused: [("0x6".to_owned(), 9 - answered)].into(),
            ended: reason.map(end),
        };
        let fault = Answer::Fault(Fault { index: 0, reason: Address(6), iova: Address(0), done_bytes: 0 });
        for (answer, expected) in [
            (Answer::Done { data: Hex(vec![1]) }, Verdict::GotThrough),
            (counted(1, Some("CONNECTION")), Verdict::GotThrough),
            (scanned(3, vec![Address(0)], None), Verdict::GotThrough),
            (scanned(3, vec![Address(0)], Some("CONNECTION")), Verdict::GotThrough),
            (scanned(3, Vec::new(), None), Verdict::Refused),
            (scanned(3, Vec::new(), Some("PROTOCOL_VIOLATION")), Verdict::Refused),
            (scanned(3, Vec::new(), Some("CONNECTION")), Verdict::NotMade),
            (fault.clone(), Verdict::Refused),
            (counted(0, None), Verdict::Refused),
            (counted(0, Some("LIMIT_REACHED")), Verdict::Refused),
            (Answer::Ended(end("IDENTITY_REFUSED")), Verdict::Refused),
            (Answer::Ended(end("PROTOCOL_VIOLATION")), Verdict::Refused),
            (counted(0, Some("NO_ANSWER")), Verdict::NotMade),
            // To a connection it says that the server is full, not that the identity is another's.
            (Answer::Ended(end("LIMIT_REACHED")), Verdict::NotMade),
            (Answer::Wrong { why: String::new() }, Verdict::NotMade),
        ] {
            assert_eq!(verdict(&answer, true), expected, "{answer:?}");
        }
        for reason in [
            "CONNECTION",
            "CREDENTIAL",
            "NO_ANSWER",
            "CLOSED",
            "SHUTTING_DOWN",
            "SESSION_FENCED",
            "STREAM_STALLED",
            "UNKNOWN_DEVICE",
            "CERTIFICATE_EXPIRED",
            "CERTIFICATE_REVOKED",
            "VERSION_MISMATCH",
            "INTERNAL",
            "A_REASON_OF_TOMORROW",
        ] {
            for answer in
                [Answer::Ended(end(reason)), counted(0, Some(reason)), scanned(3, Vec::new(), Some(reason))]
            {
                assert_eq!(verdict(&answer, true), Verdict::NotMade, "{answer:?}");
            }
        }
        for answer in [fault, Answer::Ended(end("IDENTITY_REFUSED")), Answer::Wrong { why: String::new() }] {
            assert!(!is_ready(&answer), "{answer:?}");
        }
        assert!(is_ready(&Answer::Queued { waiting: 1 }) && is_ready(&Answer::Done { data: Hex(vec![]) }));
    }
}
