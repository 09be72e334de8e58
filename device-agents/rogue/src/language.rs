//! What the hostile device can be told, and what it answers: one line of JSON each.
//!
//! A command names itself in `do`, an answer in `is`. Addresses are written `"0x1000"` or as numbers, bytes as hexadecimal digits.

mod answers;
mod operations;
mod session;

use serde::{Deserialize, Serialize};

pub use answers::{Answer, Counted, End, Fault, Status};
pub use operations::{Claim, Dma, Flood, GuessInterrupts, Hammer, Kind, Msi, Raw, Scan, Steady};
pub use session::{Behave, Connect, MmioAnswer, Obedience, Reading, Tag};

/// What it is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Says Hello on a new stream, as anybody. A stream that stands is dropped first.
    Connect(Connect),
    /// Drops the stream without a word.
    Disconnect,
    /// One operation.
    Dma(Dma),
    /// A batch as it is, column by column, however wrong.
    Raw(Raw),
    /// Sends what was queued with `later`, under the generation that each was queued with.
    Release,
    /// Sends the last write once more, byte for byte as it was, its generation included.
    Replay,
    /// Reads (or writes) at one address after the other.
    Scan(Scan),
    /// A write to an interrupt address.
    Msi(Msi),
    /// Remappable interrupts with one index after the other.
    GuessInterrupts(GuessInterrupts),
    /// Writes to addresses again and again in the background, until `hammer_stop`.
    Hammer(Hammer),
    /// Ends the hammer, and tells what came of it.
    HammerStop,
    /// Batches as fast as they go.
    Flood(Flood),
    /// Batches one behind the other for a while, with rates and latencies.
    Steady(Steady),
    /// Whether it reads its stream.
    Reading(Reading),
    /// How it answers resets and registers.
    Behave(Behave),
    /// Says that a reset is done: one that was asked for, or none.
    ResetDone(Tag),
    /// Answers a register access: one that was made, or none.
    MmioAnswer(MmioAnswer),
    /// Says Hello once more in the middle of the stream.
    Hello(Connect),
    /// What it knows of itself.
    Status,
    /// Ends the program.
    Quit,
}
