//! `MemoryService`: memory as the CPU sees it.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use iommu_proto::errors::WireError;
use iommu_proto::framing::typed_framing_status;
use iommu_proto::model::{MemoryRead, MemoryWrite};
use iommu_proto::pb;
use iommu_proto::pb::memory_service_server::MemoryService;
use iommu_types::errors::{InvalidField, LimitReached, MemoryError, NotYours};
use iommu_types::{Gpa, Owner};
use tonic::{Request, Response, Status, Streaming};

use super::feed::{Feed, feed};
use super::{Caller, parse};
use crate::bounds;
use crate::host::Host;
use crate::host::owners::OwnerState;
use crate::host::rates::OwnerBounds;

/// The service.
#[derive(Clone, Debug)]
pub struct Memory {
    /// The host.
    pub host: Arc<Host>,
}

impl Memory {
    /// Whose memory is meant: a driver's is its own, everybody else says whose, a hypervisor one of its virtual machines.
    fn owner(&self, caller: &Caller, named: Option<Owner>) -> Result<Arc<OwnerState>, MemoryError> {
        match (caller.session.owner(), named) {
            (Some(own), None) => Ok(Arc::clone(own)),
            (Some(own), Some(named)) if own.owner == named => Ok(Arc::clone(own)),
            (Some(_), Some(named)) => Err(NotYours { object: format!("the memory of {named}") }.into()),
            (None, Some(named)) if caller.session.hypervisor().is_some() => {
                caller.must_see(Some(named), format!("the memory of {named}"))?;
                Ok(self.host.owners.get(named)?)
            }
            (None, Some(named)) => Ok(self.host.owners.get(named)?),
            (None, None) => {
                let why = "is absent; operators and hypervisors say whose memory is meant".to_owned();
                Err(InvalidField { field: "owner".to_owned(), why }.into())
            }
        }
    }

    /// What a stream waits for, unless its session or the server ends first.
    async fn unless_ended<T>(&self, caller: &Caller, awaited: impl Future<Output = T>) -> Result<T, Status> {
        tokio::select! {
            biased;
            ending = caller.session.end.wait() => Err(ending.into_status()),
            ending = self.host.shutdown.wait() => Err(ending.into_status()),
            done = awaited => Ok(done),
        }
    }
}

/// Whether one message may move so many bytes.
pub(super) fn within_batch(size_bytes: u64) -> Result<(), LimitReached> {
    let allowed = u64::from(bounds::BATCH.bytes_max);
    if size_bytes <= allowed {
        return Ok(());
    }
    Err(LimitReached { limit: "batch_bytes_max".to_owned(), allowed })
}

/// What moves many bytes costs a driver or a hypervisor as much as several requests (I7). Operators act for the owner and are not counted.
fn charge(caller: &Caller, size_bytes: u64) -> Result<(), LimitReached> {
    match caller.session.bounds() {
        Some(own) => own.requests.take(size_bytes / bounds::BYTES_PER_REQUEST).map_err(|over| over.limit),
        None => Ok(()),
    }
}

/// The same for one message of a stream, which waits until it may go on. A message is a request, however small.
async fn pace(bounds: &Option<Arc<OwnerBounds>>, size_bytes: u64) {
    let Some(bounds) = bounds else { return };
    let wait = bounds.requests.book(1 + size_bytes / crate::bounds::BYTES_PER_REQUEST);
    if !wait.is_zero() {
        tokio::time::sleep(wait).await;
    }
}

fn read(host: &Host, owner: &OwnerState, gpa: Gpa, size_bytes: usize) -> Result<Bytes, MemoryError> {
    let mut data = BytesMut::zeroed(size_bytes);
    owner.memory.read().read(&host.kernel, gpa, &mut data)?;
    Ok(data.freeze())
}

fn write(host: &Host, owner: &OwnerState, write: &MemoryWrite) -> Result<u64, MemoryError> {
    within_batch(write.range().size_bytes())?;
    owner.memory.read().write(&host.kernel, write.range().base(), write.data())?;
    Ok(write.range().size_bytes())
}

#[tonic::async_trait]
impl MemoryService for Memory {
    async fn read(
        &self,
        request: Request<pb::MemoryReadRequest>,
    ) -> Result<Response<pb::MemoryReadResponse>, Status> {
        let caller = Caller::of(&request)?;
        let MemoryRead { owner, range } = parse(request.into_inner())?;
        let owner = self.owner(&caller, owner).map_err(WireError::into_status)?;
        within_batch(range.size_bytes()).map_err(WireError::into_status)?;
        charge(&caller, range.size_bytes()).map_err(WireError::into_status)?;
        let data = read(&self.host, &owner, range.base(), range.size_bytes() as usize);
        Ok(Response::new(pb::MemoryReadResponse { data: data.map_err(WireError::into_status)? }))
    }

    async fn write(
        &self,
        request: Request<pb::MemoryWriteRequest>,
    ) -> Result<Response<pb::MemoryWriteResponse>, Status> {
        let caller = Caller::of(&request)?;
        let ask: MemoryWrite = parse(request.into_inner())?;
        let owner = self.owner(&caller, ask.owner).map_err(WireError::into_status)?;
        charge(&caller, ask.range().size_bytes()).map_err(WireError::into_status)?;
        let written_bytes = write(&self.host, &owner, &ask).map_err(WireError::into_status)?;
        Ok(Response::new(pb::MemoryWriteResponse { written_bytes }))
    }

    type ReadBulkStream = Feed<pb::MemoryReadResponse>;

    async fn read_bulk(
        &self,
        request: Request<pb::MemoryReadRequest>,
    ) -> Result<Response<Self::ReadBulkStream>, Status> {
        let caller = Caller::of(&request)?;
        let MemoryRead { owner, range } = parse(request.into_inner())?;
        let owner = self.owner(&caller, owner).map_err(WireError::into_status)?;
        let (host, bounds) = (Arc::clone(&self.host), caller.session.bounds().cloned());
        let stream = feed(&self.host, &caller, None, |sender| async move {
            let mut done = 0;
            while done < range.size_bytes() {
                let piece = (range.size_bytes() - done).min(bounds::BULK_PIECE_BYTES as u64);
                let gpa = range.base().checked_add(done).expect("a range does not wrap");
                pace(&bounds, piece).await;
                let data = read(&host, &owner, gpa, piece as usize);
                let failed = data.is_err();
                let message = data.map(|data| pb::MemoryReadResponse { data });
                sender.send(message.map_err(WireError::into_status)).await?;
                if failed {
                    break;
                }
                done += piece;
            }
            Ok(())
        });
        Ok(Response::new(stream))
    }

    async fn write_bulk(
        &self,
        request: Request<Streaming<pb::MemoryWriteRequest>>,
    ) -> Result<Response<pb::MemoryWriteResponse>, Status> {
        let caller = Caller::of(&request)?;
        let bounds = caller.session.bounds().cloned();
        let mut messages = request.into_inner();
        let mut written_bytes = 0_u64;
        loop {
            let message = self.unless_ended(&caller, messages.message()).await?;
            let Some(message) = message.map_err(typed_framing_status)? else { break };
            self.unless_ended(&caller, pace(&bounds, message.data.len() as u64)).await?;
            let ask: MemoryWrite = parse(message)?;
            let owner = self.owner(&caller, ask.owner).map_err(WireError::into_status)?;
            written_bytes += write(&self.host, &owner, &ask).map_err(WireError::into_status)?;
        }
        Ok(Response::new(pb::MemoryWriteResponse { written_bytes }))
    }
}
