//! `watch`: the live stream in the terminal.

use std::{io, time::Duration};

use clap::{Args, ValueEnum};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::{
    Error,
    client::{Client, ClientArgs},
    print,
};
use crate::{
    grpc::proto::{DeliveryChange, DeliveryStatus, WatchDeliveriesRequest, WatchDeliveriesResponse},
    webhook::Timestamp,
};

/// Wait before the stream is asked for again; it doubles from failure to failure …
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// … up to this.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// Arguments of `watch`.
#[derive(Args)]
pub(super) struct WatchArgs {
    #[command(flatten)]
    client: ClientArgs,
    /// Only deliveries of this webhook, `whk_…`
    #[arg(long, value_name = "ID")]
    webhook: Option<String>,
    /// Only changes into this state
    #[arg(long, value_enum)]
    status: Option<StatusWord>,
    /// Only deliveries of this event type
    #[arg(long, value_name = "TYPE")]
    event: Option<String>,
    /// Go on right after the change that had this resume token
    #[arg(long, value_name = "TOKEN", allow_hyphen_values = true)]
    resume: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum StatusWord {
    Pending,
    Success,
    Failed,
}

impl WatchArgs {
    pub(super) async fn run(self, stop: CancellationToken) -> Result<(), Error> {
        let client = self.client.connect()?;
        let status = self.status.map(|status| match status {
            StatusWord::Pending => DeliveryStatus::Pending,
            StatusWord::Success => DeliveryStatus::Success,
            StatusWord::Failed => DeliveryStatus::Failed,
        });
        let mut request = WatchDeliveriesRequest {
            webhook_id: self.webhook.clone().unwrap_or_default(),
            status: status.map(Into::into),
            event: self.event.clone(),
            resume_token: self.resume.clone(),
        };
        let mut wait = FIRST_WAIT;
        loop {
            let before = request.resume_token.clone();
            let ended = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                ended = follow(client.clone(), &mut request) => ended?,
            };
            if let Err(status) = ended {
                if !matches!(status.code(), Code::Unavailable | Code::Aborted | Code::Unknown | Code::Cancelled) {
                    return Err(Error::Failed(self.client.explain(&status)));
                }
                eprintln!("{}; trying again", self.client.explain(&status));
            }
            wait = if before == request.resume_token { MAX_WAIT.min(wait * 2) } else { FIRST_WAIT };
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(wait) => {}
            }
        }
    }
}

/// Prints changes until the stream ends; `request` then asks for what comes after the last one. The outer error is that
/// nobody reads any more, the inner one how the stream ended.
async fn follow(mut client: Client, request: &mut WatchDeliveriesRequest) -> io::Result<Result<(), Status>> {
    let mut changes = match client.watch_deliveries(request.clone()).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return Ok(Err(status)),
    };
    loop {
        match changes.message().await {
            Ok(Some(change)) => {
                print(line(&change))?;
                request.resume_token = Some(change.resume_token);
            }
            Ok(None) => return Ok(Ok(())),
            Err(status) => return Ok(Err(status)),
        }
    }
}

fn line(change: &WatchDeliveriesResponse) -> String {
    let at = change.occurred_at.map(|at| Timestamp::from_millis(at.seconds * 1000 + i64::from(at.nanos / 1_000_000)));
    let what = match change.change() {
        DeliveryChange::Created => "created".to_owned(),
        DeliveryChange::Retried => "retried".to_owned(),
        DeliveryChange::Attempted | DeliveryChange::Unspecified => format!("attempt {}", change.attempts),
    };
    let state = match change.status() {
        DeliveryStatus::Success => "success",
        DeliveryStatus::Failed => "failed",
        DeliveryStatus::Pending | DeliveryStatus::Unspecified => "pending",
    };
    let mut line = format!(
        "{}  {state:7}  {}  {}  {}  {what}",
        at.map(|at| at.to_string()).unwrap_or_default(),
        change.event,
        change.webhook_id,
        change.delivery_id,
    );
    if let Some(time) = change.response_time {
        line.push_str(&format!("  {time} ms"));
    }
    match (&change.last_error, change.status_code) {
        (Some(error), _) => line.push_str(&format!("  {error}")),
        (None, Some(code)) => line.push_str(&format!("  HTTP {code}")),
        (None, None) => {}
    }
    line
}
