//! Who calls: one layer for both protocols, since REST calls go through it as gRPC calls.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response, header::AUTHORIZATION};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use crate::{
    clock,
    grpc::{self, key_refused},
    listen::{Caller, ClientCertificate},
    store::{Actor, KeyHash, KeyInfo, KeyKind, Store},
    webhook::{Environment, MAX_ORGANIZATION_BYTES, Tenant},
};

/// Names the organisation that a service key acts for.
const ORGANIZATION: &str = "x-shortkit-organization";
/// Names the request; the server has put it there, since ids are ours.
const REQUEST_ID: &str = "x-request-id";
/// A longer key is none.
const MAX_KEY_BYTES: usize = 256;
/// The key of an open stream is looked at this often, beside each time that keys have changed: it may expire, and
/// changes cannot be learned of while the database is away.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Services that need no key.
const OPEN: [&str; 2] = ["/grpc.health.v1.", "/grpc.reflection."];

/// Who a call is from.
#[derive(Clone)]
pub struct Principal {
    /// On whose behalf it acts.
    pub tenant: Tenant,
    /// Who answers for what it changes.
    pub actor: Actor,
    /// What sort of key it has.
    pub kind: KeyKind,
    keys: Arc<Keys>,
    key: KeyHash,
}

/// Lets a call pass only with a key that may make it, and says whose it is.
#[derive(Clone)]
pub struct Auth(Arc<Keys>);

struct Keys {
    store: Store,
    environments: Vec<Environment>,
    /// Whether service keys need a client certificate beside them.
    certified: bool,
}

/// The layer around a service.
#[derive(Clone)]
pub struct Authenticated<S> {
    keys: Arc<Keys>,
    inner: S,
}

impl Auth {
    /// Accepts keys of `environments`; when `certified`, service keys only with a client certificate.
    pub fn new(store: Store, environments: Vec<Environment>, certified: bool) -> Self {
        Self(Arc::new(Keys { store, environments, certified }))
    }
}

impl<S> Layer<S> for Auth {
    type Service = Authenticated<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Authenticated { keys: Arc::clone(&self.0), inner }
    }
}

impl<S> Service<Request<Body>> for Authenticated<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let keys = Arc::clone(&self.keys);
        // The one that was polled ready is called; the clone waits for the next call.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        Box::pin(async move {
            if !OPEN.iter().any(|open| request.uri().path().starts_with(open)) {
                let certificate = request.extensions().get::<ClientCertificate>().copied();
                match keys.principal(request.headers(), certificate).await {
                    Ok(principal) => {
                        if let Some(caller) = request.extensions().get::<Caller>() {
                            caller.accept(principal.tenant.shared_organization());
                        }
                        request.extensions_mut().insert(principal);
                    }
                    Err(status) => return Ok(status.into_http()),
                }
            }
            inner.call(request).await
        })
    }
}

impl Principal {
    /// Waits until the key opens no door any more, and says why: for calls that outlast the moment when they were let in.
    pub(crate) async fn shut_out(&self) -> Status {
        let mut changes = self.keys.store.key_changes();
        loop {
            match self.keys.check(self.key).await {
                // While the database cannot be asked there is nothing to see either: all that streams show is from there.
                Err(status) if status.code() != Code::Unavailable => return status,
                Ok(_) | Err(_) => {}
            }
            let _ = tokio::time::timeout(LOOK_AGAIN, changes.changed()).await;
        }
    }
}

impl Keys {
    async fn principal(
        self: Arc<Self>,
        headers: &HeaderMap,
        certificate: Option<ClientCertificate>,
    ) -> Result<Principal, Status> {
        let bearer = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let key =
            bearer.and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let Some((_, key)) = key else {
            return Err(key_refused("UNAUTHORIZED", "an API key is required: Authorization: Bearer sk_…"));
        };
        let key = key.trim();
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return Err(unknown());
        }
        let key = KeyHash::checked(key).ok_or_else(unknown)?;
        let info = self.check(key).await?;
        if info.kind == KeyKind::Service && self.certified && certificate.is_none() {
            return Err(key_refused(
                "FORBIDDEN",
                "a service key is taken here only together with a client certificate",
            ));
        }
        let tenant = tenant(&info, headers)?;
        self.store.key_used(&info.id);
        let request_id = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
        let actor = Actor::key(&info.id, request_id);
        Ok(Principal { tenant, actor, kind: info.kind, keys: self, key })
    }

    /// What is known of a key that opens the door now.
    async fn check(&self, key: KeyHash) -> Result<Arc<KeyInfo>, Status> {
        let info = self.store.find_key(key).await.map_err(grpc::store_failed)?.ok_or_else(unknown)?;
        if info.revoked_at.is_some() {
            return Err(key_refused("KEY_REVOKED", "the API key was revoked"));
        }
        if info.expires_at.is_some_and(|expires_at| expires_at <= clock::now()) {
            return Err(key_refused("KEY_EXPIRED", "the API key has expired"));
        }
        if info.kind == KeyKind::Publishable {
            return Err(key_refused("FORBIDDEN", "a publishable key may not be used here; use a secret key"));
        }
        if !self.environments.contains(&info.environment) {
            return Err(key_refused(
                "ENVIRONMENT_MISMATCH",
                "this server does not serve the environment of the API key",
            ));
        }
        Ok(info)
    }
}

fn unknown() -> Status {
    key_refused("UNAUTHORIZED", "the API key is not valid")
}

/// The tenant that a key acts for.
fn tenant(info: &KeyInfo, headers: &HeaderMap) -> Result<Tenant, Status> {
    let named = match &info.organization {
        Some(organization) => organization.as_str(),
        None => headers.get(ORGANIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default(),
    };
    Tenant::new(named, info.environment).ok_or_else(|| {
        let message = format!(
            "a service key names its organization in {ORGANIZATION}: 1 to {MAX_ORGANIZATION_BYTES} letters, digits, _ and -"
        );
        grpc::invalid_parameter(ORGANIZATION, if named.is_empty() { "required" } else { "invalid" }, message)
    })
}
