//! What an attack did, as its driver saw it: in memory, at the device, in the fault log, through the sanitizer.

use std::fmt;
use std::time::Duration;

use guest_sdk::{FaultRecord, MappingLife, SanitizerReport};
use iommu_types::{Fault, FaultReason};
use serde::{Deserialize, Serialize};

use super::expected::{Expected, Fate, Report};
use crate::engine::Ended;
use crate::records::record_line;

/// What became of the canary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Memory {
    /// It is as the CPU wrote it.
    Intact,
    /// The device's bytes stand where it wrote, and the rest is intact.
    Overwritten,
    /// Something else.
    Otherwise,
}

impl Memory {
    /// What a buffer with a canary holds now, where the device wrote `written` at its beginning.
    pub(crate) fn of(content: &[u8], canary: &[u8], written: &[u8]) -> Self {
        if content == canary {
            return Self::Intact;
        }
        let rest = written.len()..;
        match (content.strip_prefix(written), canary.get(rest)) {
            (Some(behind), Some(canary)) if behind == canary => Self::Overwritten,
            _ => Self::Otherwise,
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Intact => "intact",
            Self::Overwritten => "OVERWRITTEN",
            Self::Otherwise => "CHANGED OTHERWISE",
        })
    }
}

/// A fault record, in short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recorded {
    pub(crate) sequence: u64,
    pub(crate) reason: u8,
    /// The address; `None` for a refused interrupt.
    pub(crate) iova: Option<u64>,
    pub(crate) text: String,
}

impl Recorded {
    pub(crate) fn of(record: &FaultRecord) -> Self {
        let iova = match record.fault {
            Fault::Dma(fault) => Some(fault.iova.get()),
            Fault::Interrupt(_) => None,
        };
        let reason = record.fault.reason().0;
        Self { sequence: record.sequence, reason, iova, text: record_line(record) }
    }
}

/// Birth and death of the mapping, as the sanitizer knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Life {
    pub(crate) born_by_request: u64,
    pub(crate) died_by_request: Option<u64>,
    pub(crate) lived_us: Option<u64>,
}

impl Life {
    fn of(life: &MappingLife) -> Self {
        Self {
            born_by_request: life.born_by.0,
            died_by_request: life.death.map(|(_, request)| request.0),
            lived_us: life.death.map(|(at_us, _)| at_us.saturating_sub(life.born_at_us)),
        }
    }
}

/// A report of the sanitizer, in short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reported {
    pub(crate) class: String,
    pub(crate) meaning: String,
    pub(crate) violation: Option<String>,
    pub(crate) blame: String,
    /// Why the unit refused the access; `None` when it let it through.
    pub(crate) refused: Option<u8>,
    /// After the unmap, in microseconds.
    pub(crate) age_us: Option<u64>,
    pub(crate) mapping: Option<Life>,
    pub(crate) repeats: u32,
}

impl Reported {
    pub(crate) fn of(report: &SanitizerReport) -> Self {
        Self {
            class: report.class.name().to_owned(),
            meaning: report.class.meaning().to_owned(),
            violation: report.violation.map(|violation| violation.to_string()),
            blame: report.blame.to_string(),
            refused: report.access.and_then(|access| access.refused).map(|reason| reason.0),
            age_us: report.age_us,
            mapping: report.mapping.as_ref().map(Life::of),
            repeats: report.repeats,
        }
    }

    fn violation(&self) -> &str {
        self.violation.as_deref().unwrap_or("no kind of fault")
    }

    /// What differs from what must be reported.
    fn differs(&self, expected: &Report, refused: Option<FaultReason>, since_unmap_us: u64) -> Vec<String> {
        let violation = expected.violation.map(|violation| violation.to_string());
        let mut wrong = Vec::new();
        let mut check = |holds: bool, what: String| {
            if !holds {
                wrong.push(what);
            }
        };
        check(self.class == expected.class.name(), format!("reported as {}", self.class));
        check(self.violation == violation, format!("reported as {}", self.violation()));
        check(self.blame == expected.blame.to_string(), format!("blame on {}", self.blame));
        check(self.refused == refused.map(|reason| reason.0), "reported with another end".to_owned());
        check(self.repeats == 0, format!("reported {} times", u64::from(self.repeats) + 1));
        if expected.class == guest_sdk::ReportClass::UseAfterUnmap {
            let age = self.age_us.map(Duration::from_micros);
            let within = age.is_some_and(|age| {
                (expected.age_min..=expected.age_max).contains(&age) && age <= Duration::from_micros(since_unmap_us)
            });
            check(within, format!("reported with an age of {age:?}"));
        }
        wrong
    }

    /// In lines for a person.
    pub(crate) fn lines(&self) -> Vec<String> {
        let age = self.age_us.map_or_else(String::new, |age| format!(", {} after the unmap", duration(age)));
        let kind = self.violation.as_deref().map_or_else(String::new, |violation| format!("{violation}, "));
        let mut lines = vec![format!("sanitizer {}: {kind}blame {}{age}", self.class, self.blame)];
        if let Some(Life { born_by_request, died_by_request: Some(died), lived_us: Some(lived) }) = self.mapping {
            lines.push(format!(
                "          the mapping was made by request {born_by_request} and removed by request {died}, {} later",
                duration(lived)
            ));
        }
        lines
    }
}

/// Microseconds, as a person reads them.
fn duration(us: u64) -> String {
    match us {
        0..10_000 => format!("{us} µs"),
        _ => format!("{} ms", us / 1000),
    }
}

/// What came of one attack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// Mode and parameters; `None` where translation is off.
    pub(crate) mode: Option<String>,
    /// By page or by byte.
    pub(crate) granularity: Option<String>,
    pub(crate) memory: Memory,
    /// What the device's registers say.
    pub(crate) device: Ended,
    pub(crate) recorded: Option<Recorded>,
    /// Every report that the attack caused; `None` where no sanitizer looks.
    pub(crate) sanitizer: Option<Vec<Reported>>,
    /// Invalidations that were asked for between the unmap and the attack.
    pub(crate) invalidations: u64,
    /// For what one is asked.
    pub(crate) per: String,
    /// From the request for the unmap to the end of the attack, by the driver's clock.
    pub(crate) since_unmap_us: u64,
}

impl Seen {
    /// Everything that is not as it must be; nothing when all is.
    pub(crate) fn differs(&self, expected: &Expected) -> Vec<String> {
        let refused = match expected.fate {
            Fate::Refused(reason) => Some(reason),
            Fate::Lands | Fate::Deflected => None,
        };
        let memory = if expected.fate == Fate::Lands { Memory::Overwritten } else { Memory::Intact };
        let mut wrong = Vec::new();
        if self.memory != memory {
            wrong.push(format!("memory {}", self.memory));
        }
        if self.device.reason != refused.map_or(0, |reason| reason.0.into())
            || self.device.is_error() != refused.is_some()
        {
            wrong.push(format!("the device was told {}", self.device));
        }
        if self.recorded.as_ref().map(|record| record.reason) != refused.map(|reason| reason.0) {
            wrong.push(format!("recorded {}", self.hardware()));
        }
        match (&self.sanitizer, &expected.report) {
            (None, None) => {}
            (Some(reports), Some(expected)) => match reports.as_slice() {
                [report] => wrong.extend(report.differs(expected, refused, self.since_unmap_us)),
                others => wrong.push(format!("{} reports", others.len())),
            },
            _ => wrong.push("a sanitizer where there is none, or none where there is one".to_owned()),
        }
        if self.invalidations != expected.invalidations.0 {
            wrong.push(format!("{} invalidations", self.invalidations));
        }
        wrong
    }

    /// What the unit recorded, in short.
    pub(crate) fn hardware(&self) -> String {
        match &self.recorded {
            Some(record) => format!("refused, {:#04x}", record.reason),
            None => "nothing".to_owned(),
        }
    }

    /// What the sanitizer reported, in short.
    pub(crate) fn sanitizer_in_short(&self) -> String {
        let Some(reports) = &self.sanitizer else { return "(none)".to_owned() };
        let Some(report) = reports.first() else { return "nothing".to_owned() };
        let age = report.age_us.map_or_else(String::new, |age| format!(", after {}", duration(age)));
        format!("{}, {}{age}", report.class, report.violation())
    }

    /// What the mode asked of the unit for it.
    pub(crate) fn cost(&self) -> String {
        format!("{} per {}", self.invalidations, self.per)
    }

    /// What came, in lines for a person.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("memory    the canary is {}", self.memory)];
        lines.push(format!("device    {}", self.device));
        lines.push(match &self.recorded {
            Some(record) => format!("hardware  recorded {}", record.text),
            None => "hardware  recorded nothing".to_owned(),
        });
        match &self.sanitizer {
            None => lines.push("sanitizer there is none".to_owned()),
            Some(reports) if reports.is_empty() => lines.push("sanitizer reported nothing".to_owned()),
            Some(reports) => lines.extend(reports.iter().flat_map(Reported::lines)),
        }
        lines.push(format!("cost      {} ({} until this attack)", plural(self.invalidations), self.per));
        lines
    }
}

fn plural(invalidations: u64) -> String {
    if invalidations == 1 { "1 invalidation".to_owned() } else { format!("{invalidations} invalidations") }
}
