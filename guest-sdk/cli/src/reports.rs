//! Reports of the DMA sanitizer in words: in one line, and in sentences that tell what happened, to which mapping, who is to blame and
//! what to do.

use iommu_types::{Access, Blame, MappingLife, ReportClass, SanitizerReport, SeenAccess, Violation};

use crate::words::{count, duration, instant};

/// One report in one line.
pub(crate) fn line(report: &SanitizerReport) -> String {
    let SanitizerReport { sequence, owner, domain_id, .. } = report;
    let device = report.device.map_or_else(String::new, |device| format!("  {device}"));
    let at = instant(report.at_us);
    let what = match (&report.access, &report.mapping) {
        (Some(access), _) => {
            let SeenAccess { iova, size_bytes, access, refused, .. } = access;
            let refused = if refused.is_some() { ", refused" } else { "" };
            format!("  {access} of {} at {iova}{refused}", count(u64::from(*size_bytes), "byte"))
        }
        (None, Some(mapping)) => {
            format!("  mapping {} of {}", mapping.iova, count(mapping.size_bytes, "byte"))
        }
        (None, None) => String::new(),
    };
    let age = report.age_us.map_or_else(String::new, |us| format!(" {} after its unmap", duration(us)));
    let request = report.request_id.map_or_else(String::new, |id| format!("  request {}", id.0));
    let violation = report.violation.map_or_else(String::new, |violation| format!(" ({violation})"));
    let more = if report.repeats == 0 { String::new() } else { format!(" (+{} more)", report.repeats) };
    format!(
        "{sequence:>6}  {at}  {owner}, domain {domain_id}{device}  {}{what}{age}{request}  blame: {}{violation}{more}",
        report.class, report.blame
    )
}

/// One report in sentences, each on a line of its own.
pub(crate) fn sentences(report: &SanitizerReport) -> Vec<String> {
    let mut told = vec![format!(
        "Report {} of {}: {}; {}.",
        report.sequence,
        report.owner,
        report.class,
        report.class.meaning()
    )];
    told.push(happened(report));
    if report.repeats > 0 {
        told.push(format!("The same was seen {} more in a row.", count(report.repeats.into(), "time")));
    }
    match &report.mapping {
        Some(mapping) => told.extend(life(mapping, report)),
        None if report.access.is_some() => told.push("No mapping is known for that address.".to_owned()),
        None => {}
    }
    if let Some(age) = report.age_us {
        told.push(format!("The device came {} after the unmap.", duration(age)));
    }
    told.push(blame(report));
    if let Some(violation) = report.violation {
        told.push(kind(violation).to_owned());
    }
    told.push(format!("What to do: {}", remedy(report.class)));
    told
}

/// What was seen, and when.
fn happened(report: &SanitizerReport) -> String {
    let (at, domain) = (instant(report.at_us), report.domain_id);
    let device = report.device.map_or_else(|| "a device".to_owned(), |device| device.to_string());
    let request = report.request_id.map(|id| format!("request {} of {}", id.0, report.owner));
    match (&report.access, request) {
        (Some(access), _) => {
            let done = match access.access {
                Access::Read => "read",
                Access::Write => "wrote",
                Access::Atomic => "changed atomically",
            };
            let (asked, iova) = (count(access.size_bytes.into(), "byte"), access.iova);
            match access.refused {
                None => format!(
                    "At {at}, {device} {done} {asked} at {iova} in domain {domain}, and the hardware let it through."
                ),
                Some(reason) => format!(
                    "At {at}, {device} would have {} {asked} at {iova} in domain {domain}; the hardware refused it after {} ({reason}).",
                    if access.access == Access::Write { "written" } else { done },
                    count(access.done_bytes.into(), "byte"),
                ),
            }
        }
        (None, Some(request)) => {
            format!("At {at}, {request} asked for it in domain {domain}{}.", about(report))
        }
        (None, None) => format!("It was seen at {at} in domain {domain}{}.", about(report)),
    }
}

fn about(report: &SanitizerReport) -> String {
    report.device.map_or_else(String::new, |device| format!(", for {device}"))
}

/// Birth and death of the mapping, and where the access lies in it.
fn life(mapping: &MappingLife, report: &SanitizerReport) -> Vec<String> {
    let what = if mapping.coherent { "The coherent memory" } else { "The mapping" };
    let MappingLife { iova, gpa, direction, .. } = mapping;
    let (size, born) = (count(mapping.size_bytes, "byte"), instant(mapping.born_at_us));
    let death = match mapping.death {
        None => "it is still there".to_owned(),
        Some((at_us, by)) => {
            let lived = duration(at_us.saturating_sub(mapping.born_at_us));
            format!("request {} unmapped it at {}, {lived} later", by.0, instant(at_us))
        }
    };
    let mut told = vec![format!(
        "{what} at {iova} has {size} of memory at {gpa}, {direction}: request {} made it at {born}; {death}.",
        mapping.born_by.0
    )];
    told.extend(report.access.as_ref().and_then(|access| place(mapping, access)));
    told
}

/// Where an access lies in a mapping, when it begins there.
fn place(mapping: &MappingLife, access: &SeenAccess) -> Option<String> {
    let offset = access.iova.offset_from(mapping.iova).filter(|offset| *offset < mapping.size_bytes)?;
    let end = u128::from(offset) + u128::from(access.size_bytes);
    let beyond = end.saturating_sub(u128::from(mapping.size_bytes));
    let begins = if offset == 0 {
        "The access begins with its first byte".to_owned()
    } else {
        format!("The access begins {} into it", count(offset, "byte"))
    };
    Some(match u64::try_from(beyond) {
        Ok(0) => format!("{begins} and ends inside."),
        Ok(beyond) => format!("{begins} and ends {} behind its end.", count(beyond, "byte")),
        Err(_) => format!("{begins} and ends far behind its end."),
    })
}

fn blame(report: &SanitizerReport) -> String {
    match (report.blame, &report.access) {
        (Blame::Driver, Some(_)) => {
            "The driver is to blame: it gave the device this address, or one in the same mapping."
        }
        (Blame::Driver, None) => "The driver is to blame: it asked for it itself.",
        (Blame::Device, _) => "The device is to blame: the driver never gave it this address.",
        (Blame::Unknown, _) => {
            "Who is to blame cannot be told: the set of addresses that the driver gave has lost entries, or what was given leaves it open."
        }
    }
    .to_owned()
}

fn kind(violation: Violation) -> &'static str {
    match violation {
        Violation::BadAddress => "It is a V1, a bad-address fault: the driver gave a wrong address.",
        Violation::BadDevice => "It is a V2, a bad-device fault: the device made a wrong access by itself.",
        Violation::InvalidUse => {
            "It is a V3, an invalid-use fault: a device used memory after it was repurposed, or before."
        }
    }
}

/// What keeps it from happening again.
fn remedy(class: ReportClass) -> &'static str {
    match class {
        ReportClass::UseAfterUnmap => {
            "unmap a buffer only when the device has said that it is done with it, and stop the device before its memory is used for \
             something else; a strict domain leaves no window for it."
        }
        ReportClass::StrayAccess => {
            "compare the address with what the driver programmed: a guest-physical address in the place of the one that the map returned \
             is the usual mistake; if the driver never gave it, look at the device."
        }
        ReportClass::Overrun => {
            "compare the length in the descriptor with that of the mapping; byte granularity has the hardware refuse it."
        }
        ReportClass::WrongDirection => {
            "map with the direction of what the device does, bidirectional where it does both, or correct what it is told to do."
        }
        ReportClass::FreeOfUnmapped => {
            "unmap only what a map returned, with the very address that it returned."
        }
        ReportClass::DoubleUnmap => {
            "forget an address when it is unmapped, and look for two paths that both unmap: often an error path beside the completion."
        }
        ReportClass::SizeMismatch => {
            "keep the size beside the address and unmap with it; a mapping goes whole or not at all."
        }
        ReportClass::DirectionMismatch => {
            "keep the direction beside the address and unmap with the one that was mapped."
        }
        ReportClass::WrongFree => {
            "unmap with the function that belongs to the map: single with single, scatter-gather with scatter-gather, coherent with free."
        }
        ReportClass::SyncOfUnmapped => "sync only between map and unmap.",
        ReportClass::SyncOutside => {
            "sync a range that lies in one mapping, or in one segment of a scatter-gather list."
        }
        ReportClass::SyncDirection => {
            "sync with the direction of the mapping; what flows both ways is mapped bidirectional."
        }
        ReportClass::Leak => "unmap every mapping before the device is detached or the driver ends.",
        ReportClass::Overlap => {
            "map memory for writing once at a time: unmap the first mapping before the second is made, or use one for both."
        }
        ReportClass::SegmentOverLimit => {
            "map it in pieces that the device takes, or set the limits to what the device really takes."
        }
        ReportClass::ErrorNeverChecked => {
            "check every map for failure before its address goes to the device (Linux: dma_mapping_error)."
        }
        ReportClass::ReleasedWhileMapped => {
            "unmap memory before it is freed, when the device is done with it."
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use iommu_types::{Direction, DomainId, FaultReason, Gpa, Iova, Owner, RequestId};

    use super::*;

    /// 2026-01-02T03:04:05.000006Z.
    const AT_US: u64 = 1_767_323_045_000_006;

    pub(crate) fn report(class: ReportClass) -> SanitizerReport {
        SanitizerReport {
            sequence: 7,
            at_us: AT_US,
            owner: Owner::Driver(1),
            domain_id: DomainId::new(3),
            device: None,
            class,
            violation: None,
            blame: Blame::Driver,
            access: None,
            mapping: None,
            request_id: None,
            age_us: None,
            repeats: 0,
        }
    }

    fn mapping() -> MappingLife {
        MappingLife {
            iova: Iova::new(0x5000),
            size_bytes: 2048,
            gpa: Gpa::new(0x9000),
            direction: Direction::FromDevice,
            coherent: false,
            born_at_us: AT_US - 2_000_000,
            born_by: RequestId(4),
            death: Some((AT_US - 100, RequestId(5))),
        }
    }

    fn access(offset: u64, size_bytes: u32) -> SeenAccess {
        SeenAccess {
            iova: Iova::new(0x5000 + offset),
            size_bytes,
            done_bytes: size_bytes,
            access: Access::Write,
            refused: None,
        }
    }

    fn use_after_unmap() -> SanitizerReport {
        SanitizerReport {
            device: Some("0000:00:05.0".parse().expect("an address")),
            violation: Some(Violation::InvalidUse),
            access: Some(access(16, 64)),
            mapping: Some(mapping()),
            age_us: Some(100),
            repeats: 2,
            ..report(ReportClass::UseAfterUnmap)
        }
    }

    fn check(report: &SanitizerReport, expected: &[&str]) {
        assert_eq!(sentences(report), expected);
    }

    #[test]
    fn a_use_after_unmap_is_told_from_birth_to_remedy() {
        check(
            &use_after_unmap(),
            &[
                "Report 7 of driver:1: use-after-unmap; the device used a mapping after its unmap.",
                "At 2026-01-02T03:04:05.000006Z, 0000:00:05.0 wrote 64 bytes at iova:0x5010 in domain 3, and the hardware let it through.",
                "The same was seen 2 times more in a row.",
                "The mapping at iova:0x5000 has 2048 bytes of memory at gpa:0x9000, from-device: request 4 made it at \
             2026-01-02T03:04:03.000006Z; request 5 unmapped it at 2026-01-02T03:04:04.999906Z, 2.00 s later.",
                "The access begins 16 bytes into it and ends inside.",
                "The device came 100 µs after the unmap.",
                "The driver is to blame: it gave the device this address, or one in the same mapping.",
                "It is a V3, an invalid-use fault: a device used memory after it was repurposed, or before.",
                "What to do: unmap a buffer only when the device has said that it is done with it, and stop the device before its memory is \
             used for something else; a strict domain leaves no window for it.",
            ],
        );
    }

    #[test]
    fn a_refused_access_without_a_mapping_is_told_with_its_reason() {
        let refused = Some(FaultReason::READ_DENIED);
        let stray = SeenAccess { done_bytes: 1, access: Access::Read, refused, ..access(0, 8) };
        let report = SanitizerReport {
            device: Some("0000:00:05.0".parse().expect("an address")),
            violation: Some(Violation::BadDevice),
            blame: Blame::Device,
            access: Some(stray),
            ..report(ReportClass::StrayAccess)
        };
        check(
            &report,
            &[
                "Report 7 of driver:1: stray-access; the device used an address that no mapping covers.",
                "At 2026-01-02T03:04:05.000006Z, 0000:00:05.0 would have read 8 bytes at iova:0x5000 in domain 3; the hardware refused it \
             after 1 byte (0x06 the tables give no read permission).",
                "No mapping is known for that address.",
                "The device is to blame: the driver never gave it this address.",
                "It is a V2, a bad-device fault: the device made a wrong access by itself.",
                "What to do: compare the address with what the driver programmed: a guest-physical address in the place of the one that \
             the map returned is the usual mistake; if the driver never gave it, look at the device.",
            ],
        );
    }

    #[test]
    fn what_a_request_asked_for_is_told_by_its_number() {
        let living = MappingLife { death: None, coherent: true, ..mapping() };
        let report = SanitizerReport {
            mapping: Some(living),
            request_id: Some(RequestId(9)),
            ..report(ReportClass::WrongFree)
        };
        check(
            &report,
            &[
                "Report 7 of driver:1: wrong-free; the driver unmapped with the function for another kind of mapping.",
                "At 2026-01-02T03:04:05.000006Z, request 9 of driver:1 asked for it in domain 3.",
                "The coherent memory at iova:0x5000 has 2048 bytes of memory at gpa:0x9000, from-device: request 4 made it at \
             2026-01-02T03:04:03.000006Z; it is still there.",
                "The driver is to blame: it asked for it itself.",
                "What to do: unmap with the function that belongs to the map: single with single, scatter-gather with scatter-gather, \
             coherent with free.",
            ],
        );
    }

    #[test]
    fn the_place_of_an_access_in_its_mapping_is_told() {
        let whole_space = MappingLife { size_bytes: u64::MAX, iova: Iova::new(0), ..mapping() };
        for (mapping, access, expected) in [
            (mapping(), access(0, 2048), Some("The access begins with its first byte and ends inside.")),
            (
                mapping(),
                access(1, 2048),
                Some("The access begins 1 byte into it and ends 1 byte behind its end."),
            ),
            (
                mapping(),
                access(2047, 4096),
                Some("The access begins 2047 bytes into it and ends 4095 bytes behind its end."),
            ),
            (mapping(), access(2048, 1), None),
            (
                whole_space,
                SeenAccess { iova: Iova::new(u64::MAX - 1), ..access(0, 2) },
                Some("The access begins 18446744073709551614 bytes into it and ends 1 byte behind its end."),
            ),
        ] {
            assert_eq!(place(&mapping, &access).as_deref(), expected);
        }
    }

    #[test]
    fn every_class_has_a_remedy_of_its_own_and_whole_sentences() {
        let mut seen = std::collections::HashSet::new();
        for (class, ..) in ReportClass::ALL {
            assert!(seen.insert(remedy(*class)), "{class} has the remedy of another");
            for blame in [Blame::Driver, Blame::Device, Blame::Unknown] {
                for access in [None, Some(access(0, 1))] {
                    let report = SanitizerReport { blame, access, ..report(*class) };
                    for sentence in sentences(&report) {
                        assert!(sentence.ends_with('.') && !sentence.contains("  "), "{sentence:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_line_has_what_one_looks_for() {
        let request = Some(RequestId(9));
        for (report, expected) in [
            (
                use_after_unmap(),
                "     7  2026-01-02T03:04:05.000006Z  driver:1, domain 3  0000:00:05.0  use-after-unmap  write of 64 bytes at \
                 iova:0x5010 100 µs after its unmap  blame: driver (V3) (+2 more)",
            ),
            (
                SanitizerReport {
                    request_id: request,
                    mapping: Some(mapping()),
                    ..report(ReportClass::DoubleUnmap)
                },
                "     7  2026-01-02T03:04:05.000006Z  driver:1, domain 3  double-unmap  mapping iova:0x5000 of 2048 bytes  \
                 request 9  blame: driver",
            ),
            (
                SanitizerReport {
                    blame: Blame::Unknown,
                    access: Some(SeenAccess { refused: Some(FaultReason(0xee)), ..access(0, 1) }),
                    ..report(ReportClass::Overrun)
                },
                "     7  2026-01-02T03:04:05.000006Z  driver:1, domain 3  overrun  write of 1 byte at iova:0x5000, refused  \
                 blame: unknown",
            ),
        ] {
            assert_eq!(line(&report), expected);
        }
    }
}
