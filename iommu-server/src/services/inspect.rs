//! `InspectService`: looking at everything, changing nothing. Drivers see what is theirs, without physical addresses.

use std::collections::HashSet;
use std::sync::Arc;

use iommu_hardware::vtd::{CacheCounters, Counters, Unit};
use iommu_kernel::{Domain, MappingState, SanitizerHandle};
use iommu_proto::errors::WireError;
use iommu_proto::model::{
    self, DomainState, DumpIotlb, DumpTables, DumpedIotlb, Explain, Explained, GetCounters, LimitsList,
    LimitsOfOwner, ListDomains, ListLimits, ListMappings, Mappings, OwnerState, Topology,
};
use iommu_proto::pb;
use iommu_proto::pb::inspect_service_server::InspectService;
use iommu_types::errors::{AttachError, NotYours, UnknownMachine};
use iommu_types::{CacheState, DeviceAddress, Explanation, Generation, Hpa, Iova, Outcome, Owner};
use tonic::{Request, Response, Status};

use super::feed::{Feed, feed};
use super::tables::{Dump, Scope};
use super::{Caller, parse};
use crate::bounds;
use crate::host::Host;
use crate::host::devices::{DeviceState, Home};
use crate::host::domains::DomainSlot;
use crate::machine::Machine;
use crate::telemetry;

/// The service.
#[derive(Clone, Debug)]
pub struct Inspect {
    /// The host.
    pub host: Arc<Host>,
}

impl Inspect {
    /// A device that the caller may look at.
    fn device(&self, caller: &Caller, address: DeviceAddress) -> Result<Arc<DeviceState>, AttachError> {
        let device = self.host.devices.get(address)?;
        let visible = match &device.home {
            Home::Host => caller.sees(self.host.topology.read().device(address)?.owner),
            Home::Machine(machine) => sees_machine(caller, machine.segment),
        };
        if visible { Ok(device) } else { Err(NotYours { object: address.to_string() }.into()) }
    }
    fn unit<'a>(&'a self, device: &'a DeviceState) -> &'a Arc<Unit> {
        match &device.home {
            Home::Host => self.host.kernel.unit(),
            Home::Machine(machine) => machine.unit(),
        }
    }
    fn machine(&self, caller: &Caller, segment: u16) -> Result<Arc<Machine>, Status> {
        let machine = self.host.machines.get(segment).map_err(WireError::into_status)?;
        if !sees_machine(caller, segment) {
            return Err(NotYours { object: format!("the machine at segment {segment:04x}") }.into_status());
        }
        Ok(machine)
    }
    /// Looks while no table of the device's domain can go: its frame might be another's memory at once. A device may have changed hands
    /// since the last look.
    fn while_tables_stay<R>(
        &self,
        caller: &Caller,
        device: &DeviceState,
        mut look: impl FnMut(Scope) -> R,
    ) -> Result<R, AttachError> {
        self.device(caller, device.address)?;
        if let Home::Machine(_) = &device.home {
            return Ok(look(Scope::Machine));
        }
        let entry = self.host.topology.read().device(device.address)?.clone();
        let slot = entry.domain_id.and_then(|id| self.host.domains.get(id).ok());
        // An operator may attach a device to a domain of its new owner in between, so it is the domain that counts.
        let slot = slot.filter(|slot| caller.sees(Some(slot.owner)));
        // To a domain that is being destroyed nothing is attached.
        let source = device.address.source_id;
        let seen = slot.and_then(|slot| {
            let scope = |domain: &Domain| match domain.has_ring_source(source) {
                true => Scope::Rings,
                false => Scope::Domain(Some(slot.id)),
            };
            slot.with(|domain| look(scope(domain))).ok()
        });
        Ok(seen.unwrap_or_else(|| look(Scope::Domain(None))))
    }
    fn device_state(&self, device: &DeviceState) -> model::DeviceState {
        let entry = self.host.topology.read().device(device.address).ok().cloned();
        let count = device.counters.read();
        model::DeviceState {
            device: device.address,
            name: device.name.clone(),
            owner: entry.as_ref().and_then(|entry| entry.owner),
            domain_id: entry.as_ref().and_then(|entry| entry.domain_id),
            connected: device.session().is_some(),
            generation: Generation(device.generation()),
            operations: count.operations,
            bytes: count.bytes,
            faults: count.faults,
            refusals: count.refusals,
        }
    }
    fn domain_state(&self, slot: &DomainSlot) -> Option<DomainState> {
        let devices = self.host.topology.read().attached_to(slot.id);
        let state = slot.with(|domain| {
            let (counters, iovas, waiting) = (domain.counters(), domain.iova_counters(), domain.waiting());
            DomainState {
                domain_id: domain.id(),
                owner: domain.owner(),
                options: domain.options(),
                devices,
                mappings: counters.mappings,
                mapped_bytes: counters.mapped_bytes,
                table_bytes: counters.table_bytes,
                maps: counters.maps,
                unmaps: counters.unmaps,
                live_iova_ranges: iovas.live_ranges,
                cached_iova_ranges: iovas.cached_ranges,
                iova_allocations: iovas.allocations,
                iova_visits: iovas.visits,
                pending_flushes: waiting.map_or(0, |waiting| waiting.unmaps),
                oldest_pending_us: waiting.map(|waiting| telemetry::now().since_us(waiting.since)),
                flushes: counters.flushes,
                invalidations: counters.invalidations,
                idle_mappings: counters.idle_pages,
                shadow_bytes: counters.shadow_bytes,
                copied_bytes: counters.copied_bytes,
                sanitizer_reports: domain.sanitizer().map_or(0, SanitizerHandle::total),
            }
        });
        // One that is being destroyed is gone.
        state.ok()
    }
    fn owner_state(&self, owner: &crate::host::owners::OwnerState) -> OwnerState {
        let domains = self.host.domains.list(|slot| slot.owner == owner.owner);
        OwnerState {
            owner: owner.owner,
            name: owner.name.clone(),
            connected: owner.seat.connected().is_some(),
            memory_bytes: owner.account.memory_bytes(),
            mappings: owner.account.mappings(),
            domain_ids: domains.iter().map(|slot| slot.id).collect(),
        }
    }
}

/// A machine is its creator's to look at, and an observer's.
fn sees_machine(caller: &Caller, segment: u16) -> bool {
    caller.sees_all() || caller.session.bare().is_some_and(|client| client.owns(segment))
}

fn limited(limit: u32) -> usize {
    match limit as usize {
        0 => bounds::ITEMS_PER_MESSAGE_MAX,
        limit => limit.min(bounds::ITEMS_PER_MESSAGE_MAX),
    }
}

fn cache(counters: CacheCounters) -> model::CacheCounters {
    let CacheCounters { hits, misses, fills, evictions, outdated_fills } = counters;
    model::CacheCounters { hits, misses, fills, evictions, outdated_fills }
}

fn counters(of: Counters) -> model::Counters {
    model::Counters {
        iotlb: cache(of.iotlb),
        context_cache: cache(of.context_cache),
        paging_structure_cache: cache(of.paging_structure_cache),
        walks: of.walks,
        walk_reads: of.walk_reads,
        invalidations: of.invalidations,
        drains_waited: of.drains_waited,
        faults: of.faults,
        faults_recorded: of.faults_recorded,
        faults_collapsed: of.faults_collapsed,
        faults_overflowed: of.faults_overflowed,
        faults_suppressed: of.faults_suppressed,
        interrupts: of.interrupts,
        ring: Some(model::RingCounters {
            hits: of.ring.hits,
            promotions: of.ring.promotions,
            walks: of.ring.walks,
            walk_reads: of.ring.walk_reads,
            prefetch_reads: of.ring.prefetch_reads,
            invalidations: of.ring.invalidations,
        }),
    }
}

/// Takes out of an explanation what only operators and observers may see: where things are in physical memory.
fn without_physical(mut explanation: Explanation) -> Explanation {
    let blind = |state: &mut CacheState| {
        if let CacheState::Hit { entry } | CacheState::Insufficient { entry } = state {
            "an entry".clone_into(entry);
        }
    };
    blind(&mut explanation.context_cache);
    blind(&mut explanation.iotlb);
    blind(&mut explanation.paging_structure_cache);
    for step in &mut explanation.steps {
        // Every structure has its own bits for it, and its own words after it.
        let is_present = step.reading.starts_with("present");
        step.at = Hpa::new(0);
        (step.low, step.high) = (step.low.map(|low| low & 0xfff), step.high.map(|_| 0));
        step.reading = if is_present { "present" } else { "not present" }.to_owned();
    }
    match &mut explanation.outcome {
        Outcome::Translated(translation) => translation.hpa = Hpa::new(0),
        Outcome::Untranslated(hpa) => *hpa = Hpa::new(0),
        Outcome::Interrupt | Outcome::Refused(_) => {}
    }
    if let Some(stale) = &mut explanation.stale {
        stale.hpa = Hpa::new(0);
    }
    explanation.conclusion = match &explanation.outcome {
        Outcome::Translated(_) | Outcome::Untranslated(_) => "the access reaches memory".to_owned(),
        Outcome::Interrupt => "the access is an interrupt request and goes to interrupt remapping".to_owned(),
        Outcome::Refused(fault) => format!("refused: {}", fault.reason),
    };
    explanation
}

/// A table entry as a caller may see it: of physical memory only what `physical` allows.
fn shown(mut entry: model::WalkStep, physical: bool) -> pb::WalkStep {
    if !physical {
        entry.step.at = Hpa::new(0);
        entry.step.low = entry.step.low.map(|low| low & 0xfff);
        entry.step.high = None;
        entry.step.reading = String::new();
    }
    entry.into()
}

#[tonic::async_trait]
impl InspectService for Inspect {
    async fn get_topology(
        &self,
        request: Request<pb::GetTopologyRequest>,
    ) -> Result<Response<pb::GetTopologyResponse>, Status> {
        let caller = Caller::of(&request)?;
        let owners = self.host.owners.list();
        let devices = self.host.devices.list();
        let visible = |device: &&Arc<DeviceState>| self.device(&caller, device.address).is_ok();
        let topology = Topology {
            server_version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: self.host.started.elapsed().as_millis() as u64,
            memory_bytes: self.host.kernel.memory().size_bytes(),
            // What is free is a figure of all tenants together (I7).
            memory_free_bytes: if caller.sees_all() { self.host.kernel.free_bytes() } else { 0 },
            owners: owners
                .iter()
                .filter(|owner| caller.sees(Some(owner.owner)))
                .map(|owner| self.owner_state(owner))
                .collect(),
            devices: devices.iter().filter(visible).map(|device| self.device_state(device)).collect(),
        };
        Ok(Response::new(topology.into()))
    }

    async fn list_limits(
        &self,
        request: Request<pb::ListLimitsRequest>,
    ) -> Result<Response<pb::ListLimitsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let ListLimits { owner } = parse(request.into_inner())?;
        if let Some(owner) = owner {
            caller.must_see(Some(owner), format!("the limits of {owner}")).map_err(WireError::into_status)?;
            self.host.owners.get(owner).map_err(WireError::into_status)?;
        }
        let wanted = |of: Owner| owner.map_or_else(|| caller.sees(Some(of)), |owner| owner == of);
        let owners = self.host.owners.list().into_iter().filter(|state| wanted(state.owner));
        let owners = owners.map(|state| LimitsOfOwner { owner: state.owner, limits: state.limits() });
        Ok(Response::new(LimitsList { owners: owners.collect() }.into()))
    }

    async fn list_domains(
        &self,
        request: Request<pb::ListDomainsRequest>,
    ) -> Result<Response<pb::ListDomainsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let ListDomains { owner } = parse(request.into_inner())?;
        if let Some(owner) = owner {
            caller.must_see(Some(owner), format!("what {owner} has")).map_err(WireError::into_status)?;
        }
        let wanted = |of: Owner| owner.map_or_else(|| caller.sees(Some(of)), |owner| owner == of);
        let slots = self.host.domains.list(|slot| wanted(slot.owner));
        let domains = slots.iter().filter_map(|slot| self.domain_state(slot)).map(Into::into).collect();
        Ok(Response::new(pb::ListDomainsResponse { domains }))
    }

    async fn list_mappings(
        &self,
        request: Request<pb::ListMappingsRequest>,
    ) -> Result<Response<pb::ListMappingsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let ListMappings { domain_id, from_iova, skip, limit } = parse(request.into_inner())?;
        let slot = self.host.domains.get(domain_id).map_err(WireError::into_status)?;
        caller.must_see(Some(slot.owner), format!("domain {domain_id}")).map_err(WireError::into_status)?;
        let limit = limited(limit);
        let skip = skip as usize;
        let ask = limit.saturating_add(1).saturating_add(skip);
        let mut found = slot
            .with(|domain| domain.mappings(&self.host.kernel, from_iova, ask))
            .map_err(WireError::into_status)?;
        let begins_at = |iova: Iova| move |mapping: &&MappingState| mapping.range.base() == iova;
        // Those that were given already; fewer when some are gone meanwhile.
        let skipped = found.iter().take(skip).take_while(begins_at(from_iova)).count();
        let next_iova = found.get(skipped + limit).map(|next| next.range.base());
        let before_next = &found[..found.len().min(skipped + limit)];
        let next_skip = next_iova.map_or(0, |next| before_next.iter().filter(begins_at(next)).count());
        // No more than there are records.
        let next_skip = u32::try_from(next_skip).unwrap_or(u32::MAX);
        let mappings = found.drain(skipped..).take(limit).map(|mapping| model::MappingState {
            iova: mapping.range.base(),
            size_bytes: mapping.range.size_bytes(),
            gpa: mapping.gpa,
            permissions: mapping.permissions,
            request_id: mapping.request_id,
        });
        Ok(Response::new(Mappings { mappings: mappings.collect(), next_iova, next_skip }.into()))
    }

    type DumpTablesStream = Feed<pb::DumpTablesResponse>;

    async fn dump_tables(
        &self,
        request: Request<pb::DumpTablesRequest>,
    ) -> Result<Response<Self::DumpTablesStream>, Status> {
        let caller = Caller::of(&request)?;
        let DumpTables { device: address, without_page_tables } = parse(request.into_inner())?;
        let device = self.device(&caller, address).map_err(WireError::into_status)?;
        // The creator of a machine wrote its tables; of the host's, a driver sees neither places nor raw entries.
        let physical = caller.sees_all() || matches!(device.home, Home::Machine(_));
        let (inspect, looking) = (self.clone(), caller.clone());
        let stream = feed(&self.host, &caller, None, |sender| async move {
            let unit = Arc::clone(inspect.unit(&device));
            let mut dump = Dump::new(unit, address.source_id, without_page_tables);
            let mut left = bounds::DUMP_ENTRIES_MAX;
            loop {
                let take = left.min(bounds::ITEMS_PER_MESSAGE_MAX);
                let taken = inspect.while_tables_stay(&looking, &device, |scope| {
                    dump.resume(scope);
                    dump.by_ref().take(take).collect::<Vec<_>>()
                });
                let entries: Vec<pb::WalkStep> = match taken {
                    Ok(taken) => taken.into_iter().map(|entry| shown(entry, physical)).collect(),
                    Err(error) => return sender.send(Err(error.into_status())).await,
                };
                if entries.is_empty() {
                    return Ok(());
                }
                left -= entries.len();
                sender.send(Ok(pb::DumpTablesResponse { entries })).await?;
                tokio::task::yield_now().await;
            }
        });
        Ok(Response::new(stream))
    }

    async fn dump_iotlb(
        &self,
        request: Request<pb::DumpIotlbRequest>,
    ) -> Result<Response<pb::DumpIotlbResponse>, Status> {
        let caller = Caller::of(&request)?;
        let DumpIotlb { domain_id, limit } = parse(request.into_inner())?;
        if let Some(id) = domain_id {
            let slot = self.host.domains.get(id).map_err(WireError::into_status)?;
            caller.must_see(Some(slot.owner), format!("domain {id}")).map_err(WireError::into_status)?;
        }
        let own = self.host.domains.list(|slot| caller.sees(Some(slot.owner)));
        let own: HashSet<_> = own.iter().map(|slot| slot.id).collect();
        let unit = self.host.kernel.unit();
        let mut entries: Vec<_> = unit
            .iotlb_entries()
            .into_iter()
            .filter(|entry| domain_id.is_none_or(|id| id == entry.domain_id))
            .filter(|entry| caller.sees_all() || own.contains(&entry.domain_id))
            .collect();
        entries.sort_by_key(|entry| (entry.domain_id, entry.iova));
        let dumped = DumpedIotlb {
            total: entries.len() as u64,
            capacity: unit.iotlb_capacity() as u64,
            entries: entries
                .into_iter()
                .take(limited(limit))
                .map(|entry| model::IotlbEntry {
                    domain_id: entry.domain_id,
                    iova: entry.iova,
                    page_bytes: entry.size,
                    hpa: if caller.sees_all() { entry.hpa } else { Hpa::new(0) },
                    permissions: entry.permissions,
                    first_byte: entry.extent.map(|extent| extent.first().into()),
                    last_byte: entry.extent.map(|extent| extent.last().into()),
                })
                .collect(),
        };
        Ok(Response::new(dumped.into()))
    }

    async fn get_counters(
        &self,
        request: Request<pb::GetCountersRequest>,
    ) -> Result<Response<pb::GetCountersResponse>, Status> {
        let caller = Caller::of(&request)?;
        let GetCounters { segment } = parse(request.into_inner())?;
        let of = match segment {
            Some(segment) => self.machine(&caller, segment)?.unit().counters(),
            None if caller.session.bare().is_some() => {
                return Err(UnknownMachine { segment: 0 }.into_status());
            }
            None => self.host.kernel.unit().counters(),
        };
        Ok(Response::new(counters(of).into()))
    }

    async fn explain(
        &self,
        request: Request<pb::ExplainRequest>,
    ) -> Result<Response<pb::ExplainResponse>, Status> {
        let caller = Caller::of(&request)?;
        let Explain { device: address, pasid, iova, access, size_bytes } = parse(request.into_inner())?;
        let device = self.device(&caller, address).map_err(WireError::into_status)?;
        let unit = self.unit(&device);
        let explain = |_| unit.explain(address.source_id, pasid, Iova::new(iova.get()), access, size_bytes);
        let mut explanation =
            self.while_tables_stay(&caller, &device, explain).map_err(WireError::into_status)?;
        // Ring tables do not name their domain; the topology does.
        let attached = self.host.topology.read().device(address).ok().and_then(|entry| entry.domain_id);
        if let Some(attached) = attached {
            if let Outcome::Translated(translation) = &mut explanation.outcome {
                translation.domain_id = attached;
            }
            if let Some(stale) = &mut explanation.stale {
                stale.domain_id = attached;
            }
        }
        let physical = caller.sees_all() || matches!(device.home, Home::Machine(_));
        let explanation = if physical { explanation } else { without_physical(explanation) };
        Ok(Response::new(Explained { segment: address.segment, explanation }.into()))
    }
}
