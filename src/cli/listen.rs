//! `listen`: a receiver at hand, for seeing signed deliveries.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{Router, body, extract::State};
use clap::Args;
use http::{HeaderMap, Request, StatusCode};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{Error, print};
use crate::{
    clock,
    webhook::{Secret, SigningKey, VerifyError, verify, verify_shortform},
};

/// A larger request is refused with 413.
const MAX_BODY_BYTES: usize = 2 * 1024 * 1024;

/// Arguments of `listen`.
#[derive(Args)]
pub(super) struct ListenArgs {
    /// Port on the loopback interface; 0 picks a free one
    #[arg(long, default_value_t = 9000)]
    port: u16,
    /// The webhook's signing secret; two, comma-separated or given twice, during a rotation. Without one nothing is verified
    #[arg(long, env = "SHORTKIT_SECRET", value_name = "whsec_…", hide_env_values = true, value_delimiter = ',', value_parser = secret)]
    secret: Vec<Secret>,
    /// Status to answer with; a signature that does not hold is answered with 401
    #[arg(long, default_value = "200", value_parser = status)]
    status: StatusCode,
    /// Wait before answering
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    delay: Duration,
}

struct Receiver {
    keys: Vec<SigningKey>,
    status: StatusCode,
    delay: Duration,
    stop: CancellationToken,
}

impl ListenArgs {
    pub(super) async fn run(self, stop: CancellationToken) -> Result<(), Error> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let listener = TcpListener::bind(address).await.map_err(|error| {
            Error::Failed(format!("cannot listen on {address}: {error}\n  Choose another port with --port."))
        })?;
        print(format_args!("listening on http://{}", listener.local_addr()?))?;
        if self.secret.is_empty() {
            eprintln!("Without --secret whsec_… signatures are shown and not verified.");
        }
        let keys = self.secret.iter().map(SigningKey::new).collect();
        let receiver = Arc::new(Receiver { keys, status: self.status, delay: self.delay, stop: stop.clone() });
        let app = Router::new().fallback(receive).with_state(receiver);
        let served = axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned());
        Ok(served.await?)
    }
}

async fn receive(State(receiver): State<Arc<Receiver>>, request: Request<body::Body>) -> (StatusCode, &'static str) {
    let (head, stream) = request.into_parts();
    let Ok(payload) = body::to_bytes(stream, MAX_BODY_BYTES).await else {
        eprintln!("refused a body of more than {MAX_BODY_BYTES} bytes");
        return (StatusCode::PAYLOAD_TOO_LARGE, "too large");
    };
    let verified = receiver.verify(&head.headers, &payload);
    let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("-");
    let status = if verified == Some(false) { StatusCode::UNAUTHORIZED } else { receiver.status };
    let shown = print(format_args!(
        "\n{}  {} {}  {}  attempt {}  {}\n{}\nanswering {status}",
        clock::now(),
        head.method,
        head.uri,
        header("x-shortform-delivery-id"),
        header("x-shortform-delivery-attempt"),
        receiver.sentences(&head.headers, &payload),
        pretty(&String::from_utf8_lossy(&payload)),
    ));
    if let Err(error) = shown {
        eprintln!("a request could not be shown: {error}");
    }
    tokio::select! {
        () = tokio::time::sleep(receiver.delay) => {}
        () = receiver.stop.cancelled() => {}
    }
    (status, "received")
}

impl Receiver {
    /// Whether both signatures hold for one of the secrets; none without a secret.
    fn verify(&self, headers: &HeaderMap, payload: &[u8]) -> Option<bool> {
        (!self.keys.is_empty())
            .then(|| self.standard(headers, payload).is_ok() && self.shortform(headers, payload).is_ok())
    }

    fn standard(&self, headers: &HeaderMap, payload: &[u8]) -> Result<(), VerifyError> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let (id, timestamp, signatures) = (text("webhook-id"), text("webhook-timestamp"), text("webhook-signature"));
        self.any(|key| verify(key, id, timestamp, signatures, payload, clock::now()))
    }

    fn shortform(&self, headers: &HeaderMap, payload: &[u8]) -> Result<(), VerifyError> {
        let signatures = headers.get("x-shortform-signature").and_then(|value| value.to_str().ok());
        self.any(|key| verify_shortform(key, signatures.unwrap_or_default(), payload))
    }

    fn any(&self, check: impl Fn(&SigningKey) -> Result<(), VerifyError>) -> Result<(), VerifyError> {
        self.keys.iter().map(check).reduce(Result::or).unwrap_or(Err(VerifyError::Mismatch))
    }

    fn sentences(&self, headers: &HeaderMap, payload: &[u8]) -> String {
        if self.keys.is_empty() {
            let signature = headers.get("x-shortform-signature").and_then(|value| value.to_str().ok());
            return format!("not verified: {}", signature.unwrap_or("no X-Shortform-Signature"));
        }
        let word = |verified: Result<(), VerifyError>| match verified {
            Ok(()) => "verified".to_owned(),
            Err(error) => format!("NOT VERIFIED, {error}"),
        };
        format!(
            "X-Shortform-Signature {}; webhook-signature {}",
            word(self.shortform(headers, payload)),
            word(self.standard(headers, payload)),
        )
    }
}

fn secret(text: &str) -> Result<Secret, String> {
    Secret::parse(text)
        .ok_or_else(|| "must be whsec_ and base64, as the answer of creating a webhook shows it".to_owned())
}

fn status(text: &str) -> Result<StatusCode, String> {
    let code = StatusCode::from_bytes(text.as_bytes()).ok().filter(|code| (200..=599).contains(&code.as_u16()));
    code.ok_or_else(|| "must be a number from 200 to 599".to_owned())
}

/// JSON with line breaks and indentation. Works on the text, so that numbers and strings are shown as they came.
fn pretty(json: &str) -> String {
    let (mut out, mut depth, mut quoted, mut escaped) = (String::with_capacity(json.len() * 2), 0_usize, false, false);
    let mut characters = json.chars().peekable();
    while let Some(character) = characters.next() {
        if quoted {
            out.push(character);
            quoted = escaped || character != '"';
            escaped = character == '\\' && !escaped;
            continue;
        }
        match character {
            '"' => {
                quoted = true;
                out.push(character);
            }
            '{' | '[' => {
                out.push(character);
                while characters.next_if(|next| next.is_ascii_whitespace()).is_some() {}
                match characters.next_if(|next| matches!(next, '}' | ']')) {
                    Some(close) => out.push(close),
                    None => {
                        depth += 1;
                        new_line(&mut out, depth);
                    }
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                new_line(&mut out, depth);
                out.push(character);
            }
            ',' => {
                out.push(character);
                new_line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            _ if character.is_ascii_whitespace() => {}
            _ => out.push(character),
        }
    }
    out
}

fn new_line(out: &mut String, depth: usize) {
    out.push('\n');
    out.extend(std::iter::repeat_n("  ", depth));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_values_as_they_came() {
        let shown = pretty(r#"{"a":1e400,"b":[ ],"c":{"d":"x,\"{y"} , "e":[45.20,null]}"#);
        let expected = "{\n  \"a\": 1e400,\n  \"b\": [],\n  \"c\": {\n    \"d\": \"x,\\\"{y\"\n  },\n  \"e\": [\n    45.20,\n    null\n  ]\n}";
        assert_eq!(shown, expected);
    }
}
