//! Protection modes over the wire: every mode does what drivers ask, each error of its own, and what it promises after an unmap.

mod support;

use iommu_proto::pb;
use iommu_proto::pb::Protection::{self, Bounce, Deferred, Passthrough, Persistent, Ring, Shared, Strict};
use iommu_proto::pb::domain_options::Parameters;
use support::*;

const ALL: [Protection; 7] = [Passthrough, Strict, Deferred, Shared, Persistent, Bounce, Ring];
/// Longer than any test: what happens is not for the clock.
const LONG_MS: u32 = 10_000;

fn with(protection: Protection, parameters: Parameters) -> pb::DomainOptions {
    pb::DomainOptions { parameters: Some(parameters), ..mode(protection) }
}
fn rings(count: u32, slots: u32) -> pb::DomainOptions {
    with(Ring, Parameters::Ring(pb::Rings { count, slots }))
}
fn quota(pages_max: u32) -> pb::DomainOptions {
    with(Persistent, Parameters::Persistent(pb::PersistentQuota { pages_max }))
}
fn pool(bytes_max: u64) -> pb::DomainOptions {
    with(Bounce, Parameters::Bounce(pb::BouncePool { bytes_max }))
}

/// A buffer's whole life, in every way that the DMA API has, in one mode.
async fn check_dma_api(driver: &Driver, agent: &mut Agent, protection: Protection) {
    let id = driver.domain(mode(protection)).await;
    let gpa = driver.buffer(4 * PAGE).await;
    let (at, size_bytes) = (gpa + 200, 100);
    // Single: the CPU's bytes reach the device, the device's bytes the CPU.
    driver.write(at, b"from the cpu").await;
    let iova = driver.map(ENGINE0, at, size_bytes).await.unwrap();
    assert_eq!(agent.read(iova, 12).await.unwrap(), "from the cpu", "{protection:?}");
    agent.write(iova, b"from it").await.unwrap();
    driver.sync(iova, size_bytes, pb::SyncFor::Cpu).await.unwrap();
    assert_eq!(driver.read(at, 7).await, "from it", "{protection:?}");
    driver.write(at, b"synced!").await;
    driver.sync(iova, 7, pb::SyncFor::Device).await.unwrap();
    assert_eq!(agent.read(iova, 7).await.unwrap(), "synced!", "{protection:?}");
    agent.write(iova, b"at last").await.unwrap();
    let mapped = driver.domain_state(id).await;
    assert!(mapped.mappings >= 1 && mapped.maps >= 1, "{mapped:?}");
    driver.unmap(ENGINE0, iova, size_bytes).await.unwrap();
    assert_eq!(driver.read(at, 7).await, "at last", "{protection:?}");
    // Scatter-gather: the device sees the pieces, one after the other.
    driver.write(gpa + 2 * PAGE, b"second").await;
    let pieces = [(gpa, 8), (gpa + 2 * PAGE, PAGE)];
    let segments = driver.map_sg(&pieces).await.unwrap();
    let bytes: u64 = segments.iter().map(|segment| segment.1).sum();
    assert_eq!(bytes, 8 + PAGE, "{protection:?}: {segments:?}");
    let (last, last_bytes) = *segments.last().unwrap();
    assert_eq!(agent.read(last + last_bytes - PAGE, 6).await.unwrap(), "second", "{protection:?}");
    driver.unmap_sg(segments[0].0, 2).await.unwrap();
    // Coherent: both see the same bytes, without a sync.
    let coherent = driver.coherent(100).await.unwrap();
    driver.write(coherent.gpa, b"ring").await;
    assert_eq!(agent.read(coherent.iova, 4).await.unwrap(), "ring", "{protection:?}");
    agent.write(coherent.iova + 8, b"done").await.unwrap();
    assert_eq!(driver.read(coherent.gpa + 8, 4).await, "done", "{protection:?}");
    driver.free_coherent(coherent).await.unwrap();
    // Nothing is left that keeps the buffer, whatever the mode keeps for itself.
    driver.free(gpa).await.unwrap();
    let left = driver.domain_state(id).await;
    assert_eq!((left.pending_flushes, left.idle_mappings), (0, 0), "{protection:?}");
    driver.attach(ENGINE0, None).await.unwrap();
    driver.destroy(id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dma_api_works_on_the_attached_domain_in_every_mode() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let operator = operator(&server).await;
    let free = async || topology(&operator).await.memory_free_bytes;
    driver.unmap(ENGINE0, driver.map(ENGINE0, driver.buffer(1).await, 1).await.unwrap(), 1).await.unwrap();
    // Tables that a unit has for a device, whatever its domains.
    let ring = driver.domain(mode(Ring)).await;
    driver.attach(ENGINE0, None).await.unwrap();
    driver.destroy(ring).await.unwrap();
    let before = free().await;
    for protection in ALL {
        check_dma_api(&driver, &mut agent, protection).await;
        assert_eq!(free().await, before, "{protection:?} leaves nothing behind");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_domain_shows_what_was_chosen_the_usual_parameters_included() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let page = pb::MappingGranularity::Page;
    for (asked, granularity, parameters) in [
        (mode(Passthrough), page, None),
        (mode(Strict), page, None),
        (mode(Deferred), page, Some(Parameters::Deferred(pb::Deferral { batch: 256, interval_ms: 10 }))),
        (mode(Shared), page, None),
        (mode(Persistent), page, Some(Parameters::Persistent(pb::PersistentQuota { pages_max: 4096 }))),
        (mode(Bounce), page, Some(Parameters::Bounce(pb::BouncePool { bytes_max: 16 << 20 }))),
        (
            mode(Ring),
            pb::MappingGranularity::Byte,
            Some(Parameters::Ring(pb::Rings { count: 2, slots: 1024 })),
        ),
        (rings(3, 16), pb::MappingGranularity::Byte, rings(3, 16).parameters),
        (deferred(7, 8), page, deferred(7, 8).parameters),
    ] {
        let id = driver.create_domain(asked).await.unwrap();
        let shown = driver.domain_state(id).await.options.unwrap();
        let expected = pb::DomainOptions {
            protection: asked.protection,
            granularity: granularity.into(),
            allocator: pb::IovaAllocation::Cached.into(),
            walk_cache: pb::WalkCachePolicy::OnReclaim.into(),
            width_bits: 48,
            sanitizer: false,
            parameters,
        };
        assert_eq!(shown, expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn choices_that_make_no_sense_are_refused_by_name() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let granular = |protection, granularity: pb::MappingGranularity| pb::DomainOptions {
        granularity: granularity.into(),
        ..mode(protection)
    };
    let (page, byte) = (pb::MappingGranularity::Page, pb::MappingGranularity::Byte);
    for (options, field) in [
        (pb::DomainOptions::default(), "protection"),
        (pb::DomainOptions { protection: 99, ..Default::default() }, "protection"),
        (pb::DomainOptions { width_bits: 40, ..mode(Strict) }, "width_bits"),
        (pb::DomainOptions { allocator: 9, ..mode(Strict) }, "allocator"),
        (pb::DomainOptions { walk_cache: 9, ..mode(Strict) }, "walk_cache"),
        // Parameters of another mode, and of none.
        (pb::DomainOptions { parameters: deferred(1, 1).parameters, ..mode(Strict) }, "deferred"),
        (pb::DomainOptions { parameters: rings(1, 2).parameters, ..mode(Deferred) }, "ring"),
        (pb::DomainOptions { parameters: pool(1 << 20).parameters, ..mode(Persistent) }, "bounce"),
        (pb::DomainOptions { parameters: quota(1).parameters, ..mode(Bounce) }, "persistent"),
        // Out of bounds.
        (deferred(0, 10), "deferred.batch"),
        (deferred(1, 0), "deferred.interval_ms"),
        (quota(0), "persistent.pages_max"),
        (pool(4096), "bounce.bytes_max"),
        (rings(0, 16), "ring.count"),
        (rings(1, 1), "ring.slots"),
        (rings(70_000, 16), "ring.count"),
        // Combinations without a meaning.
        (granular(Passthrough, byte), "granularity"),
        (granular(Bounce, byte), "granularity"),
        (granular(Ring, page), "granularity"),
    ] {
        let status = driver.create_domain(options).await.expect_err("must be refused");
        assert_eq!(reason(&status), "INVALID_FIELD", "{options:?}");
        assert!(status.message().contains(field), "{field}: {}", status.message());
    }
    let nothing = pb::CreateDomainRequest { header: driver.header(), options: None };
    assert_eq!(refused(driver.client().create_domain(nothing).await), "INVALID_FIELD");
    let listed = inspect(&driver.channel).list_domains(pb::ListDomainsRequest { owner: None }).await;
    assert_eq!(listed.unwrap().into_inner().domains.len(), 1, "nothing half done: the default domain");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unmap_that_does_not_fit_is_refused_in_every_mode_and_changes_nothing() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(2 * PAGE).await;
    for protection in ALL {
        let id = driver.domain(mode(protection)).await;
        let iova = driver.map(ENGINE0, gpa, 100).await.unwrap();
        let segments = driver.map_sg(&[(gpa + PAGE, 64), (gpa + PAGE + 64, 64)]).await.unwrap();
        let before = driver.domain_state(id).await;
        let wrong_size = driver.unmap(ENGINE0, iova, 99).await;
        assert_eq!(refused(wrong_size), "SIZE_MISMATCH", "{protection:?}");
        let direction = pb::Direction::ToDevice.into();
        let wrong = pb::DmaUnmapRequest { direction, ..driver.unmap_request(iova, 100) };
        assert_eq!(refused(driver.dma_unmap(wrong).await), "DIRECTION_MISMATCH", "{protection:?}");
        assert_eq!(refused(driver.unmap_sg(iova, 1).await), "WRONG_FUNCTION", "{protection:?}: not so");
        assert_eq!(refused(driver.unmap_sg(segments[0].0, 3).await), "INVALID_FIELD", "{protection:?}");
        let as_single = driver.unmap(ENGINE0, segments[0].0, segments[0].1).await;
        assert_eq!(refused(as_single), "WRONG_FUNCTION", "{protection:?}");
        let as_coherent = pb::AllocateCoherentResponse { gpa, iova, size_bytes: 0 };
        let as_coherent = refused(driver.free_coherent(as_coherent).await);
        assert!(["WRONG_FUNCTION", "SIZE_MISMATCH"].contains(&as_coherent.as_str()), "{protection:?}");
        assert_eq!(refused(driver.sync(iova + 99, 2, pb::SyncFor::Cpu).await), "OUTSIDE_MAPPING");
        let after = driver.domain_state(id).await;
        assert_eq!((after.mappings, after.unmaps), (before.mappings, before.unmaps), "{protection:?}");
        driver.unmap(ENGINE0, iova, 100).await.unwrap();
        driver.unmap_sg(segments[0].0, 2).await.unwrap();
        assert_eq!(refused(driver.unmap(ENGINE0, iova, 100).await), "NOT_MAPPED", "{protection:?}");
        assert_eq!(refused(driver.sync(iova, 1, pb::SyncFor::Cpu).await), "NOT_MAPPED", "{protection:?}");
        driver.attach(ENGINE0, None).await.unwrap();
        driver.destroy(id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_out_is_named_and_comes_back_with_the_next_unmap() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(2 << 20).await;
    // Mode, bytes of each mapping, how many fit, and what is said of one more.
    for (options, size_bytes, fit, error) in [
        (rings(1, 2), 64, 2, "RING_OVERFLOW"),
        (quota(3), PAGE, 3, "LIMIT_REACHED"),
        (pool(1 << 20), 512 << 10, 2, "LIMIT_REACHED"),
    ] {
        let id = driver.domain(options).await;
        let mut mapped = Vec::new();
        for n in 0..fit {
            mapped.push(driver.map(ENGINE0, gpa + n * size_bytes, size_bytes).await.unwrap());
        }
        let before = driver.domain_state(id).await;
        let one_more = driver.map(ENGINE0, gpa + fit * size_bytes, size_bytes).await;
        assert_eq!(refused(one_more), error, "{options:?}");
        let after = driver.domain_state(id).await;
        assert_eq!((after.mappings, after.mapped_bytes), (before.mappings, before.mapped_bytes));
        driver.unmap(ENGINE0, mapped[0], size_bytes).await.unwrap();
        driver.map(ENGINE0, gpa + fit * size_bytes, size_bytes).await.unwrap();
        driver.attach(ENGINE0, None).await.unwrap();
        driver.destroy(id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exhausted_address_space_is_an_error_and_every_address_below_the_mask_was_given() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(PAGE).await;
    for (options, bits) in [(mode(Strict), 16), (deferred(4, LONG_MS), 16), (mode(Strict), 13)] {
        let id = driver.domain(options).await;
        driver.limit(Some(bits), None).await.unwrap();
        let mut mapped = Vec::new();
        let refusal = loop {
            match driver.map(ENGINE0, gpa, PAGE).await {
                Ok(iova) => mapped.push(iova),
                Err(status) => break reason(&status),
            }
        };
        assert_eq!(refusal, "IOVA_EXHAUSTED");
        mapped.sort_unstable();
        let all: Vec<u64> = (1..1 << (bits - 12)).map(|page| page << 12).collect();
        assert_eq!(mapped, all, "every page but the first");
        // What waits for a flush is flushed when it is needed.
        driver.unmap(ENGINE0, mapped[0], PAGE).await.unwrap();
        assert_eq!(driver.map(ENGINE0, gpa, PAGE).await.unwrap(), mapped[0]);
        driver.limit(Some(64), None).await.unwrap();
        assert!(driver.map(ENGINE0, gpa, PAGE).await.unwrap() >= 1 << bits);
        driver.attach(ENGINE0, None).await.unwrap();
        driver.destroy(id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_hold_and_go_with_the_device() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(4 * PAGE).await;
    assert_eq!(refused(driver.limit(Some(11), None).await), "INVALID_FIELD");
    assert_eq!(refused(driver.limit(None, Some(0)).await), "INVALID_FIELD");
    driver.limit(Some(20), None).await.unwrap();
    let limits = driver.limit(None, Some(PAGE)).await.unwrap();
    assert_eq!((limits.mask_bits, limits.segment_bytes_max), (20, PAGE), "one does not undo the other");
    let strict = driver.domain(mode(Strict)).await;
    let iova = driver.map(ENGINE0, gpa, PAGE).await.unwrap();
    assert!(iova < 1 << 20, "{iova:#x}: the mask came with the device");
    assert_eq!(refused(driver.map(ENGINE0, gpa, PAGE + 1).await), "SEGMENT_OVER_LIMIT");
    let segments = driver.map_sg(&[(gpa, 2 * PAGE)]).await;
    assert!(segments.is_err() || segments.unwrap().iter().all(|segment| segment.1 <= PAGE));
    let ring = driver.create_domain(mode(Ring)).await.unwrap();
    assert_eq!(refused(driver.attach(ENGINE0, Some(ring)).await), "LIMIT_REACHED");
    assert_eq!(driver.domain_state(strict).await.devices, [device(ENGINE0)], "it stayed where it was");
    driver.limit(Some(64), None).await.unwrap();
    driver.attach(ENGINE0, Some(ring)).await.unwrap();
    assert_eq!(refused(driver.limit(Some(63), None).await), "MODE_REFUSES");
    // Addresses that are the memory's own cannot be had below a mask that the memory is not below.
    driver.attach(ENGINE0, None).await.unwrap();
    driver.limit(Some(20), Some(u64::MAX)).await.unwrap();
    let high = driver.buffer(4 << 20).await + (3 << 20);
    driver.domain(mode(Shared)).await;
    assert_eq!(refused(driver.map(ENGINE0, high, PAGE).await), "BEYOND_MASK");
    // Whoever has the device next begins anew.
    let operator = operator(&server).await;
    let give = |number| pb::AttachToOwnerRequest {
        device: Some(device(ENGINE0)),
        owner: Some(owner(number)),
        domain_id: None,
    };
    admin(&operator).attach_to_owner(give(1)).await.unwrap();
    admin(&operator).attach_to_owner(give(0)).await.unwrap();
    assert_eq!(driver.limit(None, None).await.unwrap().mask_bits, 64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn modes_whose_addresses_are_not_the_callers_refuse_fixed_maps() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(PAGE).await;
    for (protection, refuses) in [(Passthrough, true), (Ring, true), (Strict, false)] {
        let id = driver.create_domain(mode(protection)).await.unwrap();
        let (header, permissions) = (driver.header(), Some(pb::Permissions { read: true, write: false }));
        let map = pb::MapRequest { header, domain_id: id, iova: 1 << 30, gpa, size_bytes: PAGE, permissions };
        let mapped = driver.client().map(map).await;
        assert_eq!(mapped.is_err(), refuses, "{protection:?}");
        if refuses {
            assert_eq!(refused(mapped), "MODE_REFUSES", "{protection:?}");
        }
    }
    let on_a_ring = pb::DmaMapRequest { ring: 1, ..driver.map_request(gpa, PAGE) };
    assert_eq!(refused(driver.dma_map(on_a_ring).await), "INVALID_FIELD", "strict has no rings");
    driver.domain(rings(2, 8)).await;
    driver.dma_map(pb::DmaMapRequest { header: driver.header(), ..on_a_ring }).await.unwrap();
    let beyond = pb::DmaMapRequest { ring: 2, ..driver.map_request(gpa, PAGE) };
    assert_eq!(refused(driver.dma_map(beyond).await), "INVALID_FIELD");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deferred_unmap_is_answered_at_once_and_flushed_with_its_batch() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let id = driver.domain(deferred(4, LONG_MS)).await;
    let gpa = driver.buffer(4 * PAGE).await;
    let mut mapped = Vec::new();
    for n in 0..4 {
        let iova = driver.map(ENGINE0, gpa + n * PAGE, PAGE).await.unwrap();
        agent.write(iova, &[1]).await.unwrap();
        mapped.push(iova);
    }
    for (n, iova) in mapped[..3].iter().enumerate() {
        driver.unmap(ENGINE0, *iova, PAGE).await.unwrap();
        let state = driver.domain_state(id).await;
        assert_eq!((state.pending_flushes, state.flushes), (n as u64 + 1, 0));
        assert!(state.oldest_pending_us.is_some());
        agent.write(*iova, &[2]).await.expect("the translation is stale, and there");
    }
    assert_eq!(driver.read(gpa, 1).await[..], [2]);
    driver.unmap(ENGINE0, mapped[3], PAGE).await.unwrap();
    let state = driver.domain_state(id).await;
    assert_eq!((state.pending_flushes, state.oldest_pending_us, state.flushes), (0, None, 1));
    for iova in mapped {
        assert_eq!(agent.write(iova, &[3]).await, Err(5));
    }
    driver.free(gpa).await.unwrap();
    // What a domain has done is still counted when it is gone.
    driver.attach(ENGINE0, None).await.unwrap();
    for gone in [false, true] {
        if gone {
            driver.destroy(id).await.unwrap();
        }
        let text = metrics(&server);
        let line = "iommu_domain_flushes_total{mode=\"deferred\"} 1\n";
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deferred_unmap_waits_no_longer_than_its_time() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let id = driver.domain(mode(Deferred)).await;
    let gpa = driver.buffer(PAGE).await;
    // More than once: the sleeper sleeps again.
    for round in 1..=3 {
        let iova = driver.map(ENGINE0, gpa, PAGE).await.unwrap();
        agent.write(iova, &[1]).await.unwrap();
        driver.unmap(ENGINE0, iova, PAGE).await.unwrap();
        eventually("10 ms are over", async || driver.domain_state(id).await.pending_flushes == 0).await;
        assert_eq!(driver.domain_state(id).await.flushes, round);
        assert_eq!(agent.write(iova, &[1]).await, Err(5));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ring_is_invalidated_at_the_end_of_the_burst() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let id = driver.domain(rings(1, 16)).await;
    let (gpa, other) = (driver.buffer(PAGE).await, driver.buffer(PAGE).await);
    let first = driver.map(ENGINE0, gpa, 64).await.unwrap();
    let second = driver.map(ENGINE0, other, 64).await.unwrap();
    agent.write(first, &[1]).await.unwrap();
    let before = driver.domain_state(id).await.invalidations;
    let unmap = |iova, end_of_burst| pb::DmaUnmapRequest {
        end_of_burst: Some(end_of_burst),
        ..driver.unmap_request(iova, 64)
    };
    driver.dma_unmap(unmap(first, false)).await.unwrap();
    assert_eq!(driver.domain_state(id).await.invalidations, before, "the burst goes on");
    agent.write(first, &[2]).await.expect("one of at most two stale slots");
    driver.dma_unmap(unmap(second, true)).await.unwrap();
    assert_eq!(driver.domain_state(id).await.invalidations, before + 1);
    agent.write(first, &[3]).await.expect_err("the burst is over");
    agent.write(second, &[3]).await.expect_err("the burst is over");
    assert_eq!(driver.read(gpa, 1).await[..], [2]);
    // Memory that goes back ends it too: no stale slot may lead to what is another's.
    let third = driver.map(ENGINE0, gpa, 64).await.unwrap();
    agent.write(third, &[4]).await.unwrap();
    driver.dma_unmap(unmap(third, false)).await.unwrap();
    driver.free(gpa).await.unwrap();
    agent.write(third, &[5]).await.expect_err("it was freed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_of_the_stream_is_one_burst_of_its_ring() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let id = driver.domain(rings(2, 64)).await;
    let gpa = driver.buffer(32 * PAGE).await;
    let (up, requests) = tokio::sync::mpsc::channel(8);
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut answers = driver.client().dma_stream(requests).await.unwrap().into_inner();
    let mut ask = async |batch| {
        let device = Some(device(ENGINE0));
        let request = pb::DmaStreamRequest { header: driver.header(), device, batch: Some(batch) };
        up.send(request).await.unwrap();
        answers.message().await.unwrap().unwrap()
    };
    let direction = pb::Direction::FromDevice.into();
    let map = |ring| pb::DmaMapBatch {
        gpa: (0..32).map(|page| gpa + page * PAGE).collect(),
        size_bytes: vec![1500],
        direction,
        attributes: None,
        ring,
    };
    for (ring, end_of_burst, invalidations) in [(1, Some(false), 0), (0, None, 1), (1, Some(true), 1)] {
        let mapped = ask(pb::dma_stream_request::Batch::Map(map(ring))).await;
        assert_eq!((mapped.iova.len(), mapped.errors.len()), (32, 0));
        let before = driver.domain_state(id).await.invalidations;
        let (iova, size_bytes) = (mapped.iova, vec![1500]);
        let unmap = pb::DmaUnmapBatch { iova, size_bytes, direction, attributes: None, end_of_burst };
        assert_eq!(ask(pb::dma_stream_request::Batch::Unmap(unmap)).await.errors, []);
        let made = driver.domain_state(id).await.invalidations - before;
        assert_eq!(made, invalidations, "ring {ring}, {end_of_burst:?}");
    }
    let beyond = ask(pb::dma_stream_request::Batch::Map(map(2))).await;
    assert!(beyond.errors.len() == 32 && beyond.errors[0].reason == "INVALID_FIELD", "{beyond:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_direct_map_follows_the_owners_memory() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let early = driver.buffer(PAGE).await;
    driver.domain(mode(Passthrough)).await;
    let late = driver.buffer(PAGE).await;
    for gpa in [early, late] {
        agent.write(gpa, b"open").await.expect("without any map");
        assert_eq!(driver.read(gpa, 4).await, "open");
    }
    // A refused free leaves it open: as a mapping, and to whoever uses it without.
    let iova = driver.map(ENGINE0, late, PAGE).await.unwrap();
    assert_eq!(iova, late, "the device's addresses are the owner's");
    assert_eq!(refused(driver.free(late).await), "STILL_MAPPED");
    agent.write(late, b"still").await.expect("it was not freed");
    driver.unmap(ENGINE0, iova, PAGE).await.unwrap();
    agent.write(late, b"always").await.expect("an unmap closes nothing");
    driver.free(late).await.unwrap();
    agent.write(late, b"gone").await.expect_err("it is the owner's no more");
    agent.write(early, b"there").await.unwrap();
    let stranger = Driver::open(&server, 1).await;
    let theirs = stranger.buffer(64 * PAGE).await + 32 * PAGE;
    agent.write(theirs, b"no").await.expect_err("what others have is never open");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kept_pages_keep_no_buffer_and_serve_the_next_map() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let id = driver.domain(mode(Persistent)).await;
    let gpa = driver.buffer(2 * PAGE).await;
    let iova = driver.map(ENGINE0, gpa, PAGE).await.unwrap();
    driver.unmap(ENGINE0, iova, PAGE).await.unwrap();
    assert_eq!(driver.domain_state(id).await.idle_mappings, 1);
    agent.write(iova, b"kept").await.expect("open by design");
    assert_eq!(driver.map(ENGINE0, gpa, PAGE).await.unwrap(), iova);
    assert_eq!(refused(driver.free(gpa).await), "STILL_MAPPED");
    driver.unmap(ENGINE0, iova, PAGE).await.unwrap();
    driver.free(gpa).await.unwrap();
    assert_eq!(driver.domain_state(id).await.idle_mappings, 0);
    agent.write(iova, b"gone").await.expect_err("the owner took it back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_domains_give_cached_addresses_back() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let id = driver.domain(mode(Strict)).await;
    let gpa = driver.buffer(PAGE).await;
    let mut mapped = Vec::new();
    for _ in 0..8 {
        mapped.push(driver.map(ENGINE0, gpa, PAGE).await.unwrap());
    }
    for iova in mapped {
        driver.unmap(ENGINE0, iova, PAGE).await.unwrap();
    }
    let state = driver.domain_state(id).await;
    assert_eq!(state.live_iova_ranges, 0);
    assert!(state.cached_iova_ranges > 0 && state.iova_allocations == 8, "{state:?}");
    let cached = state.cached_iova_ranges;
    let fewer = async || driver.domain_state(id).await.cached_iova_ranges < cached;
    eventually("the background task trims", fewer).await;
    for _turn in 0..32 {
        server.host.trim();
    }
    assert_eq!(driver.domain_state(id).await.cached_iova_ranges, 0, "an idle domain keeps none in the end");
    assert_eq!(server.host.trim(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_go_with_the_driver_that_named_them() {
    let server = server_with(|args| args.grace = Some("1ms".to_owned())).await;
    let operator = operator(&server).await;
    let driver = Driver::open(&server, 0).await;
    driver.limit(Some(16), Some(PAGE)).await.unwrap();
    drop(driver);
    let gone = async || !topology(&operator).await.owners[0].connected;
    eventually("the session ends", gone).await;
    let next = async || {
        let channel = connect(&server).await;
        let opened = open(&channel, open_request("driver0", driver_role(0))).await.ok()?;
        Some(Driver::on(channel, opened))
    };
    let mut driver = None;
    let is_there = async || {
        driver = next().await;
        driver.is_some()
    };
    eventually("the next driver has the owner", is_there).await;
    let driver = driver.unwrap();
    let gpa = driver.buffer(2 * PAGE).await;
    let iova = driver.map(ENGINE0, gpa, 2 * PAGE).await.expect("no segment limit is left");
    assert!(iova >= 1 << 16, "{iova:#x}: nor a mask");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_limits_refuse_leaves_no_domain_and_a_former_owners_limits_refuse_none() {
    let server = server().await;
    let operator = operator(&server).await;
    let (driver, other) = (Driver::open(&server, 0).await, Driver::open(&server, 1).await);
    driver.limit(Some(32), None).await.unwrap();
    let ring = other.create_domain(mode(Ring)).await.unwrap();
    let to = |number, domain_id| pb::AttachToOwnerRequest {
        device: Some(device(ENGINE0)),
        owner: Some(owner(number)),
        domain_id,
    };
    admin(&operator).attach_to_owner(to(1, Some(ring))).await.expect("the mask was the former owner's");
    assert_eq!(other.domain_state(ring).await.devices, [device(ENGINE0)]);
    // An unknown domain, and then one that is refused: no default domain of the pair is left.
    let before = topology(&operator).await.owners[0].domain_ids.clone();
    admin(&operator).attach_to_owner(to(0, Some(ring))).await.unwrap_err();
    assert_eq!(topology(&operator).await.owners[0].domain_ids, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mappings_are_listed_page_by_page_also_where_many_begin_at_one_address() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(2 * PAGE).await;
    for protection in [Shared, Strict] {
        let id = driver.domain(mode(protection)).await;
        let mut made = Vec::new();
        for size_bytes in [1, 2, 3] {
            for at in [gpa, gpa + 8, gpa + PAGE] {
                made.push((driver.map(ENGINE0, at, size_bytes).await.unwrap(), size_bytes));
            }
        }
        made.sort_unstable();
        for limit in [1, 2, 4, 9] {
            let mut request = pb::ListMappingsRequest { domain_id: id, from_iova: 0, skip: 0, limit };
            let mut seen = Vec::new();
            for _page in 0..made.len() {
                let page = inspect(&driver.channel).list_mappings(request).await.unwrap().into_inner();
                assert!(page.mappings.len() <= limit as usize);
                seen.extend(page.mappings.iter().map(|mapping| (mapping.iova, mapping.size_bytes)));
                let Some(from_iova) = page.next_iova else { break };
                request = pb::ListMappingsRequest { from_iova, skip: page.next_skip, ..request };
            }
            seen.sort_unstable();
            assert_eq!(seen, made, "{protection:?}, {limit} at a time");
        }
        let beyond = pb::ListMappingsRequest { domain_id: id, from_iova: 0, skip: u32::MAX, limit: 1 };
        let beyond = inspect(&driver.channel).list_mappings(beyond).await.unwrap().into_inner();
        assert_eq!(beyond.mappings.len(), 1, "none begins at 0, so none is skipped");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn coherent_memory_is_freed_by_its_own_names_and_again_after_a_refusal() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    for protection in [Strict, Shared, Passthrough, Bounce, Ring] {
        driver.domain(mode(protection)).await;
        let (one, other) = (driver.coherent(PAGE).await.unwrap(), driver.coherent(PAGE).await.unwrap());
        let crossed = pb::AllocateCoherentResponse { gpa: other.gpa, ..one };
        let crossed = refused(driver.free_coherent(crossed).await);
        assert!(["INVALID_FIELD", "NOT_MAPPED"].contains(&crossed.as_str()), "{protection:?}: {crossed}");
        driver.free_coherent(other).await.unwrap();
        // Mapped a second time, it stays; and the same call frees it later.
        let again = driver.map(ENGINE0, one.gpa, 64).await.unwrap();
        for _twice in 0..2 {
            assert_eq!(refused(driver.free_coherent(one).await), "STILL_MAPPED", "{protection:?}");
        }
        driver.unmap(ENGINE0, again, 64).await.unwrap();
        driver.free_coherent(one).await.unwrap();
        assert_eq!(refused(driver.free_coherent(one).await), "NOT_ALLOCATED", "{protection:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tables_of_a_device_behind_rings_are_its_rings() {
    use iommu_proto::pb::Structure::{RingDevice, RingRoot, RingSlot};
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let observer = observer(&server).await;
    let gpa = driver.buffer(PAGE).await;
    driver.domain(rings(2, 8)).await;
    let on = |ring| pb::DmaMapRequest { ring, ..driver.map_request(gpa + 8, 64) };
    let mut mapped = Vec::new();
    for ring in [0, 1, 1] {
        mapped.push(driver.dma_map(on(ring)).await.unwrap());
    }
    driver.unmap(ENGINE0, mapped[1], 64).await.unwrap();
    let dump = async |channel: &tonic::transport::Channel, without_page_tables| {
        let device = Some(device(ENGINE0));
        let request = pb::DumpTablesRequest { device, without_page_tables };
        let mut dumped = inspect(channel).dump_tables(request).await.unwrap().into_inner();
        let mut entries = Vec::new();
        while let Some(piece) = dumped.message().await.unwrap() {
            entries.extend(piece.entries);
        }
        entries
    };
    let seen = dump(&observer, false).await;
    let sorts: Vec<_> = seen.iter().map(pb::WalkStep::structure).collect();
    // The last ring is that of coherent memory.
    let ring = pb::Structure::Ring;
    assert_eq!(sorts, [RingRoot, RingDevice, ring, RingSlot, ring, RingSlot, ring]);
    let slots = seen.iter().filter(|step| step.structure() == RingSlot);
    let slots: Vec<_> = slots.map(|step| step.iova.unwrap()).collect();
    assert_eq!(slots, [mapped[0], mapped[2]], "only what is valid");
    assert!(seen.iter().all(|step| step.hpa != 0 && step.reading.starts_with("present")), "{seen:?}");
    assert_eq!(dump(&observer, true).await.len(), 2, "without the rings");
    // The driver sees that they are there, and not where.
    let own = dump(&driver.channel, false).await;
    assert!(
        own.len() == seen.len() && own.iter().all(|step| step.hpa == 0 && step.reading.is_empty()),
        "{own:?}"
    );
    driver.attach(ENGINE0, None).await.unwrap();
    let back = dump(&observer, false).await;
    assert_eq!(back[0].structure(), pb::Structure::Root);
}
