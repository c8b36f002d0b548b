//! Counts frames of HTTP/2 that carry no request: the protocol lets a peer send as many as it likes, and each costs work
//! (CVE-2019-9512, 9513, 9515). What carries a request is bounded by hyper and h2.

use std::time::{Duration, Instant};

use crate::clock;

/// Frames without a request that a peer may send …
pub(super) const MAX_IDLE_FRAMES: u32 = 1_000;
/// … within this time. An honest peer sends a ping now and then, and its settings once.
const WITHIN: Duration = Duration::from_secs(10);

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEAD_BYTES: usize = 9;

// Types of frames, RFC 9113 section 6.
const DATA: u8 = 0x0;
const HEADERS: u8 = 0x1;
const RST_STREAM: u8 = 0x3;
const WINDOW_UPDATE: u8 = 0x8;
const CONTINUATION: u8 = 0x9;

/// The incoming half of a connection, as far as it is read.
pub(super) struct Frames {
    state: State,
    count: u32,
    since: Instant,
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
        Self { state: State::Preface(0), count: 0, since: clock::stopwatch() }
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
                        if !matches!(kind, DATA | HEADERS | RST_STREAM | WINDOW_UPDATE | CONTINUATION)
                            && !self.one_more()
                        {
                            return false;
                        }
                    }
                }
            }
        }
        true
    }

    fn one_more(&mut self) -> bool {
        self.count += 1;
        if self.count <= MAX_IDLE_FRAMES {
            return true;
        }
        // The clock is asked once in a thousand frames.
        let flood = self.since.elapsed() < WITHIN;
        (self.count, self.since) = (0, clock::stopwatch());
        !flood
    }
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

    #[test]
    fn only_frames_without_a_request_count() {
        for step in [1, 7, 4096] {
            let mut frames = Frames::new();
            let fine = [frame(DATA, 300), frame(HEADERS, 5), frame(WINDOW_UPDATE, 4), frame(RST_STREAM, 4)].concat();
            let bytes = [PREFACE, &fine.repeat(2_000)].concat();
            assert!(bytes.chunks(step).all(|chunk| frames.read(chunk)));
            let pings = frame(0x6, 8).repeat(MAX_IDLE_FRAMES as usize);
            assert!(pings.chunks(step).all(|chunk| frames.read(chunk)));
            assert!(!frame(0x4, 0).chunks(step).all(|chunk| frames.read(chunk)), "the frame after the last one");
        }
    }

    #[test]
    fn other_protocols_pass() {
        let mut frames = Frames::new();
        assert!(frames.read(b"PRI * HTTP/1.1\r\n"));
        assert!(frames.read(&[0x06; 100_000]));
    }
}
