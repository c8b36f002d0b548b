//! How messages are read and written.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Room for most messages; a longer one gets more. tonic's own 8 KiB, twice for each call, cost more to allocate than most
/// messages cost to read.
const BUFFER_BYTES: usize = 1024;
/// A stream is sent on when so much of it is ready. With one small message more that is still one piece of `listen/body.rs`,
/// for which no room is counted: a stream is not cut off because others wait for room.
const YIELD_BYTES: usize = 12 * 1024;

/// Protobuf, as prost reads and writes it.
pub struct Protobuf<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Protobuf<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for Protobuf<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::new(BUFFER_BYTES, YIELD_BYTES))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(BufferSettings::new(BUFFER_BYTES, YIELD_BYTES))
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use tonic::codec::EncodeBody;

    use super::*;

    #[tokio::test]
    async fn what_a_stream_sends_at_once_is_one_piece() {
        let messages = tokio_stream::iter((0..500).map(|_| Ok("x".repeat(1000))));
        let encoder = Protobuf::<String, String>::default().encoder();
        let mut body = std::pin::pin!(EncodeBody::new_server(encoder, messages, None, Default::default(), None));
        let (mut sent, mut frames) = (0, 0);
        while let Some(frame) = body.frame().await {
            let bytes = frame.unwrap().into_data().map_or(0, |data| data.len());
            assert!(bytes <= 16 * 1024, "{bytes}");
            (sent, frames) = (sent + bytes, frames + 1);
        }
        assert!(sent > 500_000 && frames < 50, "{sent} in {frames}");
    }
}
