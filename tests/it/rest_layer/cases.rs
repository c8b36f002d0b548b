//! Unary calls: paths, queries, bodies, responses, time.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::{Request, Response};
use http_body::Frame;
use http_body_util::StreamBody;
use serde_json::{Value, json};
use shortkit_webhooks::rest::{Limits, MAX_BODY_BYTES};
use tonic::{Code, Status, body::Body};

use super::{Kitchen, message, reply, request};
use crate::errors::gzip;

/// The values that an echo has beside its defaults.
fn said(answer: &super::Answer) -> Value {
    let mut data = answer.json()["data"].clone();
    let map = data.as_object_mut().unwrap();
    map.retain(|_, value| {
        !(*value == json!("") || *value == json!(0) || *value == json!(false) || *value == json!([]))
    });
    data
}

#[tokio::test]
async fn paths() {
    let kitchen = Kitchen::echo();
    for (uri, expected) in [
        ("/v1/items/a", json!({ "id": "a" })),
        ("/v1/things/a", json!({ "id": "a" })),
        ("/v1/items/mine", json!({})),
        ("/v1/items/a%2Fb+c", json!({ "id": "a/b+c" })),
        ("/v1/shelves/7", json!({ "name": "shelves/7" })),
        ("/v1/files/a%2Fb/c%20d", json!({ "name": "a%2Fb/c d" })),
    ] {
        let answer = kitchen.call("GET", uri, "").await;
        assert_eq!((answer.status, said(&answer)), (200, expected), "{uri}");
    }
    let nested = kitchen.call("GET", "/v1/nested/x", "").await;
    assert_eq!(nested.json()["data"]["inner"]["name"], "x");
    let verb = kitchen.call("POST", "/v1/items/a:cancel", r#"{"id":"b","count":2}"#).await;
    assert_eq!(said(&verb), json!({ "id": "a", "count": 2 }), "the path is what counts");
    for uri in ["/v1/items/%zz", "/v1/items/%", "/v1/items/%ff"] {
        assert_eq!(kitchen.call("GET", uri, "").await.error().1, "INVALID_PARAMETER", "{uri}");
    }
    for uri in ["/v1/items/", "/v1/items/a/", "/v1//a", "/v1/nope", "/"] {
        assert_eq!(kitchen.call("GET", uri, "").await.status, 404, "{uri}");
    }
    let other = kitchen.call("DELETE", "/v1/items/a", "").await;
    assert_eq!((other.status, &other.headers["allow"]), (405, &"GET, HEAD, OPTIONS, PATCH".parse().unwrap()));
}

#[tokio::test]
async fn queries() {
    let kitchen = Kitchen::echo();
    for (query, expected) in [
        ("inner.maxCount=1", json!({ "inner": { "maxCount": 1 } })),
        ("inner.max_count=1", json!({ "inner": { "maxCount": 1 } })),
        ("tags=a&tags=b%26c", json!({ "tags": ["a", "b&c"] })),
        ("name=a+b%2Bc=d", json!({ "name": "a b+c=d" })),
        ("total=9007199254740993", json!({ "total": 9_007_199_254_740_993_i64 })),
        ("count=-1", json!({ "count": -1 })),
        ("flag=true&color=dark_blue", json!({ "flag": true, "color": "dark_blue" })),
        ("at=2024-02-04T13:00:00%2B01:00", json!({ "at": "2024-02-04T12:00:00Z" })),
        ("nextCursor=", json!({})),
        ("", json!({})),
    ] {
        let answer = kitchen.call("GET", &format!("/v1/items/mine?{query}"), "").await;
        let mut said = said(&answer);
        if let Some(inner) = said.get_mut("inner").and_then(Value::as_object_mut) {
            inner.retain(|key, _| key == "maxCount");
        }
        assert_eq!((answer.status, said), (200, expected), "{query}");
    }
    let empty = kitchen.call("GET", "/v1/items/mine?nextCursor=", "").await;
    assert_eq!(empty.json()["data"]["nextCursor"], "", "absent and empty are different");
    for (query, field, reason) in [
        ("count=x", "count", "wrong_type"),
        ("count=1.5", "count", "wrong_type"),
        ("count=2147483648", "count", "out_of_range"),
        ("total=9223372036854775808", "total", "out_of_range"),
        ("size=-1", "size", "out_of_range"),
        ("flag=1", "flag", "invalid"),
        ("color=green", "color", "unknown"),
        ("color=COLOR_RED", "color", "unknown"),
        ("color=unspecified", "color", "unknown"),
        ("at=yesterday", "at", "invalid"),
        ("nope=1", "nope", "unknown"),
        ("inner.nope=1", "inner.nope", "unknown"),
        ("inner=1", "inner", "unknown"),
        ("count=0&count=0", "count", "duplicate"),
        ("=1", "", "unknown"),
    ] {
        let error = kitchen.call("GET", &format!("/v1/items/mine?{query}"), "").await.error();
        let expected = (400, "INVALID_PARAMETER".to_owned(), field.to_owned(), reason.to_owned());
        assert_eq!(error, expected, "{query}");
    }
    let wrong = kitchen.call("GET", "/v1/items/mine?color=green", "").await;
    assert_eq!(wrong.json()["error"]["message"], "color must be one of red, dark_blue");
    let bound = kitchen.call("GET", "/v1/items/a?id=b", "").await.error();
    assert_eq!((bound.1.as_str(), bound.2.as_str()), ("INVALID_PARAMETER", "id"), "the path has it");
    let bound = kitchen.call("POST", "/v1/made?count=1", "{}").await.error();
    assert_eq!((bound.1.as_str(), bound.2.as_str()), ("INVALID_PARAMETER", "count"), "the body has it");
    let long = format!("/v1/items/mine?{}=1", "x".repeat(5_000));
    assert!(kitchen.call("GET", &long, "").await.text.len() < 500, "an answer does not grow with the question");
}

/// The layer by itself: behind it the service refuses what is too long as well, but only once it is there.
#[tokio::test]
async fn bodies_that_are_too_long() {
    let kitchen = Kitchen::echo();
    let of = |bytes: usize| format!(r#"{{"nextCursor":"{}"}}"#, "x".repeat(bytes - 17));
    for (bytes, status) in [(MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)] {
        let body = of(bytes);
        assert_eq!(body.len(), bytes);
        let mut packed = request("POST", "/v1/items/a:cancel", "");
        packed.headers_mut().insert("content-encoding", "gzip".parse().unwrap());
        *packed.body_mut() = Body::new(http_body_util::Full::from(gzip(body.as_bytes())));
        assert_eq!(kitchen.send(packed).await.status, status, "{bytes} packed");
        assert_eq!(kitchen.call("POST", "/v1/items/a:cancel", &body).await.status, status, "{bytes}");
    }
}

#[tokio::test]
async fn bodies() {
    let kitchen = Kitchen::echo();
    let cancel = async |body: &str| kitchen.call("POST", "/v1/items/a:cancel", body).await;
    let raw = r#"{"inner":{"raw":{ "b":1e400, "a":12345678901234567890 }}}"#;
    assert!(cancel(raw).await.text.contains(r#""raw":{ "b":1e400, "a":12345678901234567890 }"#));
    assert_eq!(cancel(r#"{"total":9007199254740993}"#).await.json()["data"]["total"], 9_007_199_254_740_993_i64);
    assert_eq!(cancel("").await.status, 200, "no body is an empty one");
    assert_eq!(said(&cancel(r#"{"count":null,"nextCursor":null}"#).await), json!({ "id": "a" }));
    let at = cancel(r#"{"at":"2024-02-04T13:00:00.5+01:00"}"#).await;
    assert_eq!(at.json()["data"]["at"], "2024-02-04T12:00:00.500Z");
    for (body, field, reason) in [
        (r#"{"nope":1}"#, "nope", "unknown"),
        (r#"{"inner":{"nope":1}}"#, "inner.nope", "unknown"),
        (r#"{"inner":{"inner":{"words":["a",1]}}}"#, "inner.inner.words[1]", "wrong_type"),
        (r#"{"inner":{"sizes":{"a":1,"b":"2"}}}"#, "inner.sizes[b]", "wrong_type"),
        (r#"{"inner":[]}"#, "inner", "wrong_type"),
        (r#"{"inner":{"maxCount":"3"}}"#, "inner.maxCount", "wrong_type"),
        (r#"{"count":1.5}"#, "count", "wrong_type"),
        (r#"{"count":4294967296}"#, "count", "out_of_range"),
        (r#"{"total":18446744073709551616}"#, "total", "out_of_range"),
        (r#"{"tags":"a"}"#, "tags", "wrong_type"),
        (r#"{"tags":[null]}"#, "tags[0]", "wrong_type"),
        (r#"{"flag":"true"}"#, "flag", "wrong_type"),
        (r#"{"color":1}"#, "color", "wrong_type"),
        (r#"{"color":"COLOR_RED"}"#, "color", "unknown"),
        (r#"{"at":"2024-02-30T00:00:00Z"}"#, "at", "invalid"),
        (r#"{"at":1}"#, "at", "wrong_type"),
        (r#"{"inner":{"raw":"{}"}}"#, "inner.raw", "wrong_type"),
    ] {
        let expected = (400, "VALIDATION_ERROR".to_owned(), field.to_owned(), reason.to_owned());
        assert_eq!(cancel(body).await.error(), expected, "{body}");
    }
    for (body, field) in [
        ("[]", ""),
        ("{} {}", ""),
        ("{", ""),
        ("\"x\"", ""),
        (r#"{"count":1,"count":1}"#, "count"),
        (r#"{"inner":{"maxCount":1,"max_count":1}}"#, "inner.max_count"),
    ] {
        let error = cancel(body).await.error();
        assert_eq!((error.0, error.1.as_str(), error.2.as_str()), (400, "INVALID_REQUEST", field), "{body}");
    }
    let broken = cancel("{\"count\":\n 1,}").await;
    assert_eq!(broken.json()["error"]["details"]["offset"], 13, "{}", broken.text);
    for unfinished in ["{", "{\"count\": 1", "{\"id\":\"é", "{\n"] {
        let broken = cancel(unfinished).await;
        assert_eq!(broken.json()["error"]["details"]["offset"], unfinished.len(), "{}", broken.text);
    }
    let deep = format!("{}{}{}", r#"{"inner":"#.repeat(70), "{}", "}".repeat(70));
    assert_eq!(cancel(&deep).await.error().3, "too_deep");
    let mut latin = request("POST", "/v1/made", "");
    *latin.body_mut() = Body::new(http_body_util::Full::from(&b"{\"id\":\"\xe9\"}"[..]));
    assert_eq!(kitchen.send(latin).await.error().1, "INVALID_REQUEST");
    let unwanted = kitchen.call("GET", "/v1/items/a", "{}").await.error();
    assert_eq!((unwanted.0, unwanted.1.as_str()), (400, "INVALID_REQUEST"));
}

#[tokio::test]
async fn partial_updates() {
    let kitchen = Kitchen::echo();
    let body = r#"{"maxCount":null,"words":["a"],"name":""}"#;
    let data = kitchen.call("PATCH", "/v1/items/a", body).await.json()["data"].clone();
    assert_eq!(data["updateMask"]["paths"], json!(["max_count", "words", "name"]), "{data}");
    assert_eq!((&data["id"], &data["inner"]["words"]), (&json!("a"), &json!(["a"])));
    for body in ["{}", ""] {
        let empty = kitchen.call("PATCH", "/v1/items/a", body).await.error();
        assert_eq!((empty.0, empty.1.as_str(), empty.2.as_str()), (400, "VALIDATION_ERROR", ""), "no mask in REST");
    }
}

#[tokio::test]
async fn responses() {
    let call = json!({ "inner": { "name": "x" }, "total": "2", "nextCursor": "c" });
    let bytes = message("routes.v1.Call", &call);
    let kitchen = Kitchen::new(Limits::default(), move |_, _| {
        let bytes = bytes.clone();
        async move { reply(&bytes) }
    });
    let made = kitchen.call("POST", "/v1/made", "{}").await;
    assert_eq!(made.status, 201);
    let json = made.json();
    assert_eq!(json["data"]["name"], "x");
    assert_eq!(json["data"].get("maxCount"), None, "an absent optional is an absent key");
    assert_eq!(json["data"]["words"], json!([]));
    assert_eq!((&json["meta"]["total"], &json["meta"]["nextCursor"]), (&json!(2), &json!("c")));
    let whole = kitchen.call("GET", "/v1/items/a", "").await;
    let data = &whole.json()["data"];
    assert_eq!(
        (&data["count"], &data["flag"], &data["tags"]),
        (&json!(0), &json!(false), &json!([])),
        "{}",
        whole.text
    );
    assert_eq!(data.get("color"), None, "the unspecified value is none");
    let head = kitchen.call("HEAD", "/v1/items/a", "").await;
    assert_eq!((head.status, head.text.as_str()), (200, ""));
    let options = kitchen.call("OPTIONS", "/v1/made", "").await;
    assert_eq!((options.status, &options.headers["allow"]), (204, &"OPTIONS, POST".parse().unwrap()));

    let late = Kitchen::new(Limits::default(), async |_, _| {
        let frames = [
            Frame::data(super::framed(b"")),
            Frame::trailers(super::trailers(&Status::not_found("gone while it was read"))),
        ];
        Response::new(Body::new(StreamBody::new(tokio_stream::iter(frames.map(Ok::<_, Infallible>)))))
    });
    let failed = late.call("GET", "/v1/items/a", "").await;
    assert_eq!((failed.status, failed.error().1.as_str()), (404, "NOT_FOUND"), "a status that comes last counts");

    let garbage = Kitchen::new(Limits::default(), async |_, _| reply(b"\xff\xff\xff"));
    let broken = garbage.call("GET", "/v1/items/a", "").await;
    assert_eq!(broken.error().1, "INTERNAL_ERROR");
    assert_eq!(broken.json()["meta"]["requestId"], "req_1");
}

#[tokio::test]
async fn statuses_become_errors() {
    for (code, http, name) in [
        (Code::InvalidArgument, 400, "INVALID_REQUEST"),
        (Code::Unauthenticated, 401, "UNAUTHORIZED"),
        (Code::PermissionDenied, 403, "FORBIDDEN"),
        (Code::NotFound, 404, "NOT_FOUND"),
        (Code::FailedPrecondition, 409, "CONFLICT"),
        (Code::Aborted, 409, "CONFLICT"),
        (Code::ResourceExhausted, 429, "RATE_LIMITED"),
        (Code::Unavailable, 503, "SERVICE_UNAVAILABLE"),
        (Code::DeadlineExceeded, 504, "DEADLINE_EXCEEDED"),
        (Code::Internal, 500, "INTERNAL_ERROR"),
        (Code::Unknown, 500, "INTERNAL_ERROR"),
        (Code::DataLoss, 500, "INTERNAL_ERROR"),
    ] {
        let kitchen =
            Kitchen::new(
                Limits::default(),
                move |_, _| async move { Status::new(code, "the inside of it").into_http() },
            );
        let answer = kitchen.call("GET", "/v1/items/a", "").await;
        assert_eq!((answer.status, answer.error().1.as_str()), (http, name));
        assert_eq!(answer.text.contains("the inside"), http != 500, "nothing of the inside leaks: {}", answer.text);
        assert_eq!(answer.headers.contains_key("retry-after"), matches!(http, 429 | 503));
    }
}

/// Notes that it was dropped.
struct Dropped(Arc<AtomicBool>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn stuck(limits: Limits) -> (Kitchen, Arc<AtomicBool>) {
    let dropped = Arc::new(AtomicBool::new(false));
    let noted = Arc::clone(&dropped);
    let kitchen = Kitchen::new(limits, move |_, _| {
        let guard = Dropped(Arc::clone(&noted));
        async move {
            let _guard = guard;
            std::future::pending().await
        }
    });
    (kitchen, dropped)
}

#[tokio::test]
async fn a_call_that_takes_too_long_is_given_up() {
    let (kitchen, dropped) = stuck(Limits { deadline: Duration::from_millis(20), ..Limits::default() });
    let answer = kitchen.call("GET", "/v1/items/a", "").await;
    assert_eq!((answer.status, answer.error().1.as_str()), (504, "DEADLINE_EXCEEDED"));
    assert!(dropped.load(Ordering::SeqCst), "the handler is gone");
}

#[tokio::test]
async fn a_caller_that_leaves_ends_its_call() {
    let (kitchen, dropped) = stuck(Limits::default());
    let request: Request<Body> = request("GET", "/v1/items/a", "");
    let call = kitchen.response(request);
    assert!(tokio::time::timeout(Duration::from_millis(20), call).await.is_err());
    assert!(dropped.load(Ordering::SeqCst), "the handler is gone");
}
