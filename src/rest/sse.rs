//! A server stream as Server-Sent Events
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).
//!
//! The reader pulls: while it does not read, nothing is taken from the service.

use std::{convert::Infallible, sync::Arc};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, stream};
use http::{HeaderMap, HeaderValue, Response, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use prost_reflect::DynamicMessage;
use tonic::{Code, Status, body::Body};

use super::{
    Limits,
    answer::passed_on,
    call::take_frame,
    encode,
    error::Failure,
    routes::{Route, Routes},
};

/// A stream on its way to the reader.
struct Events {
    body: Body,
    buffer: BytesMut,
    /// Where the route is.
    routes: Arc<Routes>,
    grpc_path: String,
    limits: Limits,
    request_id: Option<String>,
    ended: bool,
}

/// The response that shows a stream as events.
pub(super) fn response(
    routes: Arc<Routes>,
    route: &Route,
    limits: Limits,
    request_id: Option<String>,
    headers: HeaderMap,
    body: Body,
) -> Response<Body> {
    let grpc_path = route.grpc_path.clone();
    let events = Events { body, buffer: BytesMut::new(), routes, grpc_path, limits, request_id, ended: false };
    let mut response = Response::new(Body::new(StreamBody::new(frames(events))));
    *response.headers_mut() = passed_on(headers);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Asks proxies that buffer by default not to.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn frames(events: Events) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> {
    stream::unfold(events, |mut events| async {
        let text = events.next().await?;
        Some((Ok(Frame::data(text.into())), events))
    })
}

impl Events {
    /// The next piece of text; none at the end.
    async fn next(&mut self) -> Option<String> {
        loop {
            if self.ended {
                return None;
            }
            if let Some(message) = take_frame(&mut self.buffer) {
                return Some(self.event(message));
            }
            let frame = tokio::select! {
                () = self.limits.shutdown.cancelled() => {
                    return Some(self.fail(&Status::unavailable("the server is shutting down")));
                }
                () = tokio::time::sleep(self.limits.heartbeat) => return Some(": keep-alive\n\n".to_owned()),
                frame = self.body.frame() => frame,
            };
            match frame {
                None => self.ended = true,
                Some(Err(status)) => return Some(self.fail(&status)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.buffer.extend_from_slice(&data),
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        let status = Status::from_header_map(&trailers).filter(|status| status.code() != Code::Ok);
                        if let Some(status) = status {
                            return Some(self.fail(&status));
                        }
                    }
                },
            }
        }
    }

    fn event(&mut self, message: Bytes) -> String {
        let Some(route) = self.routes.by_grpc_path(&self.grpc_path) else { return String::new() };
        let Ok(message) = DynamicMessage::decode(route.output.clone(), message) else {
            return self.fail(&Status::internal("a message cannot be read"));
        };
        let mut text = String::new();
        if let Some(field) = route.rules.event_id(&route.output) {
            text.push_str("id: ");
            text.push_str(message.get_field(&field).as_str().unwrap_or_default());
            text.push('\n');
        }
        text.push_str("data: ");
        encode::message(&mut text, &message, &route.rules, |_| false);
        text.push_str("\n\n");
        text
    }

    /// The last event: an error, then a clean end.
    fn fail(&mut self, status: &Status) -> String {
        self.ended = true;
        let Some(route) = self.routes.by_grpc_path(&self.grpc_path) else { return String::new() };
        let failure = Failure::from_status(status, route);
        format!("event: error\ndata: {}\n\n", failure.json(self.request_id.as_deref()))
    }
}
