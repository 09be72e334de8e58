//! Reading and writing the memory of an owner.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use guest_sdk::{Gpa, Operator};
use serde_json::json;

use crate::args::MemoryCommand;
use crate::json::hex;
use crate::print::Output;
use crate::words::hex_dump;

/// What one command reads at most: it is held in memory here.
const READ_BYTES_MAX: u64 = 1 << 30;
/// What one command writes at most.
const WRITE_BYTES_MAX: u64 = 1 << 30;

pub(crate) async fn run(operator: &Operator, out: Output, command: &MemoryCommand) -> anyhow::Result<()> {
    match command {
        MemoryCommand::Read { owner, gpa, size, output } => {
            if *size > READ_BYTES_MAX {
                bail!("SIZE: {size} bytes are more than one command reads ({READ_BYTES_MAX}); read in parts");
            }
            let bytes = operator.memory(*owner).read(Gpa::new(*gpa), *size).await?;
            match output {
                Some(path) => save(path, &bytes),
                None => {
                    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                    let value = json!({ "owner": owner.to_string(), "gpa": hex(*gpa), "hex": text });
                    out.page(&value, || hex_dump(*gpa, &bytes));
                    Ok(())
                }
            }
        }
        MemoryCommand::Write { owner, gpa, hex: text, input } => {
            let bytes = match (text, input) {
                (Some(text), _) => from_hex(text).context("--hex")?,
                (None, Some(path)) => load(path)?,
                (None, None) => bail!("give the bytes with --hex or --input"),
            };
            let written_bytes = bytes.len();
            operator.memory(*owner).write(Gpa::new(*gpa), bytes).await?;
            let value =
                json!({ "owner": owner.to_string(), "gpa": hex(*gpa), "written_bytes": written_bytes });
            out.line(&value, || format!("wrote {written_bytes} bytes at gpa:{gpa:#x} of {owner}"));
            Ok(())
        }
    }
}

fn save(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    if path == Path::new("-") {
        crate::print::write(bytes);
        return Ok(());
    }
    std::fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
}

fn load(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = WRITE_BYTES_MAX + 1;
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes))
    };
    read.with_context(|| format!("read {}", path.display()))?;
    if bytes.len() as u64 > WRITE_BYTES_MAX {
        bail!("{} has more bytes than one command writes ({WRITE_BYTES_MAX})", path.display());
    }
    Ok(bytes)
}

pub(crate) fn from_hex(text: &str) -> anyhow::Result<Vec<u8>> {
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace() && *byte != b':').collect();
    if digits.len() % 2 == 1 {
        bail!("an odd number of digits");
    }
    digits
        .chunks(2)
        .map(|pair| {
            let digit = |byte: u8| char::from(byte).to_digit(16).context("not a hexadecimal digit");
            Ok((digit(pair[0])? << 4 | digit(pair[1])?) as u8)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_text_becomes_bytes() {
        assert_eq!(from_hex("00ff 10:aB").ok(), Some(vec![0, 0xff, 0x10, 0xab]));
        for bad in ["0", "xx", "0g", "é0"] {
            assert!(from_hex(bad).is_err(), "{bad}");
        }
    }
}
