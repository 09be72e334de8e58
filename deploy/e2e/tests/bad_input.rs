//! Bad input, each refused with its own typed error, and nothing changed by it.

use bytes::{BufMut, Bytes, BytesMut};
use iommu_e2e::raw::{self, RawStream, ask, call, envelope, hello, open_request, reason};
use iommu_e2e::stage::{Stage, address, owner, within};
use iommu_proto::pb;
use iommu_proto::pb::device_to_server::Message as FromDevice;
use iommu_proto::pb::open_request::Role;
use iommu_types::{Access, DeviceAddress};
use prost::Message as _;
use tonic::transport::Channel;

const DRIVER: &str = "/iommu.v1.DriverService/";
const MEMORY: &str = "/iommu.v1.MemoryService/";
const INSPECT: &str = "/iommu.v1.InspectService/";
const OPEN: &str = "/iommu.v1.SessionService/Open";

/// Where the fixed mapping lies, and how many bytes it has.
const FIXED: u64 = 0x10_0000;
const FIXED_BYTES: u64 = 0x4000;
const BUFFER_BYTES: u64 = 0x1_0000;
/// First address of the last page there is.
const LAST_PAGE: u64 = !0xfff;

/// What the rows are about: a driver that holds a buffer, a mapping of each API, and its neighbour with a buffer and a domain.
struct Ground {
    stage: Stage,
    driver: Channel,
    _neighbour: Channel,
    gpa: u64,
    domain_id: u32,
    default_domain_id: u32,
    neighbours_domain_id: u32,
    single: u64,
}

/// A row: what it claims, the method, the message, the reason of the refusal.
struct Row(&'static str, String, Bytes, &'static str);

fn header(request_id: u64) -> Option<pb::RequestHeader> {
    Some(pb::RequestHeader { request_id, acknowledged_through: 0 })
}

fn device(number: u32) -> Option<pb::DeviceAddress> {
    Some(address(number).into())
}

async fn create_domain(channel: &Channel, request_id: u64) -> u32 {
    let create = pb::CreateDomainRequest {
        header: header(request_id),
        options: Some(pb::DomainOptions { protection: pb::Protection::Strict.into(), ..Default::default() }),
    };
    let created: pb::CreateDomainResponse =
        ask(channel, "/iommu.v1.DriverService/CreateDomain", &create).await.expect("a domain");
    created.domain_id
}

impl Ground {
    async fn prepare() -> Self {
        let stage = Stage::start(&[]).await;
        let driver = raw::driver(&stage.server.unix_endpoint(), 0).await;
        let allocate = pb::AllocateBufferRequest { header: header(1), size_bytes: BUFFER_BYTES };
        let buffer: pb::AllocateBufferResponse =
            ask(&driver, "/iommu.v1.DriverService/AllocateBuffer", &allocate).await.expect("memory");
        let gpa = buffer.gpa;
        let domain_id = create_domain(&driver, 2).await;
        let map = pb::MapRequest {
            header: header(3),
            domain_id,
            iova: FIXED,
            gpa,
            size_bytes: FIXED_BYTES,
            permissions: Some(pb::Permissions { read: true, write: true }),
        };
        let _: pb::MapResponse = ask(&driver, "/iommu.v1.DriverService/Map", &map).await.expect("a mapping");
        let single = pb::DmaMapRequest {
            header: header(4),
            device: device(0),
            gpa: gpa + 0x123,
            size_bytes: 100,
            direction: pb::Direction::ToDevice.into(),
            attributes: None,
            ring: 0,
        };
        let single: pb::DmaMapResponse = ask(&driver, "/iommu.v1.DriverService/DmaMap", &single)
            .await
            .expect("the DMA API takes any offset");
        assert_eq!(single.iova & 0xfff, (gpa + 0x123) & 0xfff, "the offset in the page is kept");
        let neighbour = raw::driver(&stage.server.unix_endpoint(), 1).await;
        let neighbours_domain_id = create_domain(&neighbour, 1).await;
        let default_domain_id = stage.device_state(0).await.domain_id.expect("attached from the start").get();
        Self {
            stage,
            driver,
            _neighbour: neighbour,
            gpa,
            domain_id,
            default_domain_id: default_domain_id.into(),
            neighbours_domain_id,
            single: single.iova,
        }
    }

    /// Every row is refused with its reason, the reason is one of the schema's table with the code of that table, and nothing changes.
    async fn check(&self, rows: Vec<Row>) {
        let before = self.stage.holdings().await;
        for Row(claim, method, message, expected) in rows {
            let status = match call(&self.driver, &method, message).await {
                Err(status) => status,
                Ok(answer) => panic!("{claim}: {expected} was expected, and it was answered with {answer:?}"),
            };
            assert_eq!(reason(&status), expected, "{claim}: {status:?}");
            let row = iommu_proto::errors::REASONS.iter().find(|row| row.reason == expected);
            assert_eq!(Some(status.code()), row.map(|row| row.code), "{claim}: the code of the table");
            assert_eq!(self.stage.holdings().await, before, "{claim}: nothing changes");
        }
    }
}

fn row(
    claim: &'static str,
    service: &str,
    method: &str,
    message: &impl prost::Message,
    expected: &'static str,
) -> Row {
    Row(claim, format!("{service}{method}"), message.encode_to_vec().into(), expected)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dma_api_refuses_each_nonsense_with_its_own_reason() {
    within(60, async {
        let ground = Ground::prepare().await;
        let good = pb::DmaMapRequest {
            header: header(100),
            device: device(0),
            gpa: ground.gpa,
            size_bytes: 64,
            direction: pb::Direction::ToDevice.into(),
            attributes: None,
            ring: 0,
        };
        let map = |claim, change: &dyn Fn(&mut pb::DmaMapRequest), expected| {
            let mut request = good;
            change(&mut request);
            row(claim, DRIVER, "DmaMap", &request, expected)
        };
        let mapped = pb::DmaUnmapRequest {
            header: header(101),
            device: device(0),
            iova: ground.single,
            size_bytes: 100,
            direction: pb::Direction::ToDevice.into(),
            attributes: None,
            end_of_burst: None,
        };
        let unmap = |claim, change: &dyn Fn(&mut pb::DmaUnmapRequest), expected| {
            let mut request = mapped;
            change(&mut request);
            row(claim, DRIVER, "DmaUnmap", &request, expected)
        };
        let undeclared: DeviceAddress = "00:1f.7".parse().expect("an address");
        // Each refused request has a number of its own, and the number is not used up by the refusal of its message.
        let mut rows = vec![
            map("a range of nothing", &|r| (r.header, r.size_bytes) = (header(10), 0), "INVALID_RANGE"),
            map("a range that wraps", &|r| (r.header, r.gpa) = (header(11), u64::MAX - 10), "INVALID_RANGE"),
            map("memory of nobody", &|r| (r.header, r.gpa) = (header(12), 1 << 40), "NOT_OWNED"),
            map(
                "more than the buffer",
                &|r| (r.header, r.size_bytes) = (header(13), BUFFER_BYTES + 1),
                "NOT_OWNED",
            ),
            map(
                "an undeclared device",
                &|r| (r.header, r.device) = (header(14), Some(undeclared.into())),
                "UNKNOWN_DEVICE",
            ),
            map("the neighbour's device", &|r| (r.header, r.device) = (header(15), device(1)), "NOT_YOURS"),
            map("no direction", &|r| (r.header, r.direction) = (header(16), 0), "INVALID_FIELD"),
            map(
                "a direction of a newer schema",
                &|r| (r.header, r.direction) = (header(17), 99),
                "INVALID_FIELD",
            ),
            map("no device", &|r| (r.header, r.device) = (header(18), None), "INVALID_FIELD"),
            map("no header", &|r| r.header = None, "INVALID_FIELD"),
            map(
                "a source beyond 16 bits",
                &|r| {
                    r.header = header(19);
                    r.device = Some(pb::DeviceAddress { segment: 0, source_id: 0x1_0000 });
                },
                "INVALID_FIELD",
            ),
            map("a number used before for something else", &|r| r.header = header(4), "REQUEST_REUSED"),
            unmap("unmap of nothing", &|r| (r.header, r.size_bytes) = (header(20), 0), "INVALID_RANGE"),
            unmap("unmap that wraps", &|r| (r.header, r.iova) = (header(21), u64::MAX - 1), "INVALID_RANGE"),
            unmap(
                "unmap where nothing is",
                &|r| (r.header, r.iova) = (header(22), 0x7777_0000),
                "NOT_MAPPED",
            ),
            unmap("unmap of a part", &|r| (r.header, r.size_bytes) = (header(23), 50), "SIZE_MISMATCH"),
            unmap("unmap of more", &|r| (r.header, r.size_bytes) = (header(24), 101), "SIZE_MISMATCH"),
            unmap(
                "unmap the other way",
                &|r| (r.header, r.direction) = (header(25), 3),
                "DIRECTION_MISMATCH",
            ),
            unmap(
                "unmap for the neighbour's device",
                &|r| (r.header, r.device) = (header(26), device(1)),
                "NOT_YOURS",
            ),
        ];
        let direction = pb::Direction::ToDevice.into();
        let sg = |claim, id, gpa: &[u64], size_bytes: &[u64], expected| {
            let (header, device, attributes) = (header(id), device(0), None);
            let (gpa, size_bytes) = (gpa.to_vec(), size_bytes.to_vec());
            let request =
                pb::DmaMapSgRequest { header, device, gpa, size_bytes, direction, attributes, ring: 0 };
            row(claim, DRIVER, "DmaMapSg", &request, expected)
        };
        rows.push(sg("no pieces", 40, &[], &[], "INVALID_FIELD"));
        rows.push(sg("a piece without a size", 41, &[ground.gpa; 2], &[64], "INVALID_FIELD"));
        rows.push(sg("a piece of nothing", 42, &[ground.gpa; 2], &[64, 0], "INVALID_RANGE"));
        rows.push(sg("a piece of nobody's", 43, &[ground.gpa, 1 << 40], &[64; 2], "NOT_OWNED"));
        let sync = |claim, id, iova, size_bytes, sync_for, expected| {
            let (header, device) = (header(id), device(0));
            let request = pb::DmaSyncRequest { header, device, iova, size_bytes, direction, sync_for };
            row(claim, DRIVER, "DmaSync", &request, expected)
        };
        rows.push(sync("a sync for nobody", 44, ground.single, 100, 0, "INVALID_FIELD"));
        rows.push(sync("a sync of nothing", 45, ground.single, 0, 1, "INVALID_RANGE"));
        rows.push(sync("a sync over the end", 46, ground.single + 90, 11, 1, "OUTSIDE_MAPPING"));
        rows.push(sync("a sync where nothing is", 47, 0x7777_0000, 4, 1, "NOT_MAPPED"));
        let limits = |claim, id, mask_bits, segment_boundary_mask| {
            let (header, device, segment_bytes_max) = (header(id), device(0), None);
            let request = pb::SetDmaLimitsRequest {
                header,
                device,
                mask_bits,
                segment_bytes_max,
                segment_boundary_mask,
            };
            row(claim, DRIVER, "SetDmaLimits", &request, "INVALID_FIELD")
        };
        rows.push(limits("a mask below a page", 48, Some(11), None));
        rows.push(limits("a mask that is none", 49, Some(65), None));
        rows.push(limits("a mask beyond 8 bits", 50, Some(256 + 32), None));
        rows.push(limits("a boundary with holes", 51, None, Some(0xf0fff)));
        rows.push(map(
            "a ring where there are none",
            &|r| (r.header, r.ring) = (header(52), 1),
            "INVALID_FIELD",
        ));
        rows.push(map(
            "a ring beyond 16 bits",
            &|r| (r.header, r.ring) = (header(53), 1 << 16),
            "INVALID_FIELD",
        ));
        let allocate = |id, size_bytes| pb::AllocateBufferRequest { header: header(id), size_bytes };
        rows.push(row("a buffer of nothing", DRIVER, "AllocateBuffer", &allocate(30, 0), "INVALID_FIELD"));
        rows.push(row(
            "more than the share of an owner",
            DRIVER,
            "AllocateBuffer",
            &allocate(31, 1 << 40),
            "LIMIT_REACHED",
        ));
        rows.push(row(
            "a size that wraps when rounded",
            DRIVER,
            "AllocateBuffer",
            &allocate(32, u64::MAX),
            "OUT_OF_MEMORY",
        ));
        let free = |id, gpa| pb::FreeBufferRequest { header: header(id), gpa };
        rows.push(row("a buffer that is none", DRIVER, "FreeBuffer", &free(33, 1 << 40), "NOT_ALLOCATED"));
        rows.push(row(
            "the middle of a buffer",
            DRIVER,
            "FreeBuffer",
            &free(34, ground.gpa + 0x1000),
            "NOT_ALLOCATED",
        ));
        rows.push(row(
            "a buffer that is mapped",
            DRIVER,
            "FreeBuffer",
            &free(35, ground.gpa),
            "STILL_MAPPED",
        ));
        ground.check(rows).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_domain_api_refuses_each_nonsense_with_its_own_reason() {
    within(60, async {
        let ground = Ground::prepare().await;
        let good = pb::MapRequest {
            header: header(100),
            domain_id: ground.domain_id,
            iova: 0x20_0000,
            gpa: ground.gpa,
            size_bytes: 0x1000,
            permissions: Some(pb::Permissions { read: true, write: false }),
        };
        let number = std::cell::Cell::new(10);
        let next = || {
            number.set(number.get() + 1);
            header(number.get())
        };
        let map = |claim, change: &dyn Fn(&mut pb::MapRequest), expected| {
            let mut request = pb::MapRequest { header: next(), ..good };
            change(&mut request);
            row(claim, DRIVER, "Map", &request, expected)
        };
        let unmap = |claim, domain_id, iova, size_bytes, expected| {
            let request = pb::UnmapRequest { header: next(), domain_id, iova, size_bytes };
            row(claim, DRIVER, "Unmap", &request, expected)
        };
        let domain = |claim, width_bits, protection, expected| {
            let options = Some(pb::DomainOptions { protection, width_bits, ..Default::default() });
            let request = pb::CreateDomainRequest { header: next(), options };
            row(claim, DRIVER, "CreateDomain", &request, expected)
        };
        let (strict, ring) = (pb::Protection::Strict.into(), pb::Protection::Ring.into());
        let rings = pb::domain_options::Parameters::Ring(pb::Rings { count: 1, slots: 1 << 20 });
        let chosen = |claim, options| {
            let request = pb::CreateDomainRequest { header: next(), options };
            row(claim, DRIVER, "CreateDomain", &request, "INVALID_FIELD")
        };
        let choice = |protection, parameters, granularity: i32| {
            Some(pb::DomainOptions { protection, parameters, granularity, ..Default::default() })
        };
        let nothing = pb::Permissions { read: false, write: false };
        let last_page = FIXED + FIXED_BYTES - 0x1000;
        let ours = ground.domain_id;
        let rows = vec![
            map("an unaligned address", &|r| r.iova += 1, "UNALIGNED"),
            map("unaligned memory", &|r| r.gpa += 0x10, "UNALIGNED"),
            map("an unaligned size", &|r| r.size_bytes = 0x1001, "UNALIGNED"),
            map("a range of nothing", &|r| r.size_bytes = 0, "INVALID_RANGE"),
            map("a range that wraps", &|r| (r.iova, r.size_bytes) = (LAST_PAGE, 0x2000), "INVALID_RANGE"),
            map("memory that wraps", &|r| (r.gpa, r.size_bytes) = (LAST_PAGE, 0x2000), "INVALID_RANGE"),
            map("the very mapping", &|r| r.iova = FIXED, "RANGE_OVERLAPS"),
            map("the last page of a mapping", &|r| r.iova = last_page, "RANGE_OVERLAPS"),
            map("around a mapping", &|r| (r.iova, r.size_bytes) = (FIXED - 0x1000, 0x6000), "RANGE_OVERLAPS"),
            map("page 0", &|r| r.iova = 0, "RESERVED_RANGE"),
            map("the interrupt range", &|r| r.iova = 0xfee0_1000, "RESERVED_RANGE"),
            map(
                "into the interrupt range",
                &|r| (r.iova, r.size_bytes) = (0xfedf_f000, 0x2000),
                "RESERVED_RANGE",
            ),
            map("beyond 48 bits", &|r| r.iova = 1 << 48, "BEYOND_WIDTH"),
            map("memory of nobody", &|r| r.gpa = 1 << 40, "NOT_OWNED"),
            map("an unknown domain", &|r| r.domain_id = 60_000, "UNKNOWN_DOMAIN"),
            map("the neighbour's domain", &|r| r.domain_id = ground.neighbours_domain_id, "NOT_YOURS"),
            map("a domain beyond 16 bits", &|r| r.domain_id = 0x1_0000, "INVALID_FIELD"),
            map("no permission at all", &|r| r.permissions = Some(nothing), "INVALID_FIELD"),
            map("permissions left out", &|r| r.permissions = None, "INVALID_FIELD"),
            unmap("the first page of a mapping", ours, FIXED, 0x1000, "SPLITS_MAPPING"),
            unmap("the last page of a mapping", ours, last_page, 0x1000, "SPLITS_MAPPING"),
            unmap("the middle of a mapping", ours, FIXED + 0x1000, 0x1000, "SPLITS_MAPPING"),
            unmap("an unaligned address", ours, FIXED + 8, FIXED_BYTES, "UNALIGNED"),
            unmap("an unaligned size", ours, FIXED, FIXED_BYTES - 8, "UNALIGNED"),
            unmap("a range of nothing", ours, FIXED, 0, "INVALID_RANGE"),
            unmap("a range that wraps", ours, LAST_PAGE, 0x2000, "INVALID_RANGE"),
            unmap("an unknown domain", 60_000, FIXED, FIXED_BYTES, "UNKNOWN_DOMAIN"),
            unmap("the neighbour's domain", ground.neighbours_domain_id, FIXED, FIXED_BYTES, "NOT_YOURS"),
            domain("a width that is none", 40, 1, "INVALID_FIELD"),
            domain("no protection", 48, 0, "INVALID_FIELD"),
            domain("a protection of a newer schema", 48, 77, "INVALID_FIELD"),
            chosen("no choice at all", None),
            chosen("parameters of another mode", choice(strict, Some(rings), 0)),
            chosen("parameters out of bounds", choice(ring, Some(rings), 0)),
            chosen("a granularity without a meaning", choice(ring, None, 1)),
            chosen("a granularity of a newer schema", choice(strict, None, 77)),
            row(
                "a domain in use",
                DRIVER,
                "DestroyDomain",
                &pb::DestroyDomainRequest { header: next(), domain_id: ground.default_domain_id },
                "DOMAIN_IN_USE",
            ),
            row(
                "an unknown domain",
                DRIVER,
                "DestroyDomain",
                &pb::DestroyDomainRequest { header: next(), domain_id: 60_000 },
                "UNKNOWN_DOMAIN",
            ),
            row(
                "attach to the neighbour's domain",
                DRIVER,
                "AttachDevice",
                &pb::AttachDeviceRequest {
                    header: next(),
                    device: device(0),
                    domain_id: Some(ground.neighbours_domain_id),
                },
                "NOT_YOURS",
            ),
            row(
                "detach the neighbour's device",
                DRIVER,
                "DetachDevice",
                &pb::DetachDeviceRequest { header: next(), device: device(1) },
                "NOT_YOURS",
            ),
        ];
        ground.check(rows).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registers_memory_and_inspection_refuse_each_nonsense_with_its_own_reason() {
    within(60, async {
        let ground = Ground::prepare().await;
        let register = pb::MmioReadRequest { device: device(0), bar: 0, offset: 0, width_bytes: 4 };
        let mmio = |claim, change: &dyn Fn(&mut pb::MmioReadRequest), expected| {
            let mut request = register;
            change(&mut request);
            row(claim, DRIVER, "MmioRead", &request, expected)
        };
        let read = |claim, owner: Option<pb::Owner>, gpa, size_bytes, expected| {
            row(claim, MEMORY, "Read", &pb::MemoryReadRequest { owner, gpa, size_bytes }, expected)
        };
        let write = |claim, gpa, data: Vec<u8>, expected| {
            let request = pb::MemoryWriteRequest { owner: None, gpa, data: data.into() };
            row(claim, MEMORY, "Write", &request, expected)
        };
        let explain = |claim, change: &dyn Fn(&mut pb::ExplainRequest), expected| {
            let mut request = pb::ExplainRequest {
                device: device(0),
                pasid: None,
                iova: FIXED,
                access: pb::Access::Read.into(),
                size_bytes: 4,
            };
            change(&mut request);
            row(claim, INSPECT, "Explain", &request, expected)
        };
        let (gpa, neighbour) = (ground.gpa, Some(owner(1).into()));
        let over = u64::from(iommu_proto::limits::BATCH_BYTES_MAX) + 1;
        let watch = pb::WatchFaultsRequest { filter: None, resume_token: "not a token".into() };
        let rows = vec![
            mmio("no agent is connected", &|_| {}, "DEVICE_ABSENT"),
            mmio("a width of 3", &|r| r.width_bytes = 3, "INVALID_FIELD"),
            mmio("a BAR that is none", &|r| r.bar = 6, "INVALID_FIELD"),
            mmio("an unaligned register", &|r| r.offset = 2, "INVALID_FIELD"),
            mmio("the neighbour's device", &|r| r.device = device(1), "NOT_YOURS"),
            mmio("a device of nobody", &|r| r.device = device(2), "NOT_YOURS"),
            read("nothing", None, gpa, 0, "INVALID_RANGE"),
            read("a range that wraps", None, u64::MAX - 3, 8, "INVALID_RANGE"),
            read("more than one message takes", None, gpa, over, "LIMIT_REACHED"),
            read("beyond the buffer", None, gpa, BUFFER_BYTES + 1, "NOT_OWNED"),
            read("the neighbour's memory", neighbour, gpa, 8, "NOT_YOURS"),
            write("nothing", gpa, Vec::new(), "INVALID_RANGE"),
            write("memory of nobody", 1 << 40, vec![1], "NOT_OWNED"),
            write("half outside", gpa + BUFFER_BYTES - 4, vec![1; 8], "NOT_OWNED"),
            explain("no access", &|r| r.access = 0, "INVALID_FIELD"),
            explain("an access of a newer schema", &|r| r.access = 9, "INVALID_FIELD"),
            explain("more than a page", &|r| r.size_bytes = 4097, "INVALID_FIELD"),
            explain("a PASID beyond 20 bits", &|r| r.pasid = Some(1 << 20), "INVALID_FIELD"),
            explain("the neighbour's device", &|r| r.device = device(1), "NOT_YOURS"),
            row(
                "the neighbour's mappings",
                INSPECT,
                "ListMappings",
                &pb::ListMappingsRequest {
                    domain_id: ground.neighbours_domain_id,
                    from_iova: 0,
                    skip: 0,
                    limit: 0,
                },
                "NOT_YOURS",
            ),
            row("a resume token of no log", "/iommu.v1.FaultService/", "Watch", &watch, "BAD_RESUME_TOKEN"),
            row(
                "a driver that declares devices",
                "/iommu.v1.AdminService/",
                "RemoveDevice",
                &pb::RemoveDeviceRequest { device: device(0) },
                "ROLE_REFUSED",
            ),
            row(
                "a driver that makes machines",
                "/iommu.v1.BareMachineService/",
                "Create",
                &pb::CreateMachineRequest { memory_bytes: 1 << 20, capabilities: None, devices: Vec::new() },
                "ROLE_REFUSED",
            ),
        ];
        ground.check(rows).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_are_no_message_and_methods_that_are_none_are_typed_too() {
    within(60, async {
        let ground = Ground::prepare().await;
        let raw = |claim, method: &str, bytes: &[u8], expected| {
            Row(claim, method.to_owned(), Bytes::copy_from_slice(bytes), expected)
        };
        let oversized = vec![0; iommu_proto::limits::MESSAGE_BYTES_MAX + 1];
        let map = format!("{DRIVER}DmaMap");
        let rows = vec![
            raw("a length that lies", &map, &[0x0a, 0x7f, 1], "MALFORMED_MESSAGE"),
            raw("a tag that never ends", &map, &[0xff; 12], "MALFORMED_MESSAGE"),
            raw("a wrong wire type", &map, &[0x0d, 1, 2, 3, 4], "MALFORMED_MESSAGE"),
            raw("a message of a byte too many", &map, &oversized, "MESSAGE_TOO_LARGE"),
            raw("a method of a newer schema", "/iommu.v1.DriverService/Teleport", &[], "UNKNOWN_METHOD"),
            raw("a service of a newer schema", "/iommu.v2.DriverService/DmaMap", &[], "UNKNOWN_METHOD"),
            raw(
                "a second Open",
                OPEN,
                &open_request("driver0", Role::Driver(pb::DriverRole { owner: Some(owner(0).into()) }))
                    .encode_to_vec(),
                "SESSION_EXISTS",
            ),
        ];
        ground.check(rows).await;

        // A field that this version does not know is ignored.
        let mut message = pb::DmaMapRequest {
            header: header(200),
            device: device(0),
            gpa: ground.gpa,
            size_bytes: 64,
            direction: pb::Direction::ToDevice.into(),
            attributes: None,
            ring: 0,
        }
        .encode_to_vec();
        message.extend_from_slice(&unknown_field());
        call(&ground.driver, &map, message).await.expect("unknown fields are ignored");
    })
    .await;
}

/// Field 1000 with three bytes.
fn unknown_field() -> Bytes {
    let mut bytes = BytesMut::new();
    prost::encoding::encode_key(1000, prost::encoding::WireType::LengthDelimited, &mut bytes);
    bytes.put_slice(&[3, 1, 2, 3]);
    bytes.freeze()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_maps_refuses_batches_over_the_limits_and_of_unknown_kinds() {
    within(60, async {
        let ground = Ground::prepare().await;
        let stream = "/iommu.v1.DriverService/DmaStream";
        let batch = |request_id, count: usize, sizes: Vec<u32>| pb::DmaStreamRequest {
            header: header(request_id),
            device: device(0),
            batch: Some(pb::dma_stream_request::Batch::Map(pb::DmaMapBatch {
                gpa: vec![ground.gpa; count],
                size_bytes: sizes,
                direction: pb::Direction::ToDevice.into(),
                ..Default::default()
            })),
        };
        let too_many = iommu_proto::limits::BATCH_OPERATIONS_MAX as usize + 1;
        let absent = pb::DmaStreamRequest { batch: None, ..batch(12, 1, vec![64]) };
        let mut newer = absent.encode_to_vec();
        newer.extend_from_slice(&unknown_field());
        let rows: Vec<(&str, Bytes, &str)> = vec![
            ("too many operations", batch(10, too_many, vec![64]).encode_to_vec().into(), "LIMIT_REACHED"),
            (
                "columns that do not add up",
                batch(11, 3, vec![64, 64]).encode_to_vec().into(),
                "INVALID_FIELD",
            ),
            ("no batch", absent.encode_to_vec().into(), "INVALID_FIELD"),
            ("a batch of a newer schema", newer.into(), "INVALID_FIELD"),
            ("no message", Bytes::from_static(&[0xff; 11]), "MALFORMED_MESSAGE"),
        ];
        let before = ground.stage.holdings().await;
        for (claim, message, expected) in rows {
            let ended = match RawStream::open(&ground.driver, stream, message).await {
                Ok(mut stream) => stream.end().await,
                Err(status) => status,
            };
            assert_eq!(reason(&ended), expected, "{claim}: {ended:?}");
            assert_eq!(ground.stage.holdings().await, before, "{claim}: nothing changes");
        }

        // One operation that fails does not end the stream, and is told by its index.
        let mut mixed = batch(20, 3, vec![64]);
        if let Some(pb::dma_stream_request::Batch::Map(map)) = &mut mixed.batch {
            map.gpa[1] = 1 << 40;
        }
        let mut stream =
            RawStream::open(&ground.driver, stream, mixed.encode_to_vec().into()).await.expect("a stream");
        let answer =
            pb::DmaStreamResponse::decode(stream.hear().await.expect("an answer")).expect("it decodes");
        assert_eq!((answer.request_id, answer.iova.len(), answer.errors.len()), (20, 3, 1));
        assert_eq!((answer.errors[0].index, answer.errors[0].reason.as_str()), (1, "NOT_OWNED"));
        assert_eq!(answer.iova[1], u64::MAX, "DMA_MAPPING_ERROR");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_who_a_client_is_is_checked_once_and_nobody_else_is_let_in() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let of = |number| Role::Driver(pb::DriverRole { owner: Some(owner(number).into()) });
        let good = open_request("driver0", of(0));
        let before = stage.holdings().await;
        let rows = [
            ("a newer schema", pb::OpenRequest { schema_version: 2, ..good.clone() }, "VERSION_MISMATCH"),
            ("no schema", pb::OpenRequest { schema_version: 0, ..good.clone() }, "VERSION_MISMATCH"),
            ("the name of another", open_request("driver1", of(0)), "IDENTITY_REFUSED"),
            ("an owner of nobody", open_request("driver0", of(99)), "IDENTITY_REFUSED"),
            ("no name", open_request("", of(0)), "INVALID_FIELD"),
            ("a name that is none", open_request("a b", of(0)), "INVALID_FIELD"),
            (
                "no role, or one of a newer schema",
                pb::OpenRequest { role: None, ..good.clone() },
                "INVALID_FIELD",
            ),
            (
                "no owner",
                open_request("driver0", Role::Driver(pb::DriverRole { owner: None })),
                "INVALID_FIELD",
            ),
            (
                "a token of half the length",
                pb::OpenRequest { resume_token: vec![1; 8].into(), ..good.clone() },
                "INVALID_FIELD",
            ),
            (
                "a token that was guessed",
                pb::OpenRequest { resume_token: vec![1; 16].into(), ..good.clone() },
                "BAD_RESUME_TOKEN",
            ),
        ];
        for (claim, open, expected) in rows {
            let channel = raw::connect(&stage.server.unix_endpoint()).await;
            let refused = ask::<pb::OpenResponse>(&channel, OPEN, &open).await.expect_err(claim);
            assert_eq!(reason(&refused), expected, "{claim}: {refused:?}");
            // Who is not let in can do nothing.
            let topology = call(&channel, "/iommu.v1.InspectService/GetTopology", Bytes::new()).await;
            assert_eq!(reason(&topology.expect_err(claim)), "SESSION_REQUIRED", "{claim}");
            assert_eq!(stage.holdings().await, before, "{claim}: nothing changes");
        }
        assert!(!stage.owner_state(0).await.connected, "no session was opened on the way");
    })
    .await;
}

/// What a device says first, what it says next, and how its session ends.
struct DeviceRow(&'static str, Bytes, Option<Bytes>, &'static str);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_breaks_the_rules_of_its_stream_ends_its_own_session_and_is_told_why() {
    within(60, async {
        let ground = Ground::prepare().await;
        let good = || envelope(FromDevice::Hello(hello(0)));
        let greet = |change: &dyn Fn(&mut pb::Hello)| {
            let mut hello = hello(0);
            change(&mut hello);
            envelope(FromDevice::Hello(hello))
        };
        let dma = |change: &dyn Fn(&mut pb::DmaBatch)| {
            let mut batch = pb::DmaBatch {
                first_tag: 1,
                iova: vec![FIXED; 2],
                size_bytes: vec![8],
                ..pb::DmaBatch::default()
            };
            change(&mut batch);
            Some(envelope(FromDevice::Dma(batch)))
        };
        let undeclared: DeviceAddress = "00:1e.0".parse().expect("an address");
        let too_many = iommu_proto::limits::BATCH_OPERATIONS_MAX as usize + 1;
        let oversized = Bytes::from(vec![0; iommu_proto::limits::MESSAGE_BYTES_MAX + 1]);
        let completion =
            pb::MmioCompletion { tag: 77, outcome: Some(pb::mmio_completion::Outcome::Value(1)) };
        let garbage = || Bytes::from_static(&[0xff; 12]);
        let rows = vec![
            DeviceRow("a newer schema", greet(&|h| h.schema_version = 2), None, "VERSION_MISMATCH"),
            DeviceRow("another name", greet(&|h| h.name = "engine1".into()), None, "IDENTITY_REFUSED"),
            DeviceRow(
                "an undeclared address",
                greet(&|h| h.address = Some(undeclared.into())),
                None,
                "IDENTITY_REFUSED",
            ),
            DeviceRow("no address", greet(&|h| h.address = None), None, "INVALID_FIELD"),
            DeviceRow("no credit", greet(&|h| h.mmio_credits = 0), None, "INVALID_FIELD"),
            DeviceRow("too much credit", greet(&|h| h.mmio_credits = 257), None, "INVALID_FIELD"),
            DeviceRow("DMA before Hello", dma(&|_| {}).expect("some"), None, "PROTOCOL_VIOLATION"),
            DeviceRow("a first message of a newer schema", unknown_field(), None, "PROTOCOL_VIOLATION"),
            DeviceRow("bytes that are no message", garbage(), None, "MALFORMED_MESSAGE"),
            DeviceRow("bytes that are no message, later", good(), Some(garbage()), "MALFORMED_MESSAGE"),
            DeviceRow("a second Hello", good(), Some(good()), "PROTOCOL_VIOLATION"),
            DeviceRow("an envelope of a newer schema", good(), Some(unknown_field()), "PROTOCOL_VIOLATION"),
            DeviceRow("an oversized message", good(), Some(oversized), "MESSAGE_TOO_LARGE"),
            DeviceRow(
                "columns that do not add up",
                good(),
                dma(&|b| b.size_bytes = vec![8; 3]),
                "PROTOCOL_VIOLATION",
            ),
            DeviceRow(
                "payload without a write",
                good(),
                dma(&|b| b.payload = vec![1].into()),
                "PROTOCOL_VIOLATION",
            ),
            DeviceRow(
                "a PASID beyond 20 bits",
                good(),
                dma(&|b| b.pasid = Some(1 << 20)),
                "PROTOCOL_VIOLATION",
            ),
            DeviceRow("tags that wrap", good(), dma(&|b| b.first_tag = u64::MAX), "PROTOCOL_VIOLATION"),
            DeviceRow(
                "too many operations",
                good(),
                dma(&|b| b.iova = vec![FIXED; too_many]),
                "PROTOCOL_VIOLATION",
            ),
            DeviceRow(
                "an answer to nothing",
                good(),
                Some(envelope(FromDevice::Mmio(completion))),
                "PROTOCOL_VIOLATION",
            ),
        ];
        let bystander = ground.stage.device(1).await;
        let before = ground.stage.holdings().await;
        for DeviceRow(claim, first, then, expected) in rows {
            let ended = match RawStream::attach(&ground.stage.server.unix_endpoint(), first).await {
                Ok(mut stream) => {
                    if let Some(then) = then {
                        let welcome = stream.hear_device().await.expect("the handshake is good");
                        assert!(matches!(welcome, pb::server_to_device::Message::Welcome(_)), "{claim}");
                        stream.say(then).await;
                    }
                    stream.end().await
                }
                Err(status) => status,
            };
            assert_eq!(reason(&ended), expected, "{claim}: {ended:?}");
            assert_eq!(ground.stage.holdings().await, before, "{claim}: nothing changes");
        }
        assert!(ground.stage.device_state(1).await.connected, "the session of the other device stands");
        drop(bystander);
        // An unknown field of a known message is ignored, in the handshake too.
        let mut hello = hello(0).encode_to_vec();
        hello.extend_from_slice(&unknown_field());
        let mut first = BytesMut::new();
        prost::encoding::encode_key(1, prost::encoding::WireType::LengthDelimited, &mut first);
        prost::encoding::encode_varint(hello.len() as u64, &mut first);
        first.put_slice(&hello);
        let mut stream =
            RawStream::attach(&ground.stage.server.unix_endpoint(), first.freeze()).await.expect("a stream");
        stream.hear_device().await.expect("unknown fields are ignored");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operation_that_is_nonsense_is_refused_in_the_answer_and_the_ones_around_it_run() {
    const OVER_LIMIT: u32 = 0x1002;
    const MALFORMED: u32 = 0x1003;
    within(60, async {
        let ground = Ground::prepare().await;
        let attach = pb::AttachDeviceRequest {
            header: header(10),
            device: device(0),
            domain_id: Some(ground.domain_id),
        };
        let _: pb::AttachDeviceResponse =
            ask(&ground.driver, "/iommu.v1.DriverService/AttachDevice", &attach).await.expect("attached");
        let before = ground.stage.holdings().await;
        let mut stream =
            RawStream::attach(&ground.stage.server.unix_endpoint(), envelope(FromDevice::Hello(hello(0))))
                .await
                .expect("a stream");
        stream.hear_device().await.expect("welcome");
        // Operation 1 of three reads becomes nonsense; 0 and 2 stay what they are.
        let rows: Vec<(&str, u8, u32, u64, usize, u32)> = vec![
            ("an unknown kind", 9, 8, FIXED, 0, MALFORMED),
            ("a write of nothing", 1, 0, FIXED, 0, MALFORMED),
            ("an atomic of 3 bytes", 3, 3, FIXED, 3, MALFORMED),
            ("an atomic that is not aligned", 3, 4, FIXED + 2, 4, MALFORMED),
            ("a FetchAdd of 16 bytes", 3, 16, FIXED, 16, MALFORMED),
            ("a read that wraps", 0, 16, u64::MAX - 7, 0, MALFORMED),
        ];
        for (claim, kind, size_bytes, iova, payload_bytes, expected) in rows {
            let batch = pb::DmaBatch {
                first_tag: 5,
                iova: vec![FIXED, iova, FIXED + 0x100],
                size_bytes: vec![8, size_bytes, 8],
                kind: vec![0, kind, 0].into(),
                payload: vec![1; payload_bytes].into(),
                ..Default::default()
            };
            assert!(stream.say(envelope(FromDevice::Dma(batch))).await);
            let answer = stream.hear_dma().await.expect(claim);
            assert_eq!((answer.first_tag, &answer.fault_index), (5, &vec![1]), "{claim}: {answer:?}");
            assert_eq!(answer.fault_reason, [expected], "{claim}");
            assert_eq!(answer.payload.len(), 16, "{claim}: the two good reads are answered");
        }
        // Bytes to be read count as bytes to be written do.
        let batch = pb::DmaBatch {
            first_tag: 9,
            iova: vec![FIXED; 513],
            size_bytes: vec![0x1000],
            ..pb::DmaBatch::default()
        };
        assert!(stream.say(envelope(FromDevice::Dma(batch))).await);
        let answer = stream.hear_dma().await.expect("over the limit");
        assert_eq!(answer.fault_reason, vec![OVER_LIMIT; 513], "every operation of the batch is refused");
        assert!(answer.payload.is_empty());
        assert_eq!(ground.stage.holdings().await, before, "nothing changes");
        let state = ground.stage.device_state(0).await;
        assert_eq!((state.refusals, state.faults), (6 + 513, 0), "refusals outside translation are counted");
        assert!(ground.stage.faults_of(address(0)).await.is_empty(), "and are not recorded as faults");
        let reading = ground.stage.explain(address(0), iommu_types::Iova::new(FIXED), Access::Read).await;
        assert!(matches!(reading.outcome, iommu_types::Outcome::Translated(_)), "{}", reading.conclusion);
    })
    .await;
}
