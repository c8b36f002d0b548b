//! The REST layer around services that answer with what they were asked.

use std::convert::Infallible;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor};
use shortkit_webhooks::{
    grpc::DESCRIPTORS,
    rest::{Limits, Transcode},
};
use tokio::runtime::Runtime;
use tonic::{Status, body::Body};
use tower::{Layer, ServiceExt, service_fn};

/// Bodies go to one of these, by their first byte: whose it is, verb and path.
const BODIES: [(Whose, &str, &str); 8] = [
    (Whose::Sink, "POST", "/v1/echo"),
    (Whose::Routes, "POST", "/v1/items/a:cancel"),
    (Whose::Routes, "PATCH", "/v1/items/a"),
    (Whose::Routes, "POST", "/v1/made"),
    (Whose::Product, "POST", "/v1/webhooks"),
    (Whose::Product, "PATCH", "/v1/webhooks/whk_1"),
    (Whose::Product, "POST", "/v1/webhooks/whk_1/test"),
    (Whose::Product, "POST", "/v1/events"),
];
const VERBS: [&str; 6] = ["GET", "POST", "PATCH", "DELETE", "HEAD", "OPTIONS"];

#[derive(Clone, Copy)]
enum Whose {
    Sink,
    Routes,
    Product,
}

thread_local! {
    static SERVICES: [Echo; 3] = [
        Echo::new(&compiled("kitchen_sink.proto")),
        Echo::new(&compiled("routes.proto")),
        Echo::new(DESCRIPTORS),
    ];
}

/// A body: refused by name, or passed on as a message whose JSON says the same.
pub fn rest_body(data: &[u8]) {
    let Some((first, body)) = data.split_first() else { return };
    let (whose, verb, path) = BODIES[usize::from(*first) % BODIES.len()];
    SERVICES.with(|services| {
        let service = &services[whose as usize];
        let answer = service.call(verb, path, body);
        assert!([200, 201, 202, 400, 413].contains(&answer.status), "{answer:?}");
        if matches!(whose, Whose::Sink) && answer.status == 200 {
            let said = answer.text.strip_prefix("{\"data\":").and_then(|said| said.strip_suffix('}')).unwrap();
            let again = service.call(verb, path, said.as_bytes());
            assert_eq!((again.status, &again.text), (200, &answer.text));
        }
    });
}

/// A verb and what follows the slash of a path: an answer, or a refusal that is not our fault.
pub fn rest_uri(data: &[u8]) {
    let Some((first, uri)) = data.split_first() else { return };
    let Ok(uri) = std::str::from_utf8(uri) else { return };
    let verb = VERBS[usize::from(*first) % VERBS.len()];
    let uri = format!("/{uri}");
    // As a server would: no other ones get so far.
    if !uri.bytes().all(|byte| byte.is_ascii_graphic()) || uri.parse::<http::Uri>().is_err() {
        return;
    }
    SERVICES.with(|services| {
        for service in &services[1..] {
            let answer = service.call(verb, &uri, b"");
            assert!([200, 201, 202, 204, 400, 404, 405].contains(&answer.status), "{answer:?}");
        }
    });
}

#[derive(Debug)]
struct Answer {
    status: u16,
    text: String,
}

/// A layer, and the services that it was made for.
struct Echo {
    layer: Transcode,
    pool: DescriptorPool,
    runtime: Runtime,
}

impl Echo {
    fn new(descriptors: &[u8]) -> Self {
        Self {
            layer: Transcode::new(descriptors, Limits::default()).unwrap(),
            pool: DescriptorPool::decode(descriptors).unwrap(),
            runtime: tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap(),
        }
    }

    fn call(&self, verb: &str, uri: &str, body: &[u8]) -> Answer {
        let request = Request::builder().method(verb).uri(uri).header("content-type", "application/json");
        let request = request.body(Body::new(Full::from(body.to_vec()))).unwrap();
        let pool = self.pool.clone();
        let service = service_fn(move |request: Request<Body>| {
            let pool = pool.clone();
            async move { Ok::<_, Infallible>(answer(&pool, request).await) }
        });
        self.runtime.block_on(async {
            let (head, body) = self.layer.layer(service).oneshot(request).await.unwrap().into_parts();
            let is_stream = head.headers.get("content-type").is_some_and(|kind| kind == "text/event-stream");
            let bytes = if is_stream { Bytes::new() } else { body.collect().await.unwrap().to_bytes() };
            let text = String::from_utf8(bytes.to_vec()).expect("UTF-8");
            if !text.is_empty() {
                serde_json::from_str::<&serde_json::value::RawValue>(&text).expect("JSON");
            }
            Answer { status: head.status.as_u16(), text }
        })
    }
}

/// Answers a call that must carry a message of its kind: with the same, where that is what the call answers with.
async fn answer(pool: &DescriptorPool, request: Request<Body>) -> Response<Body> {
    let method = method(pool, request.uri().path());
    let frame = match request.into_body().collect().await {
        Ok(frame) => frame.to_bytes(),
        // What the layer says to its caller is another thing.
        Err(status) => return status.into_http(),
    };
    let (prefix, message) = frame.split_at(5);
    assert_eq!(prefix[1..], u32::try_from(message.len()).unwrap().to_be_bytes());
    DynamicMessage::decode(method.input(), message).expect("what is passed on is a message");
    if method.is_server_streaming() {
        return Response::new(Body::empty());
    }
    let message = if method.input() == method.output() { message } else { &[] };
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).unwrap());
    frame.put_slice(message);
    let mut trailers = HeaderMap::new();
    Status::ok("").add_header(&mut trailers).unwrap();
    let frames = [Frame::data(frame.freeze()), Frame::trailers(trailers)];
    Response::new(Body::new(StreamBody::new(tokio_stream::iter(frames.map(Ok::<_, Infallible>)))))
}

fn method(pool: &DescriptorPool, path: &str) -> MethodDescriptor {
    let (service, method) = path.trim_start_matches('/').split_once('/').unwrap();
    let service = pool.get_service_by_name(service).unwrap();
    service.methods().find(|known| known.name() == method).unwrap()
}

fn compiled(file: &str) -> Vec<u8> {
    let folder = |name: &str| format!("{}/{name}", super::super::ROOT);
    let mut compiler = protox::Compiler::new([folder("proto"), folder("tests/it/rest_layer")]).unwrap();
    compiler.include_imports(true).open_files([file]).unwrap();
    compiler.encode_file_descriptor_set()
}
