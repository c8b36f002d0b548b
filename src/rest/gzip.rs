//! A body unpacked, a little at a time.
//!
//! What unpacking costs is not bounded by what comes out of it: a block of ten bits that holds nothing costs as much as
//! kilobytes of text, so a mebibyte of them is seconds of work for an empty body.

use std::{
    collections::HashMap,
    io::{self, BufRead, ErrorKind, Read},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::{Buf, Bytes};
use flate2::bufread::MultiGzDecoder;
use tokio::{sync::Semaphore, task::yield_now};

/// Packed bytes that are unpacked in one go; then others have their turn.
const PIECE_BYTES: usize = 4 * 1024;
/// Packed bytes beyond those that came out so far, and an eighth more: with more, it is refused as no gzip. The eighth is
/// for encoders that cannot leave as it is what cannot be packed, the rest for heads with a name and a comment.
const MAX_EXCESS_BYTES: usize = 16 * 1024;

/// One body of an organization is unpacked at a time; its others wait, packed as they came.
const MAX_AT_A_TIME: usize = 1;

/// Unpacks bodies of organizations, whose names are known when a body is read.
pub(super) struct Unpacker {
    /// Pieces are unpacked one at a time, those of all organizations in turn. Between blocks that hold something there is room
    /// for others, which no count of bytes tells; but whatever bodies hold, they take no more than one core together.
    turn: Semaphore,
    /// The lanes of organizations that have a body here.
    lanes: Mutex<HashMap<Arc<str>, Arc<Semaphore>>>,
}

/// One more body in the lane of its organization. The lane goes with the last one.
struct Lane<'a> {
    unpacker: &'a Unpacker,
    organization: Arc<str>,
    turns: Arc<Semaphore>,
}

/// Why a body could not be unpacked.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is longer than allowed.
    TooLong,
    /// It is no gzip.
    Invalid,
}

/// What is packed, of which as much can be read as is let out.
struct Pieces {
    packed: Bytes,
    out: usize,
}

impl Default for Unpacker {
    fn default() -> Self {
        Self { turn: Semaphore::new(1), lanes: Mutex::default() }
    }
}

impl Unpacker {
    /// Unpacks all members of a body, when it is the turn of its organization; bodies of nobody share a lane.
    pub(super) async fn unpack(
        &self,
        organization: Option<Arc<str>>,
        packed: Bytes,
        max_bytes: usize,
    ) -> Result<Vec<u8>, Fault> {
        let lane = self.lane(organization.unwrap_or_default());
        let _turn = lane.turns.acquire().await;
        let (all, mut unpacked) = (packed.len(), Vec::new());
        let mut decoder = MultiGzDecoder::new(Pieces { packed, out: 0 });
        // One byte more than allowed tells a body that is too long from one that just fits.
        let limit = max_bytes + 1;
        loop {
            decoder.get_mut().out = PIECE_BYTES;
            let turn = self.turn.acquire().await;
            let left = u64::try_from(limit - unpacked.len()).unwrap_or(u64::MAX);
            let ended = (&mut decoder).take(left).read_to_end(&mut unpacked);
            drop(turn);
            match ended {
                Ok(_) if unpacked.len() == limit => return Err(Fault::TooLong),
                Ok(_) => return Ok(unpacked),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return Err(Fault::Invalid),
            }
            let read = all - decoder.get_ref().packed.len();
            if read > unpacked.len() + unpacked.len() / 8 + MAX_EXCESS_BYTES {
                return Err(Fault::Invalid);
            }
            yield_now().await;
        }
    }

    fn lane(&self, organization: Arc<str>) -> Lane<'_> {
        let mut lanes = self.lanes();
        let lane = lanes.entry(Arc::clone(&organization)).or_insert_with(|| Arc::new(Semaphore::new(MAX_AT_A_TIME)));
        Lane { unpacker: self, organization, turns: Arc::clone(lane) }
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<Arc<str>, Arc<Semaphore>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        let mut lanes = self.unpacker.lanes();
        // One is in the map and one here: both are made and dropped only under the lock.
        if Arc::strong_count(&self.turns) == 2 {
            lanes.remove(&self.organization);
        }
    }
}

impl BufRead for Pieces {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.out == 0 && self.packed.has_remaining() {
            return Err(ErrorKind::WouldBlock.into());
        }
        Ok(&self.packed[..self.out.min(self.packed.len())])
    }

    fn consume(&mut self, bytes: usize) {
        self.packed.advance(bytes);
        self.out -= bytes;
    }
}

impl Read for Pieces {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill_buf()?.read(into)?;
        self.consume(bytes);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, pin::pin};

    use flate2::{Compression, GzBuilder};
    use futures_util::poll;

    use super::*;

    const HEAD: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];

    /// As many blocks that hold nothing as make so many bytes, in the raw.
    fn nothing(bytes: usize) -> Vec<u8> {
        // Four of ten bits each: not the last one, with the codes that are known, and the end.
        [0x02, 0x08, 0x20, 0x80, 0x00].repeat(bytes / 5)
    }

    fn packed(bytes: &[u8], level: u32) -> Vec<u8> {
        let name = "n".repeat(8 * 1024);
        let mut encoder = GzBuilder::new().filename(name).write(Vec::new(), Compression::new(level));
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    async fn unpack(packed: Bytes, max_bytes: usize) -> Result<Vec<u8>, Fault> {
        Unpacker::default().unpack(None, packed, max_bytes).await
    }

    #[tokio::test]
    async fn what_was_packed_comes_out() {
        let mut state = 1_u32;
        let noise = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        };
        let noise: Vec<u8> = (0..200_000).map(noise).collect();
        let text = br#"{"event":"content.ready"}"#.repeat(8_000);
        for (bytes, level) in [(&noise[..], 0), (&noise, 6), (&text, 0), (&text, 1), (&text, 9), (b"{}", 6), (b"", 6)] {
            let once = packed(bytes, level);
            assert_eq!(unpack(once.clone().into(), bytes.len()).await.unwrap(), bytes, "{} at {level}", bytes.len());
            let twice = [once.clone(), once].concat();
            let both = unpack(twice.clone().into(), 2 * bytes.len()).await;
            assert_eq!(both.unwrap(), [bytes, bytes].concat(), "{} at {level}", bytes.len());
            if !bytes.is_empty() {
                assert_eq!(unpack(twice.into(), 2 * bytes.len() - 1).await, Err(Fault::TooLong));
            }
        }
        let cut = packed(&text, 6);
        for wrong in [&b""[..], b"{}", &cut[..cut.len() - 1], &[cut.clone(), b"{}".to_vec()].concat()] {
            assert_eq!(unpack(wrong.to_vec().into(), 1_000_000).await, Err(Fault::Invalid));
        }
    }

    #[tokio::test]
    async fn what_holds_nothing_is_refused() {
        let blocks = [&HEAD[..], &nothing(24_000), &[0x03, 0], &[0; 8]].concat();
        let members = [&HEAD[..], &[0x03, 0], &[0; 8]].concat().repeat(1_200);
        for body in [blocks, members] {
            assert_eq!(unpack(body.into(), 1_000_000).await, Err(Fault::Invalid));
        }
    }

    #[tokio::test]
    async fn others_have_their_turn() {
        // Much that holds something lets as much follow that holds nothing. That it is cut off is seen at the end.
        let mut flushed = flate2::write::GzEncoder::new(Vec::new(), Compression::default());
        flushed.write_all(&[b' '; 500_000]).unwrap();
        flushed.flush().unwrap();
        let body: Bytes = [flushed.get_ref().clone(), nothing(10 * PIECE_BYTES)].concat().into();
        let mut unpacking = pin!(unpack(body, 1_000_000));
        let mut turns = 0;
        let unpacked = loop {
            match poll!(&mut unpacking) {
                std::task::Poll::Ready(unpacked) => break unpacked,
                std::task::Poll::Pending => turns += 1,
            }
        };
        assert_eq!(unpacked, Err(Fault::Invalid));
        assert!(turns >= 10, "{turns}");
    }

    #[tokio::test]
    async fn one_piece_at_a_time() {
        let unpacker = Unpacker::default();
        let turn = unpacker.turn.acquire().await.unwrap();
        let mut waiting = pin!(unpacker.unpack(None, packed(b"{}", 6).into(), 2));
        assert!(poll!(&mut waiting).is_pending());
        drop(turn);
        assert_eq!(waiting.await.unwrap(), b"{}");
    }

    #[tokio::test]
    async fn an_organization_waits_for_itself() {
        let unpacker = Unpacker::default();
        let [loud, other] = ["loud", "other"].map(Arc::from);
        let unpack =
            |of: &Arc<str>, bytes: &[u8]| unpacker.unpack(Some(Arc::clone(of)), packed(bytes, 0).into(), 100_000);
        let long = [b'x'; 100_000];
        let (mut first, mut second) = (Box::pin(unpack(&loud, &long)), Box::pin(unpack(&loud, b"{}")));
        let mut left = Box::pin(unpack(&loud, &long));
        for _ in 0..3 {
            assert!(poll!(&mut first).is_pending() && poll!(&mut left).is_pending());
            assert!(poll!(&mut second).is_pending(), "one at a time");
            assert_eq!(unpack(&other, b"{}").await.unwrap(), b"{}");
        }
        drop(left);
        assert_eq!(first.await.unwrap(), long);
        assert_eq!(second.await.unwrap(), b"{}");
        assert!(unpacker.lanes().is_empty());
    }
}
