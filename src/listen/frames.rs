//! Counts frames of HTTP/2 that carry no request: the protocol lets a peer send as many as it likes, and each costs work
//! (CVE-2019-9512, 9513, 9515). What carries a request is bounded by hyper and h2.
//!
//! Three kinds have a use that grows with what goes on: windows are opened for what was sent, clients that estimate how
//! much is under way send a PING for it (gRPC's in Go, Java and C do), and streams are reset that were begun. Those count
//! only beyond that.

use std::time::{Duration, Instant};

use crate::clock;

/// Frames without a request that a peer may send …
pub(super) const MAX_IDLE_FRAMES: u32 = 1_000;
/// … within this time. An honest peer sends a ping now and then, and its settings once.
const WITHIN: Duration = Duration::from_secs(10);
/// Bytes that were sent to the peer for each PING, and for each frame that opens a window, which does not count. Clients
/// send one PING at most for an answer, and open two windows after some KiB; even one that does so for every short message
/// of a stream has got more than this for each. An answer to a PING has far less.
const BYTES_PER_FRAME: u64 = 64;
/// What a connection has saved up: bytes sent, …
const MAX_SENT: u64 = 16 * 1024 * 1024;
/// … and streams begun.
const MAX_BEGUN: u64 = 1_000;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEAD_BYTES: usize = 9;

// Types of frames, RFC 9113 section 6.
const DATA: u8 = 0x0;
const HEADERS: u8 = 0x1;
const RST_STREAM: u8 = 0x3;
const PING: u8 = 0x6;
const WINDOW_UPDATE: u8 = 0x8;
const CONTINUATION: u8 = 0x9;

/// The incoming half of a connection, as far as it is read.
pub(super) struct Frames {
    state: State,
    /// Frames that count, since then.
    count: u32,
    since: Instant,
    /// Bytes sent, less those for which a frame did not count.
    sent: u64,
    /// Streams begun and not reset.
    begun: u64,
    /// Streams begun, and frames that count, since that was asked last.
    new: u32,
}

enum State {
    /// So much of the preface has come.
    Preface(usize),
    /// So much of a frame's head has come.
    Head([u8; HEAD_BYTES], usize),
    /// So much of a frame's payload is still to come.
    Payload(usize),
    /// Not HTTP/2.
    Other,
}

impl Frames {
    pub(super) fn new() -> Self {
        Self { state: State::Preface(0), count: 0, since: clock::stopwatch(), sent: 0, begun: 0, new: 0 }
    }

    /// Notes what was sent to the peer.
    pub(super) fn wrote(&mut self, bytes: usize) {
        self.sent = self.sent.saturating_add(bytes as u64).min(MAX_SENT);
    }

    /// Whether what came so far is HTTP/2.
    pub(super) fn are_http2(&self) -> bool {
        matches!(self.state, State::Head(..) | State::Payload(_))
    }

    /// How many streams were begun, and frames came that count, since this was asked last.
    pub(super) fn new_ones(&mut self) -> u32 {
        std::mem::take(&mut self.new)
    }

    /// Reads on; whether the peer is still within its bounds.
    pub(super) fn read(&mut self, mut bytes: &[u8]) -> bool {
        while let Some((first, rest)) = bytes.split_first() {
            match &mut self.state {
                State::Other => return true,
                State::Payload(left) => {
                    let passed = bytes.len().min(*left);
                    *left -= passed;
                    bytes = &bytes[passed..];
                    if *left == 0 {
                        self.state = State::Head([0; HEAD_BYTES], 0);
                    }
                }
                State::Preface(come) => {
                    if PREFACE.get(*come) != Some(first) {
                        self.state = State::Other;
                        return true;
                    }
                    *come += 1;
                    bytes = rest;
                    if *come == PREFACE.len() {
                        self.state = State::Head([0; HEAD_BYTES], 0);
                    }
                }
                State::Head(head, come) => {
                    head[*come] = *first;
                    *come += 1;
                    bytes = rest;
                    if *come == HEAD_BYTES {
                        let [high, middle, low, kind, ..] = *head;
                        let length = u32::from_be_bytes([0, high, middle, low]) as usize;
                        self.state = if length == 0 { State::Head([0; HEAD_BYTES], 0) } else { State::Payload(length) };
                        if !self.is_of_use(kind) && !self.one_more() {
                            return false;
                        }
                    }
                }
            }
        }
        true
    }

    /// Whether a frame of this type has to do with a request, as far as such frames go.
    fn is_of_use(&mut self, kind: u8) -> bool {
        match kind {
            DATA | CONTINUATION => true,
            HEADERS => {
                self.begun = (self.begun + 1).min(MAX_BEGUN);
                self.new += 1;
                true
            }
            RST_STREAM => take(&mut self.begun, 1),
            PING | WINDOW_UPDATE => take(&mut self.sent, BYTES_PER_FRAME),
            _ => false,
        }
    }

    fn one_more(&mut self) -> bool {
        self.count += 1;
        self.new += 1;
        if self.count <= MAX_IDLE_FRAMES {
            return true;
        }
        // The clock is asked once in a thousand frames.
        let flood = self.since.elapsed() < WITHIN;
        (self.count, self.since) = (0, clock::stopwatch());
        !flood
    }
}

fn take(from: &mut u64, amount: u64) -> bool {
    let left = from.checked_sub(amount);
    *from = left.unwrap_or(*from);
    left.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, 0, 0, 0, 0, 0];
        frame.resize(HEAD_BYTES + payload, 0xff);
        frame
    }

    /// Whether all of it is within the bounds, read so many bytes at a time.
    fn passes(frames: &mut Frames, bytes: &[u8], step: usize) -> bool {
        bytes.chunks(step).all(|chunk| frames.read(chunk))
    }

    #[test]
    fn only_frames_without_a_request_count() {
        for step in [1, 7, 4096] {
            let mut frames = Frames::new();
            let fine = [frame(DATA, 300), frame(HEADERS, 5), frame(CONTINUATION, 4), frame(RST_STREAM, 4)].concat();
            assert!(passes(&mut frames, &[PREFACE, &fine.repeat(2_000)].concat(), step));
            assert!(passes(&mut frames, &frame(0x6, 8).repeat(MAX_IDLE_FRAMES as usize), step));
            assert!(!passes(&mut frames, &frame(0x4, 0), step), "the frame after the last one");
        }
    }

    #[test]
    fn some_count_beyond_their_use() {
        let most = MAX_IDLE_FRAMES as usize;
        for (kind, useful) in [WINDOW_UPDATE, PING, RST_STREAM].into_iter().flat_map(|kind| [(kind, 1_000), (kind, 0)])
        {
            let mut frames = Frames::new();
            assert!(frames.read(PREFACE));
            if kind == RST_STREAM {
                assert!(frames.read(&frame(HEADERS, 1).repeat(useful)));
            } else {
                frames.wrote(useful * usize::try_from(BYTES_PER_FRAME).unwrap());
            }
            frames.new_ones();
            assert!(frames.read(&frame(kind, 4).repeat(useful + most)), "{kind} {useful}");
            assert_eq!(frames.new_ones(), MAX_IDLE_FRAMES, "{kind} {useful}");
            assert!(!frames.read(&frame(kind, 4)), "{kind} {useful}");
        }
    }

    #[test]
    fn other_protocols_pass() {
        let mut frames = Frames::new();
        assert!(frames.read(b"PRI * HTTP/1.1\r\n"));
        assert!(frames.read(&[0x06; 100_000]));
    }
}
