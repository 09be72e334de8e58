//! The commands that look and change nothing.

use guest_sdk::{
    AccessQuestion, CacheCounters, DeviceAddress, DeviceState, DomainId, FaultFilter, Iova, Operator, Owner,
    WalkStep,
};
use iommu_types::Outcome;
use serde_json::{Value, json};

use crate::Ended;
use crate::args::{self, AccessArgs, FaultCommand};
use crate::json::{self, hex};
use crate::print::{Output, table};
use crate::words::{self, or_dash};

pub(crate) fn yes_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

fn device_value(device: &DeviceState) -> Value {
    json!({
        "device": device.device.to_string(),
        "name": device.name,
        "owner": device.owner.map(|owner| owner.to_string()),
        "domain_id": device.domain_id.map(|domain| domain.get()),
        "connected": device.connected,
        "generation": device.generation.0,
        "operations": device.operations,
        "bytes": device.bytes,
        "faults": device.faults,
        "refusals": device.refusals,
    })
}

const DEVICE_HEAD: [&str; 10] = [
    "device",
    "name",
    "owner",
    "domain",
    "connected",
    "session",
    "operations",
    "bytes",
    "faults",
    "refusals",
];

fn device_row(device: &DeviceState) -> Vec<String> {
    vec![
        device.device.to_string(),
        device.name.clone(),
        or_dash(device.owner),
        or_dash(device.domain_id),
        yes_no(device.connected),
        device.generation.0.to_string(),
        device.operations.to_string(),
        device.bytes.to_string(),
        device.faults.to_string(),
        device.refusals.to_string(),
    ]
}

/// `status`: everything at a glance.
pub(crate) async fn status(operator: &Operator, out: Output) -> anyhow::Result<()> {
    let topology = operator.inspect().topology().await?;
    let owners: Vec<Value> = topology
        .owners
        .iter()
        .map(|owner| {
            json!({
                "owner": owner.owner.to_string(),
                "name": owner.name,
                "connected": owner.connected,
                "memory_bytes": owner.memory_bytes,
                "mappings": owner.mappings,
                "domain_ids": owner.domain_ids.iter().map(|domain| domain.get()).collect::<Vec<_>>(),
            })
        })
        .collect();
    let value = json!({
        "server_version": topology.server_version,
        "uptime_ms": topology.uptime_ms,
        "memory_bytes": topology.memory_bytes,
        "memory_free_bytes": topology.memory_free_bytes,
        "owners": owners,
        "devices": topology.devices.iter().map(device_value).collect::<Vec<_>>(),
    });
    out.page(&value, || {
        let rows = topology.owners.iter().map(|owner| {
            let domains: Vec<String> = owner.domain_ids.iter().map(ToString::to_string).collect();
            vec![
                owner.owner.to_string(),
                owner.name.clone(),
                yes_no(owner.connected),
                owner.memory_bytes.to_string(),
                owner.mappings.to_string(),
                domains.join(" "),
            ]
        });
        let owners =
            table(&["owner", "name", "connected", "memory bytes", "mappings", "domains"], rows.collect());
        let devices = table(&DEVICE_HEAD, topology.devices.iter().map(device_row).collect());
        let up = std::time::Duration::from_secs(topology.uptime_ms / 1000);
        format!(
            "iommu-server {}, up {}; {} of {} MiB free\n\n{owners}\n{devices}",
            topology.server_version,
            humantime::format_duration(up),
            topology.memory_free_bytes >> 20,
            topology.memory_bytes >> 20,
        )
    });
    Ok(())
}

/// `limits`.
pub(crate) async fn limits(operator: &Operator, out: Output, owner: Option<Owner>) -> anyhow::Result<()> {
    let owners = operator.inspect().limits(owner).await?;
    let lines = || owners.iter().flat_map(|of| of.limits.iter().map(move |limit| (of.owner, limit)));
    let value = lines().map(|(owner, limit)| {
        json!({
            "owner": owner.to_string(),
            "limit": limit.limit,
            "used": limit.used,
            "allowed": limit.allowed,
            "refused_count": limit.refused_count,
        })
    });
    let rows = lines().map(|(owner, limit)| {
        let numbers = [limit.used, limit.allowed, limit.refused_count].map(|number| number.to_string());
        [owner.to_string(), limit.limit.clone()].into_iter().chain(numbers).collect()
    });
    out.table(&value.collect(), &["owner", "limit", "used", "allowed", "refused"], rows.collect());
    Ok(())
}

/// `device list`.
pub(crate) async fn devices(operator: &Operator, out: Output) -> anyhow::Result<()> {
    let topology = operator.inspect().topology().await?;
    let value = topology.devices.iter().map(device_value).collect();
    out.table(&value, &DEVICE_HEAD, topology.devices.iter().map(device_row).collect());
    Ok(())
}

/// `owner list`.
pub(crate) async fn owners(operator: &Operator, out: Output) -> anyhow::Result<()> {
    let topology = operator.inspect().topology().await?;
    let value = topology
        .owners
        .iter()
        .map(|owner| json!({ "owner": owner.owner.to_string(), "name": owner.name, "connected": owner.connected }))
        .collect();
    let rows = topology.owners.iter();
    let rows = rows.map(|owner| vec![owner.owner.to_string(), owner.name.clone(), yes_no(owner.connected)]);
    out.table(&value, &["owner", "name", "connected"], rows.collect());
    Ok(())
}

/// `mappings`.
pub(crate) async fn mappings(
    operator: &Operator,
    out: Output,
    domain: u16,
    from: u64,
    skip: u32,
    limit: u32,
) -> anyhow::Result<()> {
    let page = operator.inspect().mappings(DomainId::new(domain), Iova::new(from), skip, limit).await?;
    let value = json!({
        "mappings": page.mappings.iter().map(|mapping| json!({
            "iova": hex(mapping.iova.get()),
            "size_bytes": mapping.size_bytes,
            "gpa": hex(mapping.gpa.get()),
            "permissions": mapping.permissions.to_string(),
            "request_id": mapping.request_id.0,
        })).collect::<Vec<_>>(),
        "next_iova": page.next_iova.map(|iova| hex(iova.get())),
        "next_skip": page.next_skip,
    });
    out.page(&value, || {
        let rows = page.mappings.iter().map(|mapping| {
            vec![
                mapping.iova.to_string(),
                mapping.size_bytes.to_string(),
                mapping.gpa.to_string(),
                mapping.permissions.to_string(),
                mapping.request_id.0.to_string(),
            ]
        });
        let rows = table(&["iova", "bytes", "gpa", "permissions", "request"], rows.collect());
        match page.next_iova {
            Some(next) if page.next_skip == 0 => format!("{rows}more: --from {:#x}\n", next.get()),
            Some(next) => format!("{rows}more: --from {:#x} --skip {}\n", next.get(), page.next_skip),
            None => rows,
        }
    });
    Ok(())
}

async fn explained(operator: &Operator, access: &AccessArgs) -> anyhow::Result<iommu_types::Explanation> {
    let question = AccessQuestion {
        device: access.device,
        pasid: access.pasid,
        iova: Iova::new(access.iova),
        access: access.access.into(),
        size_bytes: access.size,
    };
    Ok(operator.inspect().explain(question).await?)
}

fn ended(outcome: &Outcome) -> Ended {
    if matches!(outcome, Outcome::Refused(_)) { Ended::WouldBeRefused } else { Ended::Done }
}

/// `translate`: the outcome in one line.
pub(crate) async fn translate(
    operator: &Operator,
    out: Output,
    access: &AccessArgs,
) -> anyhow::Result<Ended> {
    let explanation = explained(operator, access).await?;
    out.line(&json::outcome(&explanation.outcome), || {
        let stale =
            if explanation.stale.is_some() { " (a cached entry says otherwise: explain it)" } else { "" };
        format!("{}{stale}", words::outcome_words(&explanation.outcome))
    });
    Ok(ended(&explanation.outcome))
}

/// `explain`: everything about one access.
pub(crate) async fn explain(operator: &Operator, out: Output, access: &AccessArgs) -> anyhow::Result<Ended> {
    let explanation = explained(operator, access).await?;
    out.page(&json::explanation(&explanation), || words::explanation_page(&explanation));
    Ok(ended(&explanation.outcome))
}

/// `tables`.
pub(crate) async fn tables(
    operator: &Operator,
    out: Output,
    device: DeviceAddress,
    without_page_tables: bool,
) -> anyhow::Result<()> {
    let entries = operator.inspect().dump_tables(device, without_page_tables).await?;
    for WalkStep { step, iova } in &entries {
        let mut value = json::step(step);
        value["iova"] = json!(iova.map(|iova| hex(iova.get())));
        out.line(&value, || {
            let iova = iova.map_or_else(String::new, |iova| format!("{iova}  "));
            format!("{iova}{}", words::step_line(step))
        });
    }
    Ok(())
}

/// `iotlb`.
pub(crate) async fn iotlb(
    operator: &Operator,
    out: Output,
    domain: Option<u16>,
    limit: u32,
) -> anyhow::Result<()> {
    let content = operator.inspect().iotlb(domain.map(DomainId::new), limit).await?;
    let value = json!({
        "total": content.total,
        "capacity": content.capacity,
        "entries": content.entries.iter().map(|entry| json!({
            "domain_id": entry.domain_id.get(),
            "iova": hex(entry.iova.get()),
            "page_bytes": entry.page_bytes.bytes(),
            "hpa": hex(entry.hpa.get()),
            "permissions": entry.permissions.to_string(),
            "first_byte": entry.first_byte,
            "last_byte": entry.last_byte,
        })).collect::<Vec<_>>(),
    });
    out.page(&value, || {
        let rows = content.entries.iter().map(|entry| {
            vec![
                entry.domain_id.to_string(),
                entry.iova.to_string(),
                entry.page_bytes.to_string(),
                entry.hpa.to_string(),
                entry.permissions.to_string(),
                entry
                    .first_byte
                    .zip(entry.last_byte)
                    .map_or_else(|| "all".to_owned(), |(first, last)| format!("{first} to {last}")),
            ]
        });
        let rows = table(&["domain", "iova", "page", "hpa", "permissions", "bytes"], rows.collect());
        format!("{rows}{} of at most {} entries are filled\n", content.total, content.capacity)
    });
    Ok(())
}

/// `counters`.
pub(crate) async fn counters(operator: &Operator, out: Output) -> anyhow::Result<()> {
    let counters = operator.inspect().counters(None).await?;
    let caches = [
        ("iotlb", counters.iotlb),
        ("context_cache", counters.context_cache),
        ("paging_structure_cache", counters.paging_structure_cache),
    ];
    let numbers = [
        ("walks", counters.walks),
        ("walk_reads", counters.walk_reads),
        ("invalidations", counters.invalidations),
        ("drains_waited", counters.drains_waited),
        ("faults", counters.faults),
        ("faults_recorded", counters.faults_recorded),
        ("faults_collapsed", counters.faults_collapsed),
        ("faults_overflowed", counters.faults_overflowed),
        ("faults_suppressed", counters.faults_suppressed),
        ("interrupts", counters.interrupts),
    ];
    let columns = |cache: &CacheCounters| {
        [cache.hits, cache.misses, cache.fills, cache.evictions, cache.outdated_fills]
    };
    const NAMES: [&str; 5] = ["hits", "misses", "fills", "evictions", "outdated_fills"];
    let mut value = json!({});
    for (name, cache) in &caches {
        value[*name] = NAMES
            .iter()
            .zip(columns(cache))
            .map(|(name, number)| ((*name).to_owned(), json!(number)))
            .collect();
    }
    for (name, number) in numbers {
        value[name] = json!(number);
    }
    let ring = counters.ring.map(|ring| {
        [
            ("hits", ring.hits),
            ("promotions", ring.promotions),
            ("walks", ring.walks),
            ("walk_reads", ring.walk_reads),
            ("prefetch_reads", ring.prefetch_reads),
            ("invalidations", ring.invalidations),
        ]
    });
    value["ring"] = match &ring {
        Some(numbers) => numbers.iter().map(|(name, number)| ((*name).to_owned(), json!(number))).collect(),
        None => Value::Null,
    };
    out.page(&value, || {
        let rows = caches.iter().map(|(name, cache)| {
            std::iter::once((*name).to_owned())
                .chain(columns(cache).map(|number| number.to_string()))
                .collect()
        });
        let head: Vec<&str> = std::iter::once("cache").chain(NAMES).collect();
        let caches = table(&head, rows.collect());
        let rows = |numbers: &[(&str, u64)]| {
            numbers.iter().map(|(name, number)| vec![(*name).to_owned(), number.to_string()]).collect()
        };
        let unit = table(&["counter", ""], rows(&numbers));
        let ring = ring.map_or_else(String::new, |ring| format!("\n{}", table(&["rIOMMU", ""], rows(&ring))));
        format!("{caches}\n{unit}{ring}")
    });
    Ok(())
}

/// `fault list` and `fault follow`.
pub(crate) async fn faults(operator: &Operator, out: Output, command: &FaultCommand) -> anyhow::Result<()> {
    let filter = |filter: &args::FaultFilter| FaultFilter { owner: filter.owner, device: filter.device };
    match command {
        FaultCommand::List { filter: which, limit } => {
            let list = operator.faults().list(filter(which), *limit).await?;
            let value = json!({
                "records": list.records.iter().map(json::fault).collect::<Vec<_>>(),
                "overwritten_count": list.overwritten_count,
                "unit_overflow_count": list.unit_overflow_count,
                "resume_token": list.resume_token,
            });
            out.page(&value, || {
                let mut page: String =
                    list.records.iter().map(|record| format!("{}\n", words::fault_line(record))).collect();
                if list.records.is_empty() {
                    page.push_str("no faults are on record\n");
                }
                if list.overwritten_count + list.unit_overflow_count > 0 {
                    page.push_str(&format!(
                        "{} older records were overwritten, {} faults were dropped by the full unit\n",
                        list.overwritten_count, list.unit_overflow_count
                    ));
                }
                page
            });
            Ok(())
        }
        FaultCommand::Follow { filter: which, from, count } => {
            let mut new = operator.faults().watch(filter(which), from.clone()).await?;
            let mut token = from.clone();
            let mut left = count.unwrap_or(u64::MAX);
            while left > 0 {
                let event = tokio::select! {
                    event = new.next() => event,
                    interrupted = tokio::signal::ctrl_c() => { interrupted?; return Ok(()); }
                };
                let Some(event) = event else { return Ok(()) };
                let event = event?;
                if event.missed_count > 0 {
                    let value = json!({ "missed_count": event.missed_count });
                    out.line(&value, || {
                        format!("{} records were overwritten before they could be shown", event.missed_count)
                    });
                }
                let count = event.records.len();
                for (index, record) in event.records.iter().enumerate() {
                    if left == 0 {
                        break;
                    }
                    // The token is that of the whole message: before its last record only the one before misses nothing.
                    if index + 1 == count {
                        token.clone_from(&event.resume_token);
                    }
                    let mut value = json::fault(record);
                    value["resume_token"] = json!((!token.is_empty()).then_some(&token));
                    out.line(&value, || words::fault_line(record));
                    left -= 1;
                }
            }
            Ok(())
        }
    }
}
