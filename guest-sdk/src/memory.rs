//! Memory as the CPU sees it.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use iommu_proto::limits::MESSAGE_BYTES_MAX;
use iommu_proto::pb;
use iommu_proto::pb::memory_service_client::MemoryServiceClient;
use iommu_types::errors::MemoryError;
use iommu_types::{Gpa, InvalidRange, Owner};
use tonic::transport::Channel;

use crate::connection::Core;
use crate::error::of_status;
use crate::{SdkError, TransportError};

/// The memory of an owner, by guest-physical address and around the IOMMU. Aligned 8-byte units are read and
/// written atomically.
#[derive(Clone, Debug)]
pub struct Memory {
    core: Arc<Core>,
    owner: Option<Owner>,
}

impl Memory {
    pub(crate) fn new(core: Arc<Core>, owner: Option<Owner>) -> Self {
        Self { core, owner }
    }

    /// Reads `size_bytes` from `gpa`; more than one message takes is streamed, which is not retried.
    pub async fn read(&self, gpa: Gpa, size_bytes: u64) -> Result<Bytes, SdkError<MemoryError>> {
        if size_bytes > u64::from(self.core.limits().batch_bytes_max) {
            return self.read_bulk(gpa, size_bytes).await;
        }
        let message = self.read_request(gpa, size_bytes);
        let answer = self
            .core
            .unary(message, |channel, request| async move { client(channel).read(request).await })
            .await?;
        whole(answer.data, size_bytes)
    }

    /// Writes `data` at `gpa`; more than one message takes is streamed, which is not retried: after an error,
    /// part may be written.
    pub async fn write(&self, gpa: Gpa, data: impl Into<Bytes>) -> Result<(), SdkError<MemoryError>> {
        let data: Bytes = data.into();
        if data.len() as u64 > u64::from(self.core.limits().batch_bytes_max) {
            return self.write_bulk(gpa, data).await;
        }
        let size_bytes = data.len() as u64;
        let message = pb::MemoryWriteRequest { owner: self.owner.map(Into::into), gpa: gpa.get(), data };
        let answer = self
            .core
            .unary(message, |channel, request| async move { client(channel).write(request).await })
            .await?;
        written(answer.written_bytes, size_bytes)
    }

    /// The same, once and on the connection that stands: for what must not be written any more when that is lost. After an error, part may be
    /// written.
    pub(crate) async fn write_once(&self, gpa: Gpa, data: Bytes) -> Result<(), SdkError<MemoryError>> {
        for message in self.pieces(gpa, data) {
            let size_bytes = message.data.len() as u64;
            let answer = self
                .core
                .unary_here(message, |channel, request| async move { client(channel).write(request).await })
                .await?;
            written(answer.written_bytes, size_bytes)?;
        }
        Ok(())
    }

    async fn read_bulk(&self, gpa: Gpa, size_bytes: u64) -> Result<Bytes, SdkError<MemoryError>> {
        let request = self.read_request(gpa, size_bytes);
        let mut pieces = self
            .core
            .call_once_at_length(|channel| async move { client(channel).read_bulk(request).await })
            .await?;
        let mut data = BytesMut::new();
        while let Some(piece) = pieces.message().await.map_err(|status| of_status(&status))? {
            data.extend_from_slice(&piece.data);
            if data.len() as u64 > size_bytes {
                break;
            }
        }
        whole(data.freeze(), size_bytes)
    }

    async fn write_bulk(&self, gpa: Gpa, data: Bytes) -> Result<(), SdkError<MemoryError>> {
        let size_bytes = data.len() as u64;
        let invalid = InvalidRange::Wraps { space: "gpa", base: gpa.get(), size_bytes };
        if gpa.checked_add(size_bytes - 1).is_none() {
            return Err(SdkError::Refused(invalid.into()));
        }
        let pieces = || self.pieces(gpa, data.clone());
        let answer = self
            .core
            .call_once_at_length(|channel| {
                let pieces = tokio_stream::iter(pieces());
                async move { client(channel).write_bulk(pieces).await }
            })
            .await?;
        written(answer.written_bytes, size_bytes)
    }

    /// Writes of as much as one message takes.
    fn pieces(&self, gpa: Gpa, data: Bytes) -> impl Iterator<Item = pb::MemoryWriteRequest> + use<> {
        let owner = self.owner.map(Into::into);
        let piece_bytes = self.core.limits().batch_bytes_max as usize;
        let (mut at, mut rest) = (gpa.get(), data);
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let piece = rest.split_to(piece_bytes.min(rest.len()));
            let request = pb::MemoryWriteRequest { owner, gpa: at, data: piece };
            at = at.wrapping_add(request.data.len() as u64);
            Some(request)
        })
    }

    fn read_request(&self, gpa: Gpa, size_bytes: u64) -> pb::MemoryReadRequest {
        pb::MemoryReadRequest { owner: self.owner.map(Into::into), gpa: gpa.get(), size_bytes }
    }
}

fn client(channel: Channel) -> MemoryServiceClient<Channel> {
    MemoryServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

fn whole(data: Bytes, size_bytes: u64) -> Result<Bytes, SdkError<MemoryError>> {
    if data.len() as u64 != size_bytes {
        let why = format!("data: {} bytes where {size_bytes} were asked for", data.len());
        return Err(TransportError::BadAnswer(why).into());
    }
    Ok(data)
}

fn written(written_bytes: u64, size_bytes: u64) -> Result<(), SdkError<MemoryError>> {
    if written_bytes != size_bytes {
        let why = format!("written_bytes: {written_bytes} where {size_bytes} were given");
        return Err(TransportError::BadAnswer(why).into());
    }
    Ok(())
}
