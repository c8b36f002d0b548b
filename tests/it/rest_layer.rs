//! The REST layer around a service of its own: what it takes, what it makes of it, what it says.

mod cases;
mod hangups;
mod starts;
mod streams;

use std::{convert::Infallible, sync::Arc};

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use prost_reflect::{DescriptorPool, DynamicMessage};
use serde_json::Value;
use shortkit_webhooks::rest::{Limits, Transcode};
use tonic::{Status, body::Body};
use tower::{Layer, Service, ServiceExt, service_fn, util::BoxCloneService};

/// The layer around a service that answers as a script says.
pub(crate) struct Kitchen(BoxCloneService<Request<Body>, Response<Body>, Infallible>);

/// What came back.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// Code, field and reason of an error.
    pub(crate) fn error(&self) -> (u16, String, String, String) {
        let json = self.json();
        let text = |pointer: &str| json.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        (self.status, text("/error/code"), text("/error/details/field"), text("/error/details/reason"))
    }
}

pub(crate) fn descriptors() -> Vec<u8> {
    let mut compiler = protox::Compiler::new(["proto", "tests/it/rest_layer"]).unwrap();
    compiler.include_imports(true).open_files(["routes.proto"]).unwrap();
    compiler.encode_file_descriptor_set()
}

/// A message in a gRPC frame.
pub(crate) fn framed(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).unwrap());
    frame.put_slice(message);
    frame.freeze()
}

pub(crate) fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    status.add_header(&mut trailers).unwrap();
    trailers
}

/// A reply of one message.
pub(crate) fn reply(message: &[u8]) -> Response<Body> {
    let frames = [Frame::data(framed(message)), Frame::trailers(trailers(&Status::ok("")))];
    let frames = tokio_stream::iter(frames.map(Ok::<_, Infallible>));
    Response::new(Body::new(StreamBody::new(frames)))
}

impl Kitchen {
    /// A service that answers with what it was asked.
    pub(crate) fn echo() -> Self {
        Self::new(Limits::default(), async |_, message| reply(&message))
    }

    /// A service that answers a gRPC path and a message as `script` says.
    pub(crate) fn new<F>(limits: Limits, script: impl Fn(String, Bytes) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let script = Arc::new(script);
        let service = service_fn(move |request: Request<Body>| {
            let script = Arc::clone(&script);
            async move {
                assert_eq!(request.headers()["content-type"], "application/grpc");
                assert!(request.headers().get("content-encoding").is_none());
                let path = request.uri().path().to_owned();
                Ok(match request.into_body().collect().await {
                    Ok(frame) => script(path, frame.to_bytes().slice(5..)).await,
                    Err(status) => status.into_http(),
                })
            }
        });
        let layer = Transcode::new(&descriptors(), limits).unwrap();
        Self(BoxCloneService::new(layer.layer(service)))
    }

    pub(crate) async fn response(&self, request: Request<Body>) -> Response<Body> {
        let mut service = self.0.clone();
        service.ready().await.unwrap().call(request).await.unwrap()
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let (head, body) = self.response(request).await.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        Answer { status: head.status.as_u16(), headers: head.headers, text }
    }

    pub(crate) async fn call(&self, verb: &str, uri: &str, body: &str) -> Answer {
        self.send(request(verb, uri, body)).await
    }
}

pub(crate) fn request(verb: &str, uri: &str, body: &str) -> Request<Body> {
    let body = Body::new(http_body_util::Full::from(body.to_owned()));
    let request = Request::builder().method(verb).uri(uri).header("x-request-id", "req_1");
    request.header("content-type", "application/json").body(body).unwrap()
}

/// What a message of the test's proto says, by JSON names.
pub(crate) fn message(name: &str, json: &Value) -> Vec<u8> {
    use prost::Message;
    let pool = DescriptorPool::decode(descriptors().as_slice()).unwrap();
    let descriptor = pool.get_message_by_name(name).unwrap();
    DynamicMessage::deserialize(descriptor, json).unwrap().encode_to_vec()
}
