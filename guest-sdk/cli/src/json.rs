//! What the SDK's values look like as JSON: addresses as hexadecimal strings (64 bits do not fit a JSON number), devices and owners as printed.

use iommu_types::{
    CacheState, Explanation, Fault, FaultRecord, FunctionKind, Outcome, PciFunction, SanitizerReport, Step,
    Structure, Translation,
};
use serde_json::{Value, json};

/// A number as a hexadecimal string.
pub(crate) fn hex(number: u64) -> String {
    format!("{number:#x}")
}

/// What a PCI function is.
pub(crate) fn function(function: PciFunction) -> Value {
    let mut value = match function.kind {
        FunctionKind::Endpoint => json!({ "kind": "endpoint" }),
        FunctionKind::Bridge { secondary_bus, subordinate_bus } => {
            json!({ "kind": "bridge", "secondary_bus": secondary_bus, "subordinate_bus": subordinate_bus })
        }
        FunctionKind::VirtualFunction { physical } => {
            json!({ "kind": "virtual_function", "physical": physical.to_string() })
        }
    };
    value["acs"] = json!(function.acs);
    value
}

/// A fault record.
pub(crate) fn fault(record: &FaultRecord) -> Value {
    let mut value = json!({
        "sequence": record.sequence,
        "at_unix_ms": record.at_unix_ms,
        "owner": record.owner.map(|owner| owner.to_string()),
        "device": record.device.to_string(),
        "domain_id": record.domain_id.map(|domain| domain.get()),
        "reason": record.fault.reason().0,
        "meaning": record.fault.reason().meaning(),
        "collapsed_count": record.collapsed_count,
    });
    match &record.fault {
        Fault::Dma(fault) => {
            value["kind"] = json!("dma");
            value["access"] = json!(fault.access.to_string());
            value["iova"] = json!(hex(fault.iova.get()));
            value["pasid"] = json!(fault.pasid.map(|pasid| pasid.get()));
        }
        Fault::Interrupt(fault) => {
            value["kind"] = json!("interrupt");
            value["index"] = json!(fault.index);
        }
    }
    value
}

/// A report of the sanitizer. Times are in microseconds since the UNIX epoch.
pub(crate) fn report(report: &SanitizerReport) -> Value {
    json!({
        "sequence": report.sequence,
        "at_us": report.at_us,
        "owner": report.owner.to_string(),
        "domain_id": report.domain_id.get(),
        "device": report.device.map(|device| device.to_string()),
        "class": report.class.name(),
        "meaning": report.class.meaning(),
        "violation": report.violation.map(|violation| violation.to_string()),
        "blame": report.blame.to_string(),
        "access": report.access.as_ref().map(|access| json!({
            "iova": hex(access.iova.get()),
            "size_bytes": access.size_bytes,
            "done_bytes": access.done_bytes,
            "access": access.access.to_string(),
            "refused": access.refused.map(|reason| json!({ "reason": reason.0, "meaning": reason.meaning() })),
        })),
        "mapping": report.mapping.as_ref().map(|mapping| json!({
            "iova": hex(mapping.iova.get()),
            "size_bytes": mapping.size_bytes,
            "gpa": hex(mapping.gpa.get()),
            "direction": mapping.direction.to_string(),
            "coherent": mapping.coherent,
            "born_at_us": mapping.born_at_us,
            "born_by": mapping.born_by.0,
            "death": mapping.death.map(|(at_us, by)| json!({ "at_us": at_us, "by": by.0 })),
        })),
        "request_id": report.request_id.map(|id| id.0),
        "age_us": report.age_us,
        "repeats": report.repeats,
    })
}

/// One table entry.
pub(crate) fn step(step: &Step) -> Value {
    let (structure, level) = match step.structure {
        Structure::Root => ("root", None),
        Structure::Context => ("context", None),
        Structure::SecondStage { level } => ("second_stage", Some(level)),
        Structure::RingRoot => ("ring_root", None),
        Structure::RingDevice => ("ring_device", None),
        Structure::Ring => ("ring", None),
        Structure::RingSlot => ("ring_slot", None),
    };
    json!({
        "structure": structure,
        "level": level,
        "index": step.index,
        "hpa": hex(step.at.get()),
        "low": step.low.map(hex),
        "high": step.high.map(hex),
        "permissions": step.permissions.map(|permissions| permissions.to_string()),
        "reading": step.reading,
    })
}

fn translation(translation: &Translation) -> Value {
    json!({
        "hpa": hex(translation.hpa.get()),
        "page_bytes": translation.page_size.bytes(),
        "permissions": translation.permissions.to_string(),
        "domain_id": translation.domain_id.get(),
    })
}

fn cache(state: &CacheState) -> Value {
    match state {
        CacheState::Hit { entry } => json!({ "state": "hit", "entry": entry }),
        CacheState::Miss => json!({ "state": "miss" }),
        CacheState::Insufficient { entry } => json!({ "state": "insufficient", "entry": entry }),
        CacheState::NotAsked => json!({ "state": "not_asked" }),
    }
}

/// How an access ends.
pub(crate) fn outcome(outcome: &Outcome) -> Value {
    match outcome {
        Outcome::Translated(to) => json!({ "outcome": "translated", "translation": translation(to) }),
        Outcome::Untranslated(hpa) => json!({ "outcome": "untranslated", "hpa": hex(hpa.get()) }),
        Outcome::Interrupt => json!({ "outcome": "interrupt" }),
        Outcome::Refused(fault) => {
            json!({ "outcome": "refused", "reason": fault.reason.0, "meaning": fault.reason.meaning() })
        }
    }
}

/// An explanation.
pub(crate) fn explanation(explanation: &Explanation) -> Value {
    let mut value = outcome(&explanation.outcome);
    value["source"] = json!(explanation.source_id.to_string());
    value["pasid"] = json!(explanation.pasid.map(|pasid| pasid.get()));
    value["iova"] = json!(hex(explanation.iova.get()));
    value["access"] = json!(explanation.access.to_string());
    value["size_bytes"] = json!(explanation.size_bytes);
    value["steps"] = explanation.steps.iter().map(step).collect();
    value["caches"] = json!({
        "context_cache": cache(&explanation.context_cache),
        "iotlb": cache(&explanation.iotlb),
        "paging_structure_cache": cache(&explanation.paging_structure_cache),
    });
    value["fault_suppressed"] = json!(explanation.fault_suppressed);
    value["stale"] = json!(explanation.stale.as_ref().map(translation));
    value["conclusion"] = json!(explanation.conclusion);
    value
}
