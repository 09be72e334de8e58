//! The binary: lines in, lines out.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use iommu_proto::channel::{DEFAULT_ENDPOINT, Dial};
use iommu_proto::credentials::Credentials;
use iommu_types::DeviceAddress;
use rogue::device::Device;
use rogue::language::{Answer, Command, Connect};
use rogue::lines::Lines;
use rogue::named::{Aim, Attack, Step, Verdict, is_ready, verdict};
use rogue::text::{Address, Hex};

const ABOUT: &str = "A hostile PCI device: it says on the wire whatever it is told to say";

const TEACH: &str = r#"This process claims to be a PCI function of an iommu-server and attacks it. It reads one JSON object a line on standard input and answers each with one on
standard output; whoever writes the lines decides when what happens. Nothing is done by itself.

COMMANDS
  {"do":"connect","name":"engine0","address":"00:01.0"}         Hello, as anybody
  {"do":"dma","kind":"write","iova":"0x1000","data":"cafe"}     read, write, posted_write, fetch_add, swap, cas; "size", "fill", "pasid",
                                                                "address_type":2 (already translated), "generation":{"number":7}
                                                                (or current, absent, welcome, told, {"ahead":-1}), "later":true
  {"do":"release"}                                              sends what was queued with "later"
  {"do":"replay"}                                               the last write once more
  {"do":"raw","iova":["0x1000"],"size":[4,4],"kind":"ff"}       a batch with any columns; "payload", "zeros", "repeat", "first_tag"
  {"do":"scan","from":"0x0","to":"0xff000","stride":"0x1000","size":64,"canary":"deadbeef"}
  {"do":"msi","address":"0xfee00000","data":"30000000"}         an interrupt, forged
  {"do":"guess_interrupts","from":0,"to":255}
  {"do":"hammer","iova":["0x1000"],"size":64,"fill":102}        in the background, until {"do":"hammer_stop"}
  {"do":"flood","kind":"write","iova":"0x1000","size":64,"operations":64,"batches":1000,"in_flight":200}
  {"do":"steady","iova":"0x1000","span":4096,"size":64,"operations":32,"milliseconds":1000}
  {"do":"reading","on":false}                                   does not read its stream any more
  {"do":"behave","resets":"hold","registers":"answer"}          answer, or hold (for ever, or until it is told:)
  {"do":"reset_done"}  {"do":"mmio_answer","value":1}           to what is held, or with a "tag" to what nobody asked
  {"do":"hello","name":"engine1","address":"00:02.0"}           a second Hello
  {"do":"status"}  {"do":"disconnect"}  {"do":"quit"}

ANSWERS
  {"is":"connected",...} {"is":"ended","reason":"IDENTITY_REFUSED",...} {"is":"done","data":"..."} {"is":"fault","reason":"0x5",...}
  {"is":"batch",...} {"is":"scanned","canary_at":[...],...} {"is":"counted",...} {"is":"measured",...} {"is":"status",...} {"is":"well"}
  {"is":"queued",...} {"is":"wrong","why":"..."}

EXAMPLES
  printf '%s\n' '{"do":"connect","name":"engine2","address":"00:03.0"}' '{"do":"dma","iova":"0x1000","size":8}' | rogue
  rogue attack scan --name engine0 --address 00:01.0 --iova 0xff000000 --canary 736563726574
  rogue attack spoof --name engine0 --address 00:01.0

EXIT CODES
   0  the lines ended, or it was told to quit, or nobody reads its answers any more; an attack was refused
   1  an attack got through
  64  the command line is wrong
  65  a line is longer than 5 MiB, or what came is not text in lines
  69  an attack did not take place: no session, no answer, or it could not be made ready"#;

#[derive(Parser)]
#[command(name = "rogue", version, about = ABOUT, after_long_help = TEACH, after_help = "`rogue --help` teaches the language.")]
struct Cli {
    /// Where the server listens: https://HOST:PORT, http://HOST:PORT (plaintext) or unix:///PATH
    #[arg(long, env = "IOMMU_SERVER", default_value = DEFAULT_ENDPOINT, global = true)]
    server: String,
    /// Directory with ca.crt and the certificates of peers [default: $XDG_STATE_HOME/iommu/pki or ~/.local/state/iommu/pki]
    #[arg(long, env = "IOMMU_PKI", value_name = "DIR", global = true)]
    pki: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Once>,
}

#[derive(Subcommand)]
enum Once {
    /// One attack by name; every answer is printed
    Attack {
        /// Which
        attack: Attack,
        /// The name that it claims
        #[arg(long)]
        name: String,
        /// The address that it claims
        #[arg(long)]
        address: DeviceAddress,
        /// Where it strikes
        #[arg(long, default_value = "0x1000")]
        iova: Address,
        /// What a scan looks for, as hexadecimal digits
        #[arg(long)]
        canary: Option<Hex>,
    },
}

const USAGE: u8 = 64;
const BAD_LINES: u8 = 65;
const UNAVAILABLE: u8 = 69;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nobody listens when even this cannot be printed.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let credentials = Credentials::from_flags(cli.pki, None, None);
    // Who connects is told later; whether the endpoint can be connected to does not depend on it.
    let somebody = Connect::new("rogue", DeviceAddress::default());
    if let Err(bad) = Dial::to(&cli.server, &credentials, &somebody.shown()) {
        say_wrong(&bad.to_string());
        return ExitCode::from(USAGE);
    }
    let device = Device::new(&cli.server, credentials);
    let ended = match cli.command {
        None => obey(device).await,
        Some(Once::Attack { attack, name, address, iova, canary }) => {
            let aim = Aim { connect: Connect::new(&name, address), iova, canary };
            strike(device, attack, &aim).await
        }
    };
    ended.unwrap_or_else(|error| {
        say_wrong(&format!("{error:#}"));
        ExitCode::from(BAD_LINES)
    })
}

#[expect(clippy::print_stderr, reason = "the one place that tells a person what is wrong")]
fn say_wrong(why: &str) {
    eprintln!("rogue: {why}");
}

/// Answers line by line until the lines end.
async fn obey(mut device: Device) -> anyhow::Result<ExitCode> {
    let mut lines = Lines::of_stdin();
    while let Some(line) = lines.next().await? {
        if line.trim().is_empty() {
            continue;
        }
        let answer = match serde_json::from_str::<Command>(&line) {
            Ok(command) => match device.obey(command).await {
                Some(answer) => answer,
                None => break,
            },
            Err(error) => Answer::Wrong { why: format!("{error}; `rogue --help` teaches the language") },
        };
        if !print(&answer)? {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints an answer; `false` when nobody reads them any more.
fn print(answer: &Answer) -> anyhow::Result<bool> {
    let line = serde_json::to_string(answer)?;
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        written => Ok(written.map(|()| true)?),
    }
}

async fn strike(mut device: Device, attack: Attack, aim: &Aim) -> anyhow::Result<ExitCode> {
    let mut lines = Lines::of_stdin();
    let mut worst = Verdict::Refused;
    for step in attack.steps(aim) {
        let (command, is_verdict) = match step {
            Step::Wait(what) => {
                say_wrong(what);
                lines.next().await?;
                continue;
            }
            Step::Tell(command) => (command, true),
            Step::Prepare(command) => (command, false),
        };
        let Some(answer) = device.obey(command).await else { break };
        // Whoever does not read the answers is told by the exit code.
        print(&answer)?;
        if is_verdict {
            worst = worst.max(verdict(&answer, aim.canary.is_some()));
        } else if !is_ready(&answer) {
            worst = Verdict::NotMade;
            break;
        }
    }
    Ok(match worst {
        Verdict::Refused => ExitCode::SUCCESS,
        Verdict::NotMade => ExitCode::from(UNAVAILABLE),
        Verdict::GotThrough => ExitCode::FAILURE,
    })
}
