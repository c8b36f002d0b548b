//! The only place with generated types: requests become domain types here, and domain types answers.

mod audit_service;
mod codec;
mod convert;
mod delivery_service;
mod services;
mod status;
mod token;
mod validate;
mod watch;
mod webhook_service;

use std::sync::Arc;

use prost::Message;
use prost_types::FileDescriptorSet;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};

pub use self::{
    codec::Protobuf,
    services::Services,
    token::{Purpose, Tokens},
};
pub(crate) use self::{
    services::SERVICES,
    status::{
        internal, invalid_parameter, key_refused, key_reused, message_too_long, no_database, panicked, rate_limited,
        store as store_failed,
    },
};
use crate::{
    auth::Principal,
    egress,
    store::{Actor, Keep, Lease, NamedRequest, Store},
    webhook::{EventTypes, Tenant},
};

/// What protoc made of `proto/`.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod proto {
    tonic::include_proto!("shortkit.webhooks.v1");
}

/// `proto/` as descriptors, with every option: for REST and for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Every method of our services, with its service.
pub(crate) fn methods() -> impl Iterator<Item = (String, String)> {
    let files = FileDescriptorSet::decode(DESCRIPTORS).unwrap_or_else(|_| unreachable!("the build wrote it")).file;
    files.into_iter().flat_map(|file| {
        let package = file.package().to_owned();
        file.service.into_iter().flat_map(move |service| {
            let name = format!("{package}.{}", service.name());
            service.method.into_iter().map(move |method| (name.clone(), method.name().to_owned()))
        })
    })
}

/// Calls that are one transaction, which keeps their answer when their caller named the request.
pub(crate) const KEEPS_ITS_ANSWER: [&str; 4] = [
    "/shortkit.webhooks.v1.DeliveryService/PublishEvent",
    "/shortkit.webhooks.v1.DeliveryService/PublishEvents",
    "/shortkit.webhooks.v1.WebhookService/CreateWebhook",
    "/shortkit.webhooks.v1.WebhookService/RotateSecret",
];

/// All services.
#[derive(Clone)]
pub struct Api(pub Arc<Parts>);

/// What the services work with.
pub struct Parts {
    /// Where everything is kept.
    pub store: Store,
    /// Judges the URLs of webhooks.
    pub client: egress::Client,
    /// The event types that exist.
    pub event_types: EventTypes,
    /// Webhooks that each tenant may have.
    pub max_webhooks: u64,
    /// Seals cursors and resume tokens.
    pub tokens: Tokens,
    /// What a published delivery is leased for.
    pub lease: Lease,
    /// Ends open streams.
    pub shutdown: CancellationToken,
}

impl std::ops::Deref for Api {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

/// Who calls.
fn principal<T>(request: &Request<T>) -> Result<&Principal, Status> {
    request.extensions().get::<Principal>().ok_or_else(|| status::internal("no principal"))
}

/// Who answers for what the call changes.
fn actor<T>(request: &Request<T>) -> Result<Actor, Status> {
    Ok(principal(request)?.actor.clone())
}

/// What the transaction of a call is to keep: its answer, when its caller named the request.
fn keep<R, T, A: Message>(request: &Request<R>, answer: impl Fn(&T) -> A + Send + Sync + 'static) -> Option<Keep<T>> {
    let named = request.extensions().get::<Arc<NamedRequest>>()?;
    Some(Keep::new(Arc::clone(named), move |done| answer(done).encode_to_vec()))
}

/// Whose call it is: the tenant of the key, or the organisation that a service key names.
fn tenant<T>(request: &Request<T>) -> Result<Tenant, Status> {
    Ok(principal(request)?.tenant.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_that_keep_their_answer_exist() {
        let methods: Vec<_> = methods().map(|(service, method)| format!("/{service}/{method}")).collect();
        for call in KEEPS_ITS_ANSWER {
            assert!(methods.iter().any(|known| known == call), "{call} is not in {methods:?}");
        }
    }
}
