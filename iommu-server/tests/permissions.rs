//! Every method of every service, called in every role: allowed or refused exactly as the one table says.

mod support;

use bytes::{Buf, BufMut, Bytes};
use iommu_proto::errors::reason_of;
use iommu_proto::pb;
use iommu_proto::pb::open_request::Role as WireRole;
use iommu_server::layers::permissions::{Needs, rows};
use iommu_types::{Owner, Role};
use support::{Agent, ENGINE0, connect, driver_role, open, open_request, server};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Request, Status};

/// Messages as bytes: what a method takes does not matter here.
#[derive(Default)]
struct Raw;
struct RawCoder;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = RawCoder;
    type Decoder = RawCoder;
    fn encoder(&mut self) -> RawCoder {
        RawCoder
    }
    fn decoder(&mut self) -> RawCoder {
        RawCoder
    }
}
impl Encoder for RawCoder {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}
impl Decoder for RawCoder {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

/// The reason with which an empty call is refused; `None` when it is answered.
async fn call(channel: &Channel, service: &str, method: &str) -> Option<String> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.expect("the connection stands");
    let path = format!("/{service}/{method}").parse().expect("a path");
    let called = client.server_streaming(Request::new(Bytes::new()), path, Raw).await;
    called.err().map(|status| reason_of(&status).unwrap_or_else(|| format!("{status:?}")))
}

/// What a peer without the right gets.
fn refused_with(needs: Needs, peer: Option<Role>) -> Option<&'static str> {
    match (needs, peer) {
        (Needs::Nothing | Needs::Client | Needs::Device, _) => None,
        (Needs::Session(_), None) => Some("SESSION_REQUIRED"),
        (Needs::Session(roles), Some(role)) if roles.admit(role) => None,
        (Needs::Session(_), Some(_)) => Some("ROLE_REFUSED"),
    }
}

const REFUSALS: [&str; 2] = ["SESSION_REQUIRED", "ROLE_REFUSED"];

async fn check_all(channel: &Channel, peer: Option<Role>) {
    let mut checked = 0;
    for (service, method, needs) in rows() {
        let came = call(channel, service, method).await;
        let refused = came.as_deref().filter(|reason| REFUSALS.contains(reason));
        assert_eq!(refused, refused_with(needs, peer), "{service}/{method} by {peer:?}: {came:?}");
        checked += 1;
    }
    assert!(checked > 70, "the schema has more methods than {checked}");
}

#[tokio::test]
async fn i8_every_method_is_allowed_and_refused_by_role_exactly_as_the_one_table_says() {
    let server = server().await;
    check_all(&connect(&server).await, None).await;
    let roles = [
        ("driver0", driver_role(0), Role::Driver(Owner::Driver(0))),
        ("bare", WireRole::Bare(pb::BareRole {}), Role::Bare),
        ("observer", WireRole::Observer(pb::ObserverRole {}), Role::Observer),
        ("operator", WireRole::Operator(pb::OperatorRole {}), Role::Operator),
        ("hv0", WireRole::Hypervisor(pb::HypervisorRole {}), Role::Hypervisor),
    ];
    for (name, wire, role) in roles {
        let channel = connect(&server).await;
        open(&channel, open_request(name, wire)).await.expect("the configuration knows it");
        check_all(&channel, Some(role)).await;
    }
    let device = Agent::attach(&server, ENGINE0).await;
    check_all(&device.channel, Some(Role::Device("00:01.0".parse().expect("an address")))).await;
}

#[tokio::test]
async fn a_method_without_a_row_is_refused_before_it_is_looked_for() {
    let server = server().await;
    let channel = connect(&server).await;
    for path in [("iommu.v1.DriverService", "FormatEverything"), ("iommu.v9.DriverService", "Map")] {
        assert_eq!(call(&channel, path.0, path.1).await.as_deref(), Some("UNKNOWN_METHOD"), "{path:?}");
    }
}
