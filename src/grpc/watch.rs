//! The live stream: pulled by the reader, so that a slow one holds no memory.

use std::pin::Pin;

use futures_util::{Stream, stream};
use tonic::Status;

use super::{Api, convert, delivery_service::filter_parts, proto, status, token::Purpose};
use crate::store::{ChangeFilter, Watch};

/// Name of the call in its tokens.
const CALL: &str = "watch";

/// What the call answers with.
pub(super) type Changes = Pin<Box<dyn Stream<Item = Result<proto::WatchDeliveriesResponse, Status>> + Send>>;

/// The changes that `filter` selects, from now on or from where `resume_token` was given out.
pub(super) async fn changes(api: Api, filter: ChangeFilter, resume_token: Option<String>) -> Result<Changes, Status> {
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
    let state = Some((api, filter, watch));
    Ok(Box::pin(stream::unfold(state, |state| async {
        let (api, filter, mut watch) = state?;
        match next(&api, &filter, &mut watch).await {
            Ok(message) => Some((Ok(message), Some((api, filter, watch)))),
            Err(status) => Some((Err(status), None)),
        }
    })))
}

async fn next(api: &Api, filter: &ChangeFilter, watch: &mut Watch) -> Result<proto::WatchDeliveriesResponse, Status> {
    let change = tokio::select! {
        () = api.shutdown.cancelled() => return Err(status::shutting_down()),
        change = watch.next() => change.map_err(status::watch)?,
    };
    let token = purpose(filter, |purpose| api.tokens.seal(purpose, &change.seq.to_string()));
    Ok(convert::change(change, token))
}

fn purpose<T>(filter: &ChangeFilter, with: impl FnOnce(&Purpose<'_>) -> T) -> T {
    let webhook_id = filter.webhook_id.as_deref().unwrap_or_default();
    let parts = filter_parts(webhook_id, filter.status, filter.event_type.as_deref());
    with(&Purpose { call: CALL, tenant: &filter.tenant, filter: &parts })
}
