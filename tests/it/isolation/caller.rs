//! Makes any call of the descriptors, over gRPC and over each of its REST routes, and says how it was answered.

use bytes::{Buf, BufMut, Bytes};
use http::{HeaderMap, HeaderValue, Method, uri::PathAndQuery};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, Kind, MessageDescriptor, MethodDescriptor};
use serde_json::{Map, Value};
use shortkit_webhooks::grpc::DESCRIPTORS;
use tonic::{
    Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};
use tonic_types::StatusExt;

use crate::support::{TestServer, soon};

/// Who calls.
#[derive(Clone, Default)]
pub(super) struct Caller {
    pub(super) name: &'static str,
    /// The whole `Authorization` header.
    pub(super) authorization: Option<HeaderValue>,
    /// `x-shortkit-organization`.
    pub(super) organization: Option<&'static str>,
}

impl Caller {
    pub(super) fn with_key(name: &'static str, key: &str) -> Self {
        let authorization = HeaderValue::try_from(format!("Bearer {key}")).unwrap();
        Self { name, authorization: Some(authorization), organization: None }
    }

    pub(super) fn acting_for(self, organization: &'static str) -> Self {
        Self { organization: Some(organization), ..self }
    }

    fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if let Some(value) = &self.authorization {
            headers.insert("authorization", value.clone());
        }
        if let Some(organization) = self.organization {
            headers.insert("x-shortkit-organization", HeaderValue::from_static(organization));
        }
        headers
    }
}

/// How a call is made: over gRPC, or over one of its REST routes.
#[derive(Clone, Debug)]
pub(super) enum Door {
    Grpc,
    Rest {
        verb: Method,
        path: String,
        /// What the body is: nothing, `*`, or a field.
        body: String,
    },
}

/// How a call was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// The code of the documented table; empty when the call succeeded.
    pub(super) code: String,
    /// The field at fault, by its JSON name.
    pub(super) field: String,
    /// All of it, without what differs from call to call by nature.
    pub(super) text: String,
}

/// Every method of every service.
pub(super) fn methods() -> Vec<MethodDescriptor> {
    let pool = DescriptorPool::decode(DESCRIPTORS).unwrap();
    pool.services().flat_map(|service| service.methods().collect::<Vec<_>>()).collect()
}

pub(super) fn method(full_name: &str) -> MethodDescriptor {
    let found = methods().into_iter().find(|method| method.full_name() == full_name);
    found.unwrap_or_else(|| panic!("calls.rs has a row for {full_name}, which is no method"))
}

/// gRPC, and every route of the method.
pub(super) fn doors(method: &MethodDescriptor) -> Vec<Door> {
    let pool = method.parent_pool();
    let http = pool.get_extension_by_name("google.api.http").unwrap();
    let rule = method.options().get_extension(&http).into_owned();
    let rule = rule.as_message().unwrap();
    let more = rule.get_field_by_name("additional_bindings").unwrap().into_owned();
    let more = more.as_list().unwrap().iter().map(|rule| rule.as_message().unwrap().clone());
    let routes = std::iter::once(rule.clone()).chain(more).filter_map(|rule| {
        let text = |field: &str| rule.get_field_by_name(field).unwrap().as_str().unwrap_or_default().to_owned();
        let verbs = ["get", "put", "post", "delete", "patch"];
        let verb = verbs.into_iter().find(|verb| !text(verb).is_empty())?;
        let name = Method::from_bytes(verb.to_uppercase().as_bytes()).unwrap();
        Some(Door::Rest { verb: name, path: text(verb), body: text("body") })
    });
    std::iter::once(Door::Grpc).chain(routes).collect()
}

/// The paths of a route hold what a request names; a request that leaves a part of the path open has no such route.
pub(super) fn fits(door: &Door, request: &Value) -> bool {
    match door {
        Door::Grpc => true,
        Door::Rest { path, .. } => variables(path).iter().all(|name| request.get(name).is_some()),
    }
}

/// The fields that a path names. No path of this API has a pattern in its braces.
fn variables(path: &str) -> Vec<&str> {
    path.split('{').skip(1).map(|rest| rest.split('}').next().unwrap()).collect()
}

/// The server, as every caller sees it.
pub(super) struct Api<'s> {
    pub(super) server: &'s TestServer,
    channel: Channel,
}

impl<'s> Api<'s> {
    pub(super) fn of(server: &'s TestServer) -> Self {
        Self { server, channel: server.channel() }
    }
}

pub(super) async fn call(
    api: &Api<'_>,
    caller: &Caller,
    method: &MethodDescriptor,
    door: &Door,
    request: &Value,
) -> Answer {
    match door {
        Door::Grpc => over_grpc(api, caller, method, request).await.0,
        Door::Rest { verb, path, body } => over_rest(api, caller, method, verb, path, body, request).await,
    }
}

fn message(method: &MethodDescriptor, request: &Value) -> DynamicMessage {
    DynamicMessage::deserialize(method.input(), request)
        .unwrap_or_else(|error| panic!("the row of {}: {error}", method.full_name()))
}

/// Headers without what is each call's own.
fn shown(headers: &HeaderMap) -> String {
    let mut lines: Vec<String> = headers
        .iter()
        .filter(|(name, _)| !matches!(name.as_str(), "date" | "x-request-id" | "grpc-message"))
        .map(|(name, value)| format!("{name}: {value:?}"))
        .collect();
    lines.sort();
    lines.join("\n")
}

/// The answer, and its first message when there is one.
pub(super) async fn over_grpc(
    api: &Api<'_>,
    caller: &Caller,
    method: &MethodDescriptor,
    request: &Value,
) -> (Answer, Option<DynamicMessage>) {
    let what = format!("the answer to {} as {}", method.full_name(), caller.name);
    let answered = soon(&what, async {
        let mut stream = open(api, caller, method, request).await?;
        if method.is_server_streaming() {
            return Ok(None);
        }
        stream.message().await
    });
    match answered.await {
        Ok(reply) => {
            let reply = reply.map(|bytes| DynamicMessage::decode(method.output(), bytes).unwrap());
            let text = reply.as_ref().map(ToString::to_string).unwrap_or_default();
            (Answer { code: String::new(), field: String::new(), text }, reply)
        }
        Err(status) => (refused(&status), None),
    }
}

fn refused(status: &Status) -> Answer {
    let details = status.get_error_details();
    let field = details.bad_request().map(|bad| bad.field_violations[0].field.clone()).unwrap_or_default();
    let headers = shown(status.metadata().as_ref());
    Answer {
        code: details.error_info().map_or_else(|| format!("{:?}", status.code()), |info| info.reason.clone()),
        field,
        text: format!("{:?} {}\n{:?}\n{headers}", status.code(), status.message(), status.details()),
    }
}

/// An open stream of answers; a call that is no stream has one.
pub(super) async fn open(
    api: &Api<'_>,
    caller: &Caller,
    method: &MethodDescriptor,
    request: &Value,
) -> Result<tonic::Streaming<Bytes>, Status> {
    let mut grpc = Grpc::new(api.channel.clone());
    grpc.ready().await.unwrap();
    let frame = Bytes::from(message(method, request).encode_to_vec());
    let mut request = Request::new(tokio_stream::once(frame));
    *request.metadata_mut() = tonic::metadata::MetadataMap::from_headers(caller.headers());
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    let streaming = grpc.streaming(request, PathAndQuery::try_from(path).unwrap(), Raw).await;
    streaming.map(tonic::Response::into_inner)
}

async fn over_rest(
    api: &Api<'_>,
    caller: &Caller,
    method: &MethodDescriptor,
    verb: &Method,
    path: &str,
    body: &str,
    request: &Value,
) -> Answer {
    let mut fields = in_json(&method.input(), request);
    let mut target = path.to_owned();
    for name in variables(path) {
        let value =
            fields.remove(name).unwrap_or_else(|| panic!("the row of {} leaves out {name}", method.full_name()));
        target = target.replace(&format!("{{{name}}}"), value.as_str().unwrap());
    }
    if body.is_empty() && !fields.is_empty() {
        let pairs: Vec<String> = fields.iter().map(|(name, value)| format!("{name}={}", escaped(value))).collect();
        target = format!("{target}?{}", pairs.join("&"));
    }
    let mut http = api.server.anonymous(verb.clone(), &target).headers(caller.headers());
    if !body.is_empty() {
        let json = if body == "*" { Value::Object(fields) } else { fields[body].clone() };
        http = http.header("content-type", "application/json").body(json.to_string());
    }
    let response = soon("an answer", http.send()).await.unwrap();
    let (status, headers) = (response.status(), shown(response.headers()));
    if status.is_success() && method.is_server_streaming() {
        return Answer { code: String::new(), field: String::new(), text: headers };
    }
    let text = response.text().await.unwrap();
    if status.is_success() {
        return Answer { code: String::new(), field: String::new(), text };
    }
    let mut json: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let pick = |pointer: &str| json.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (code, field) = (pick("/error/code"), pick("/error/details/field"));
    json["meta"]["requestId"] = Value::Null;
    Answer { code, field, text: format!("{status}\n{headers}\n{json}") }
}

/// The fields as REST spells them: JSON that travels raw is no string, and an enum is a short word.
fn in_json(message: &MessageDescriptor, request: &Value) -> Map<String, Value> {
    let raw_json = message.parent_pool().get_extension_by_name("shortkit.rest.v1.raw_json").unwrap();
    let mut fields = request.as_object().unwrap().clone();
    for field in message.fields() {
        let Some(value) = fields.get_mut(field.name()) else { continue };
        if field.options().get_extension(&raw_json).as_bool() == Some(true) {
            *value = serde_json::from_str(value.as_str().unwrap()).unwrap();
        } else if let (Kind::Message(inner), Value::Array(items)) = (field.kind(), &mut *value) {
            items.iter_mut().for_each(|item| *item = Value::Object(in_json(&inner, item)));
        } else if let Kind::Enum(enumeration) = field.kind() {
            let prefix = enumeration.name().chars().fold(String::new(), |name, char| {
                let gap = if char.is_uppercase() && !name.is_empty() { "_" } else { "" };
                format!("{name}{gap}{}", char.to_ascii_uppercase())
            });
            let word = value.as_str().unwrap().strip_prefix(&format!("{prefix}_")).unwrap().to_lowercase();
            *value = Value::String(word);
        }
    }
    fields
}

/// A value as it stands in a query.
fn escaped(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

/// Messages as bytes, whatever they are.
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}
