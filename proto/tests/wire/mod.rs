//! What the tests of conversions share: a message there and back, and a message that is refused.

#![allow(dead_code, reason = "each test file uses its own part")]

use expect_test::Expect;
use iommu_proto::model::RequestHeader;
use iommu_types::{DeviceAddress, RequestId, SourceId};
use prost::Message;

pub(crate) fn device() -> DeviceAddress {
    DeviceAddress::new(1, SourceId::new(0x0108))
}
pub(crate) fn header() -> RequestHeader {
    RequestHeader { request_id: RequestId(9), acknowledged_through: RequestId(7) }
}

/// Sends `model` as bytes and receives it.
pub(crate) fn check<W, M>(model: M)
where
    W: Message + Default + From<M>,
    M: TryFrom<W> + Clone + PartialEq + std::fmt::Debug,
    M::Error: std::fmt::Debug,
{
    let bytes = W::from(model.clone()).encode_to_vec();
    let wire = W::decode(&*bytes).expect("decodes");
    assert_eq!(M::try_from(wire).expect("parses"), model);
}

/// Receives `wire`, which is refused.
pub(crate) fn wrong<W, M>(wire: W, expected: Expect)
where
    M: TryFrom<W> + std::fmt::Debug,
    M::Error: std::fmt::Display,
{
    let error = M::try_from(wire).expect_err("is refused");
    expected.assert_eq(&error.to_string());
}
