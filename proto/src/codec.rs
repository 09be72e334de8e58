//! How messages become bytes: protobuf, with typed errors for what does not decode.
//!
//! Nothing is copied that need not be: `bytes` fields of a received message are slices of its frame, and the frame of a
//! message to send is reserved at its full size before it is written.

use std::marker::PhantomData;

use iommu_types::errors::MalformedMessage;
use prost::Message;
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

use crate::errors::WireError;

/// A batch of 128 reads of 64 bytes is answered by 8 KiB of data and its frame, a little more than tonic's own 8 KiB; four
/// such messages fit here. An idle stream holds two of these buffers, mostly untouched.
const BUFFER_BYTES: usize = 32 << 10;
/// Messages that are ready together leave together, up to this size; a page of 64 KiB leaves alone.
const YIELD_BYTES: usize = 64 << 10;

fn buffer_settings() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
}

/// The codec of every service of `iommu.v1`.
#[derive(Debug)]
pub struct WireCodec<E, D> {
    messages: PhantomData<(E, D)>,
}

impl<E, D> Default for WireCodec<E, D> {
    fn default() -> Self {
        Self { messages: PhantomData }
    }
}

impl<E, D> Codec for WireCodec<E, D>
where
    E: Message + Send + 'static,
    D: Message + Default + Send + 'static,
{
    type Encode = E;
    type Decode = D;
    type Encoder = WireEncoder<E>;
    type Decoder = WireDecoder<D>;

    fn encoder(&mut self) -> Self::Encoder {
        WireEncoder { message: PhantomData }
    }
    fn decoder(&mut self) -> Self::Decoder {
        WireDecoder { message: PhantomData }
    }
}

/// Writes messages.
#[derive(Debug)]
pub struct WireEncoder<E> {
    message: PhantomData<E>,
}

impl<E: Message> Encoder for WireEncoder<E> {
    type Item = E;
    type Error = Status;

    fn encode(&mut self, message: E, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        // Without this a frame of a megabyte is copied at every doubling of its buffer.
        buffer.reserve(message.encoded_len());
        message.encode(buffer).expect("an EncodeBuf grows as it is written");
        Ok(())
    }
    fn buffer_settings(&self) -> BufferSettings {
        buffer_settings()
    }
}

/// Reads messages.
#[derive(Debug)]
pub struct WireDecoder<D> {
    message: PhantomData<D>,
}

impl<D: Message + Default> Decoder for WireDecoder<D> {
    type Item = D;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<D>, Status> {
        match D::decode(buffer) {
            Ok(message) => Ok(Some(message)),
            Err(error) => Err(MalformedMessage { why: error.to_string() }.into_status()),
        }
    }
    fn buffer_settings(&self) -> BufferSettings {
        buffer_settings()
    }
}
