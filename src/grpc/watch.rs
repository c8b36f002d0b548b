//! The live stream: pulled by the reader, so that a slow one holds no memory.

use std::pin::Pin;

use futures_util::{Stream, future::BoxFuture, stream};
use tonic::Status;

use super::{Api, convert, delivery_service::filter_parts, proto, status, token::Purpose};
use crate::{
    auth::Principal,
    store::{ChangeFilter, Watch},
};

/// Name of the call in its tokens.
const CALL: &str = "watch";

/// What the call answers with.
pub(super) type Changes = Pin<Box<dyn Stream<Item = Result<proto::WatchDeliveriesResponse, Status>> + Send>>;

/// A stream on its way to the reader.
struct Open {
    api: Api,
    filter: ChangeFilter,
    watch: Watch,
    /// Ends when the key of the call opens no door any more.
    shut_out: BoxFuture<'static, Status>,
}

/// The changes that `filter` selects, from now on or from where `resume_token` was given out, as long as the key of
/// `principal` opens the door.
pub(super) async fn changes(
    api: Api,
    principal: Principal,
    filter: ChangeFilter,
    resume_token: Option<String>,
) -> Result<Changes, Status> {
    let after = match resume_token {
        None => None,
        Some(token) => {
            let opened = purpose(&filter, |purpose| api.tokens.open(purpose, &token));
            let position = opened.and_then(|position| position.parse::<i64>().ok());
            let refuse = || {
                let message = "the resume token is not one that this stream gave out".to_owned();
                status::invalid_parameter("resume_token", "invalid", message)
            };
            Some(position.ok_or_else(refuse)?)
        }
    };
    let watch = api.store.watch(filter.clone(), after).await.map_err(status::watch)?;
    // The state goes round from item to item; an error ends it.
    let shut_out = Box::pin(async move { principal.shut_out().await });
    let state = Some(Open { api, filter, watch, shut_out });
    Ok(Box::pin(stream::unfold(state, |state| async {
        let mut open = state?;
        match open.next().await {
            Ok(message) => Some((Ok(message), Some(open))),
            Err(status) => Some((Err(status), None)),
        }
    })))
}

impl Open {
    async fn next(&mut self) -> Result<proto::WatchDeliveriesResponse, Status> {
        let change = tokio::select! {
            // In this order, so that no number of changes keeps a stream open.
            biased;
            () = self.api.shutdown.cancelled() => return Err(status::shutting_down()),
            status = &mut self.shut_out => return Err(status),
            change = self.watch.next() => change.map_err(status::watch)?,
        };
        let token = purpose(&self.filter, |purpose| self.api.tokens.seal(purpose, &change.seq.to_string()));
        Ok(convert::change(change, token))
    }
}

fn purpose<T>(filter: &ChangeFilter, with: impl FnOnce(&Purpose<'_>) -> T) -> T {
    let webhook_id = filter.webhook_id.as_deref().unwrap_or_default();
    let parts = filter_parts(webhook_id, filter.status, filter.event_type.as_deref());
    with(&Purpose { call: CALL, tenant: &filter.tenant, filter: &parts })
}
