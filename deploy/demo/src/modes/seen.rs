//! What an attack did, as its driver saw it: in memory, at the device, in the fault log, through the sanitizer.

use std::fmt;
use std::time::Duration;

use guest_sdk::{FaultRecord, Iova, MappingLife, SanitizerReport};
use iommu_types::{Fault, FaultReason};
use serde::{Deserialize, Serialize};

use super::expected::{Expected, Fate, Report, invalidations};
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
                (expected.age_min..=expected.age_max).contains(&age)
                    && age <= Duration::from_micros(since_unmap_us)
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
        if let Some(Life { born_by_request, died_by_request: Some(died), lived_us: Some(lived) }) =
            self.mapping
        {
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
        0..1000 => format!("{us} µs"),
        1000..100_000 => format!("{}.{} ms", us / 1000, us % 1000 / 100),
        100_000..1_000_000 => format!("{} ms", us / 1000),
        _ => format!("{}.{:02} s", us / 1_000_000, us % 1_000_000 / 10_000),
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
        let recorded_at = self.recorded.as_ref().and_then(|record| record.iova);
        // A recorded address is that of a page (FI, VT-d 5.10 §11.4.7.6).
        if recorded_at.is_some_and(|iova| iova != Iova::new(self.device.address).page_base().get()) {
            wrong.push("recorded at another address than the device was told".to_owned());
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
            wrong.push(invalidations(self.invalidations));
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
        let age = report.age_us.map_or_else(String::new, |age| format!(", {}", duration(age)));
        format!("{} {}{age}", report.violation(), report.class)
    }

    /// Whom the sanitizer blames.
    pub(crate) fn blame(&self) -> String {
        let first = self.sanitizer.as_ref().and_then(|reports| reports.first());
        first.map_or_else(String::new, |report| report.blame.clone())
    }

    /// What the mode asked of the unit for it.
    pub(crate) fn cost(&self) -> String {
        format!("{} per {}", self.invalidations, self.per)
    }

    /// What came, in one line.
    pub(crate) fn in_short(&self) -> String {
        format!(
            "memory {}, hardware {}, sanitizer {}, {}",
            self.memory,
            self.hardware(),
            self.sanitizer_in_short(),
            self.cost()
        )
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
        lines.push(format!("cost      {} per {}", invalidations(self.invalidations), self.per));
        lines
    }
}

#[cfg(test)]
pub(super) mod tests {
    use dma_engine::registers::{STATUS_DONE, STATUS_ERROR};

    use super::*;
    use crate::modes::expected::Attack;

    /// What an attack shows when all is as it must be.
    pub(in crate::modes) fn as_expected(expected: &Expected) -> Seen {
        let refused = match expected.fate {
            Fate::Refused(reason) => Some(reason),
            Fate::Lands | Fate::Deflected => None,
        };
        let age_us = expected.report.map(|report| report.age_min.as_micros() as u64 + 5);
        let report = expected.report.map(|report| Reported {
            class: report.class.name().to_owned(),
            meaning: report.class.meaning().to_owned(),
            violation: report.violation.map(|violation| violation.to_string()),
            blame: report.blame.to_string(),
            refused: refused.map(|reason| reason.0),
            age_us,
            mapping: Some(Life { born_by_request: 5, died_by_request: Some(6), lived_us: Some(15_000) }),
            repeats: 0,
        });
        Seen {
            mode: Some("strict".to_owned()),
            granularity: Some("page".to_owned()),
            memory: if expected.fate == Fate::Lands { Memory::Overwritten } else { Memory::Intact },
            device: Ended {
                status: if refused.is_some() { STATUS_ERROR } else { STATUS_DONE },
                reason: refused.map_or(0, |reason| reason.0.into()),
                address: if refused.is_some() { 0x1040 } else { 0 },
                bytes_done: 0,
            },
            recorded: refused.map(|reason| Recorded {
                sequence: 1,
                reason: reason.0,
                iova: Some(0x1000),
                text: String::new(),
            }),
            sanitizer: report.map(|report| vec![report]),
            invalidations: expected.invalidations.0,
            per: expected.invalidations.1.to_owned(),
            since_unmap_us: age_us.unwrap_or_default() + 5,
        }
    }

    #[test]
    fn what_is_as_expected_passes_in_every_mode_and_only_in_a_like_one() {
        for attack in Attack::ALL {
            let expected = attack.expected();
            let seen = as_expected(&expected);
            assert_eq!(seen.differs(&expected), Vec::<String>::new(), "{}", attack.name());
            for other in Attack::ALL.map(Attack::expected) {
                let alike =
                    other.fate == expected.fate && other.report.is_some() == expected.report.is_some();
                assert!(alike || !seen.differs(&other).is_empty(), "{}: {other:?}", attack.name());
            }
        }
    }

    #[test]
    fn whatever_is_otherwise_is_seen() {
        type Change = fn(&mut Seen);
        fn report(seen: &mut Seen) -> &mut Reported {
            &mut seen.sanitizer.as_mut().expect("watched")[0]
        }
        let changes: [(&str, Change); 16] = [
            ("memory", |seen| seen.memory = Memory::Otherwise),
            ("told another reason", |seen| seen.device.reason ^= 0xf),
            ("told otherwise", |seen| seen.device.status ^= STATUS_ERROR),
            ("recorded or not", |seen| {
                seen.recorded = match seen.recorded {
                    Some(_) => None,
                    None => Some(Recorded { sequence: 1, reason: 5, iova: None, text: String::new() }),
                };
            }),
            ("recorded elsewhere", |seen| match &mut seen.recorded {
                Some(record) => record.iova = Some(0x2000),
                None => seen.memory = Memory::Otherwise,
            }),
            ("no report", |seen| seen.sanitizer = Some(Vec::new())),
            ("two reports", |seen| {
                let again = report(seen).clone();
                seen.sanitizer.as_mut().expect("watched").push(again);
            }),
            ("nobody looked", |seen| seen.sanitizer = None),
            ("class", |seen| report(seen).class = "overrun".to_owned()),
            ("violation", |seen| report(seen).violation = None),
            ("blame", |seen| report(seen).blame = "device".to_owned()),
            ("refused or not", |seen| report(seen).refused = Some(0xe)),
            ("no age", |seen| report(seen).age_us = None),
            ("older than the unmap", |seen| report(seen).age_us = Some(seen.since_unmap_us + 1)),
            ("repeated", |seen| report(seen).repeats = 1),
            ("invalidations", |seen| seen.invalidations += 1),
        ];
        for attack in Attack::ALL.into_iter().filter(|attack| attack.options().is_some()) {
            let expected = attack.expected();
            for (what, change) in changes {
                let mut seen = as_expected(&expected);
                change(&mut seen);
                assert_eq!(seen.differs(&expected).len(), 1, "{}: {what}", attack.name());
            }
        }
    }

    #[test]
    fn an_age_beyond_the_window_is_no_proof_of_a_stale_window() {
        let window = Attack::DeferredWithin.expected();
        let mut seen = as_expected(&window);
        let report = &mut seen.sanitizer.as_mut().expect("watched")[0];
        report.age_us = Some(u64::from(u32::MAX));
        seen.since_unmap_us = u64::MAX;
        assert_eq!(seen.differs(&window).len(), 1);
        let after = Attack::DeferredAfter.expected();
        let mut seen = as_expected(&after);
        seen.sanitizer.as_mut().expect("watched")[0].age_us = Some(10);
        assert_eq!(seen.differs(&after).len(), 1, "before the flush was due");
    }

    #[test]
    fn memory_is_intact_or_overwritten_where_the_device_wrote_and_nowhere_else() {
        for (content, memory) in [
            ("cccccccc", Memory::Intact),
            ("wwwwcccc", Memory::Overwritten),
            ("wwwcwccc", Memory::Otherwise),
            ("wwwccccc", Memory::Otherwise),
            ("wwwwwccc", Memory::Otherwise),
            ("wwwwccc", Memory::Otherwise),
            ("", Memory::Otherwise),
        ] {
            assert_eq!(Memory::of(content.as_bytes(), b"cccccccc", b"wwww"), memory, "{content}");
        }
    }

    #[test]
    fn durations_read_well() {
        for (us, text) in [
            (0, "0 µs"),
            (999, "999 µs"),
            (5_705, "5.7 ms"),
            (99_999, "99.9 ms"),
            (100_000, "100 ms"),
            (2_016_000, "2.01 s"),
        ] {
            assert_eq!(duration(us), text);
        }
    }

    #[test]
    fn what_was_seen_survives_the_way_to_the_parent() {
        for attack in Attack::ALL {
            let seen = as_expected(&attack.expected());
            let line = serde_json::to_string(&seen).expect("serialized");
            assert_eq!(serde_json::from_str::<Seen>(&line).expect("parsed"), seen);
        }
    }
}
