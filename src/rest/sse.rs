//! A server stream as Server-Sent Events
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).
//!
//! The reader pulls: while it does not read, nothing is taken from the service.

use std::{convert::Infallible, sync::Arc};

use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, Stream, stream};
use http::{HeaderMap, HeaderValue, Response, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tonic::{Status, body::Body};

use super::{
    Plan,
    answer::passed_on,
    call::{refusal, take_frame},
    encode,
    error::Failure,
    routes::Route,
    wire::Malformed,
};

/// A stream on its way to the reader.
struct Events {
    body: Body,
    /// What the stream had ready when it began.
    first: Option<Option<Result<Frame<Bytes>, Status>>>,
    buffer: BytesMut,
    route: Arc<Route>,
    plan: Arc<Plan>,
    request_id: Option<String>,
    ended: bool,
}

/// The response that shows a stream as events. A stream that has already failed has no events: it is an error as any
/// other call's.
pub(super) fn response(
    route: &Arc<Route>,
    plan: Arc<Plan>,
    request_id: Option<String>,
    headers: HeaderMap,
    mut body: Body,
) -> Result<Response<Body>, Failure> {
    let first = body.frame().now_or_never();
    match &first {
        Some(Some(Err(status))) => return Err(Failure::from_status(status, route)),
        Some(Some(Ok(frame))) => {
            if let Some(status) = frame.trailers_ref().and_then(refusal) {
                return Err(Failure::from_status(&status, route));
            }
        }
        Some(None) | None => {}
    }
    let route = Arc::clone(route);
    let events = Events { body, first, buffer: BytesMut::new(), route, plan, request_id, ended: false };
    let mut response = Response::new(Body::new(StreamBody::new(frames(events))));
    *response.headers_mut() = passed_on(headers);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Asks proxies that buffer by default not to.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

fn frames(events: Events) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> {
    stream::unfold(events, |mut events| async {
        let text = events.next().await?;
        Some((Ok(Frame::data(text.into())), events))
    })
}

impl Events {
    /// The next piece of text; none at the end.
    async fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            if self.ended {
                return None;
            }
            match take_frame(&mut self.buffer) {
                Ok(Some(message)) => return Some(self.event(&message)),
                Ok(None) => {}
                Err(_) => return Some(self.broken()),
            }
            let frame = match self.first.take() {
                Some(first) => first,
                None => tokio::select! {
                    biased;
                    () = self.plan.limits.shutdown.cancelled() => {
                        return Some(self.fail(&Status::unavailable("the server is shutting down")));
                    }
                    frame = self.body.frame() => frame,
                    () = tokio::time::sleep(self.plan.limits.heartbeat) => return Some(b": keep-alive\n\n".to_vec()),
                },
            };
            match frame {
                None if self.buffer.is_empty() => self.ended = true,
                None => return Some(self.broken()),
                Some(Err(status)) => return Some(self.fail(&status)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.buffer.extend_from_slice(&data),
                    Err(frame) => {
                        if let Some(status) = frame.trailers_ref().and_then(refusal) {
                            return Some(self.fail(&status));
                        }
                    }
                },
            }
        }
    }

    fn event(&mut self, message: &[u8]) -> Vec<u8> {
        event(&self.route, message).unwrap_or_else(|_| self.broken())
    }

    fn broken(&mut self) -> Vec<u8> {
        self.fail(&Status::internal("a message cannot be read"))
    }

    /// The last event: an error, then a clean end.
    fn fail(&mut self, status: &Status) -> Vec<u8> {
        self.ended = true;
        // The service need not wait for the reader to notice.
        self.body = Body::empty();
        let failure = Failure::from_status(status, &self.route);
        format!("event: error\ndata: {}\n\n", failure.json(self.request_id.as_deref())).into_bytes()
    }
}

/// A message as an event.
fn event(route: &Route, message: &[u8]) -> Result<Vec<u8>, Malformed> {
    let mut text = Vec::with_capacity(2 * message.len() + 64);
    let table = route.tables.message(route.output);
    if let Some(field) = table.event_id {
        let id = encode::text(&table.fields[field], message)?;
        // With a line break in it the id would end where the break is, and what follows would be taken for a field.
        if !id.contains(['\r', '\n', '\0']) {
            text.extend_from_slice(b"id: ");
            text.extend_from_slice(id.as_bytes());
            text.push(b'\n');
        }
    }
    text.extend_from_slice(b"data: ");
    let start = text.len();
    encode::message(&route.tables, route.output, message, &mut text)?;
    // Raw JSON may have line breaks between its tokens; a reader joins the lines again.
    if text[start..].contains(&b'\n') || text[start..].contains(&b'\r') {
        let data = String::from_utf8_lossy(&text.split_off(start)).replace("\r\n", "\n").replace('\r', "\n");
        text.extend_from_slice(data.replace('\n', "\ndata: ").as_bytes());
    }
    text.extend_from_slice(b"\n\n");
    Ok(text)
}
