//! Server streams as Server-Sent Events.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Response;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use serde_json::json;
use shortkit_webhooks::rest::Limits;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};

use super::{Kitchen, framed, message, request, trailers};
use crate::support::soon;

fn event(number: i32) -> Frame<Bytes> {
    Frame::data(framed(&message("routes.v1.Event", &json!({ "token": format!("t{number}"), "number": number }))))
}

fn streaming(
    limits: Limits,
    frames: impl Fn() -> std::pin::Pin<Box<dyn Stream<Item = Frame<Bytes>> + Send>> + Send + Sync + 'static,
) -> Kitchen {
    Kitchen::new(limits, move |_, _| {
        let frames = frames();
        async move { Response::new(Body::new(StreamBody::new(frames.map(Ok::<_, Infallible>)))) }
    })
}

/// The next piece of a body, each flushed at once.
async fn piece(body: &mut Body) -> Option<String> {
    let frame = soon("a piece", body.frame()).await?.unwrap();
    Some(String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap())
}

#[tokio::test]
async fn events_and_a_clean_end() {
    let kitchen = streaming(Limits::default(), || {
        Box::pin(tokio_stream::iter([event(1), event(2), Frame::trailers(trailers(&Status::ok("")))]))
    });
    let answer = kitchen.call("GET", "/v1/watch", "").await;
    assert_eq!((answer.status, &answer.headers["content-type"]), (200, &"text/event-stream".parse().unwrap()));
    let expected = "id: t1\ndata: {\"token\":\"t1\",\"number\":1}\n\nid: t2\ndata: {\"token\":\"t2\",\"number\":2}\n\n";
    assert_eq!(answer.text, expected);
}

#[tokio::test]
async fn an_error_before_the_first_item_is_an_ordinary_error() {
    let at_once = Kitchen::new(Limits::default(), async |_, _| Status::not_found("no such thing").into_http());
    let answer = at_once.call("GET", "/v1/watch", "").await;
    assert_eq!((answer.status, answer.error().1.as_str()), (404, "NOT_FOUND"));
    let in_trailers = streaming(Limits::default(), || {
        Box::pin(tokio_stream::once(Frame::trailers(trailers(&Status::not_found("no such thing")))))
    });
    assert_eq!(in_trailers.call("GET", "/v1/watch", "").await.status, 404);
}

#[tokio::test]
async fn an_error_in_the_middle_is_the_last_event() {
    let kitchen = streaming(Limits::default(), || {
        Box::pin(tokio_stream::iter([event(1), Frame::trailers(trailers(&Status::aborted("too slow")))]))
    });
    let answer = kitchen.call("GET", "/v1/watch", "").await;
    let (first, last) = answer.text.split_once("\n\n").unwrap();
    assert!(first.starts_with("id: t1\n"));
    assert!(last.starts_with("event: error\ndata: {\"error\":{") && last.contains("\"CONFLICT\""), "{last}");
    assert!(last.contains("req_1") && last.ends_with("\n\n"));
}

#[tokio::test]
async fn the_last_event_id_reaches_the_service() {
    let kitchen = Kitchen::new(Limits::default(), async |_, message| {
        assert!(message.windows(5).any(|window| window == b"token"), "{message:?}");
        Status::not_found("seen").into_http()
    });
    let mut request = request("GET", "/v1/watch", "");
    request.headers_mut().insert("last-event-id", "token".parse().unwrap());
    assert_eq!(kitchen.send(request).await.status, 404);
}

#[tokio::test]
async fn a_comment_comes_only_when_idle_and_the_deadline_is_for_others() {
    let limits =
        Limits { heartbeat: Duration::from_millis(20), deadline: Duration::from_millis(10), ..Limits::default() };
    let kitchen = streaming(limits, || Box::pin(tokio_stream::iter([event(1)]).chain(tokio_stream::pending())));
    let mut body = kitchen.response(request("GET", "/v1/watch", "")).await.into_body();
    assert!(piece(&mut body).await.unwrap().starts_with("id: t1"));
    assert_eq!(piece(&mut body).await.unwrap(), ": keep-alive\n\n");
    assert_eq!(piece(&mut body).await.unwrap(), ": keep-alive\n\n");
}

#[tokio::test]
async fn a_shutdown_ends_streams_with_a_reason() {
    let shutdown = CancellationToken::new();
    let limits = Limits { shutdown: shutdown.clone(), ..Limits::default() };
    let kitchen = streaming(limits, || Box::pin(tokio_stream::pending()));
    let mut body = kitchen.response(request("GET", "/v1/watch", "")).await.into_body();
    shutdown.cancel();
    assert!(piece(&mut body).await.unwrap().contains("SERVICE_UNAVAILABLE"));
    assert_eq!(piece(&mut body).await, None);
}

#[tokio::test]
async fn a_reader_that_does_not_read_costs_nothing() {
    let made = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&made);
    let kitchen = streaming(Limits::default(), move || {
        let counted = Arc::clone(&counted);
        Box::pin(tokio_stream::iter(0..1_000_000).map(move |number| {
            counted.fetch_add(1, Ordering::SeqCst);
            event(number)
        }))
    });
    let mut body = kitchen.response(request("GET", "/v1/watch", "")).await.into_body();
    for _ in 0..3 {
        piece(&mut body).await.unwrap();
    }
    assert!(made.load(Ordering::SeqCst) <= 4, "only what was read was made");
}
