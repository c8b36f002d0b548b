//! A REST request as the message of its call.

use std::sync::Arc;

use bytes::Bytes;
use http::{Extensions, HeaderValue, Uri, request::Parts};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::value::RawValue;
use tonic::{Code, Status, body::Body};

use super::{
    MAX_BODY_BYTES, Plan, call, decode,
    error::Failure,
    gzip::Fault,
    query,
    routes::{BodyRule, Route},
    template::Bound,
    wire::{self, Value},
};

/// The number of `paths` in `google.protobuf.FieldMask`.
const MASK_PATHS: u32 = 1;

/// What a message is made of.
pub(super) struct Source {
    route: Arc<Route>,
    uri: Uri,
    /// For each variable of the path.
    bound: Vec<String>,
    content_type: Option<HeaderValue>,
    packed: Option<Packed>,
    last_event_id: Option<HeaderValue>,
    body: Body,
}

/// What a body that is not as it is goes by.
struct Packed {
    encoding: HeaderValue,
    plan: Arc<Plan>,
    extensions: Extensions,
}

impl Source {
    pub(super) fn new(plan: &Arc<Plan>, route: &Arc<Route>, bound: Bound<'_>, head: &Parts, body: Body) -> Self {
        let header = |name: &str| head.headers.get(name).cloned();
        Self {
            route: Arc::clone(route),
            uri: head.uri.clone(),
            bound: bound.into_iter().map(|(_, text)| text).collect(),
            content_type: header("content-type"),
            packed: header("content-encoding").map(|encoding| Packed {
                encoding,
                plan: Arc::clone(plan),
                extensions: head.extensions.clone(),
            }),
            last_event_id: header("last-event-id"),
            body,
        }
    }

    /// Reads the body and appends what query, headers and path say; what stands later counts. The frame's prefix is still
    /// to be filled.
    pub(super) async fn message(self) -> Result<Vec<u8>, Failure> {
        let route = &self.route;
        let query = self.uri.query().unwrap_or_default();
        let body = read(route, self.packed, self.body).await?;
        let mut out = Vec::with_capacity(call::PREFIX + body.len() + query.len() + 64);
        out.resize(call::PREFIX, 0);
        append_body(&mut out, route, self.content_type.as_ref(), &body)?;
        query::append(&mut out, query, route)?;
        let table = route.tables.message(route.input);
        if route.streaming
            && let Some(id) = self.last_event_id
            && let Some(field) = table.last_event_id
        {
            let field = &table.fields[field];
            // Taken for no id at all, it would make the reader miss what it came back for.
            let refuse = |_| Failure::parameter(&field.json_name, "invalid", "is not text");
            let id = id.to_str().map_err(refuse)?;
            wire::field(&mut out, field.number, Value::Bytes(id.as_bytes()));
        }
        for (path, text) in route.variables.iter().zip(&self.bound) {
            let shown = route.tables.last(route.input, path).map_or("", |field| field.json_name.as_str());
            query::set(&mut out, route, path, shown, text)?;
        }
        Ok(out)
    }
}

fn append_body(
    out: &mut Vec<u8>,
    route: &Route,
    content_type: Option<&HeaderValue>,
    body: &Bytes,
) -> Result<(), Failure> {
    if body.is_empty() {
        return if route.update_mask.is_some() { Err(nothing_to_change()) } else { Ok(()) };
    }
    if matches!(route.body, BodyRule::None) {
        return Err(Failure::request("this call takes no body"));
    }
    if !is_json(content_type) {
        return Err(Failure::new("UNSUPPORTED_MEDIA_TYPE", "the body must be application/json in UTF-8"));
    }
    let text = std::str::from_utf8(body).map_err(|error| {
        let offset = error.valid_up_to();
        Failure::request(format!("the body is not UTF-8 at byte {offset}")).with("offset", offset)
    })?;
    let raw: &RawValue = serde_json::from_str(text).map_err(|error| {
        // What ends too early is wrong at its end; serde_json names the last byte.
        let offset = if error.is_eof() { text.len() } else { offset(text, error.line(), error.column()) };
        Failure::request(format!("the body is not valid JSON at byte {offset}")).with("offset", offset)
    })?;
    let (tables, input) = (&route.tables, route.tables.message(route.input));
    let BodyRule::Field { field, message } = route.body else {
        return decode::body(tables, route.input, raw, out).map(drop);
    };
    let mut given = Vec::new();
    wire::nested(out, input.fields[field].number, |out| {
        given = decode::body(tables, message, raw, out)?;
        Ok(())
    })?;
    let Some(mask) = route.update_mask else { return Ok(()) };
    if given.is_empty() {
        return Err(nothing_to_change());
    }
    wire::nested(out, input.fields[mask].number, |out| {
        for place in given {
            let name = &tables.message(message).fields[place].name;
            wire::field(out, MASK_PATHS, Value::Bytes(name.as_bytes()));
        }
        Ok(())
    })
}

/// A partial body that names no field. The service would find fault with its mask, which REST callers do not know.
fn nothing_to_change() -> Failure {
    Failure::new("VALIDATION_ERROR", "name at least one field to change")
}

async fn read(route: &Route, packed: Option<Packed>, body: Body) -> Result<Bytes, Failure> {
    let too_large = || Failure::new("PAYLOAD_TOO_LARGE", format!("the body must be at most {MAX_BODY_BYTES} bytes"));
    let collected = Limited::new(body, MAX_BODY_BYTES).collect().await.map_err(|error| {
        if error.is::<LengthLimitError>() {
            return too_large();
        }
        // Whoever hands in the body may have a reason of its own not to go on.
        match error.downcast_ref::<Status>() {
            Some(status)
                if matches!(status.code(), Code::DeadlineExceeded | Code::ResourceExhausted | Code::Unavailable) =>
            {
                Failure::from_status(status, route)
            }
            _ => Failure::request("the body could not be read"),
        }
    })?;
    let bytes = collected.to_bytes();
    let Some(Packed { encoding, plan, extensions }) = packed else { return Ok(bytes) };
    match encoding.to_str().unwrap_or_default().trim() {
        "" | "identity" => Ok(bytes),
        encoding if encoding.eq_ignore_ascii_case("gzip") => {
            let organization = (plan.limits.organization)(&extensions);
            match plan.unpacker.unpack(organization, bytes, MAX_BODY_BYTES).await {
                Ok(unpacked) => Ok(unpacked.into()),
                Err(Fault::TooLong) => Err(too_large()),
                Err(Fault::Invalid) => Err(Failure::request("the body is not valid gzip")),
            }
        }
        _ => Err(Failure::new("UNSUPPORTED_MEDIA_TYPE", "the body may be encoded with gzip only")),
    }
}

/// `application/json`, in any spelling of UTF-8 or in none.
fn is_json(content_type: Option<&HeaderValue>) -> bool {
    let Some(value) = content_type.and_then(|value| value.to_str().ok()) else { return false };
    let mut parts = value.split(';').map(str::trim);
    let essence = parts.next().unwrap_or_default();
    essence.eq_ignore_ascii_case("application/json")
        && parts.filter(|part| !part.is_empty()).all(|part| match part.split_once('=') {
            Some((name, charset)) if name.trim().eq_ignore_ascii_case("charset") => {
                let charset = charset.trim().trim_matches('"');
                charset.eq_ignore_ascii_case("utf-8") || charset.eq_ignore_ascii_case("utf8")
            }
            _ => true,
        })
}

/// The byte that serde_json means by a line and a column.
fn offset(text: &str, line: usize, column: usize) -> usize {
    let before: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    (before + column.saturating_sub(1)).min(text.len())
}
