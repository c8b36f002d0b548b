//! `publish`: one event, or one for each line of standard input.

use std::{
    io::{IsTerminal, stderr},
    time::Duration,
};

use clap::Args;
use futures_util::{StreamExt, stream};
use tokio::io::{AsyncBufReadExt, BufReader, stdin};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{
    Error,
    client::{Client, ClientArgs},
    print,
};
use crate::{
    clock,
    grpc::proto::{PublishEventRequest, PublishEventResponse},
};

/// Publishes under way at a time; the server commits those together that arrive together.
const MAX_IN_FLIGHT: usize = 64;
/// Faulty lines shown one by one; more are only counted.
const MAX_SHOWN_FAULTS: u64 = 20;
/// Between two updates of the progress line.
const PROGRESS: Duration = Duration::from_millis(200);

/// Arguments of `publish`.
#[derive(Args)]
pub(super) struct PublishArgs {
    #[command(flatten)]
    client: ClientArgs,
    /// Event type, such as content.ready
    #[arg(value_name = "EVENT")]
    event: String,
    /// The event's data, one JSON object; without it each line of standard input is one event's data
    #[arg(long, value_name = "JSON")]
    data: Option<String>,
}

#[derive(Default)]
struct Tally {
    published: u64,
    deliveries: i64,
    failed: u64,
}

impl PublishArgs {
    pub(super) async fn run(self, stop: CancellationToken) -> Result<(), Error> {
        let client = self.client.connect()?;
        match self.data.clone() {
            Some(data) => self.one(client, data).await,
            None => self.lines(client, stop).await,
        }
    }

    async fn one(&self, mut client: Client, data: String) -> Result<(), Error> {
        let request = PublishEventRequest { event: self.event.clone(), data };
        let answer = client.publish_event(request).await;
        let answer = answer.map_err(|status| Error::Failed(self.client.explain(&status)))?.into_inner();
        print(&answer.id)?;
        eprintln!("published; deliveries made: {}", answer.deliveries);
        Ok(())
    }

    async fn lines(&self, client: Client, stop: CancellationToken) -> Result<(), Error> {
        if std::io::stdin().is_terminal() {
            eprintln!("One JSON object a line, until Ctrl-D; each becomes an event.");
        }
        // Bytes, so that a line that is not UTF-8 is one faulty line and not the end of all.
        let numbered = stream::unfold(Some((BufReader::new(stdin()).split(b'\n'), 0_u64)), async |state| {
            let (mut lines, number) = state?;
            match lines.next_segment().await {
                Ok(Some(line)) => Some((Ok((number + 1, line)), Some((lines, number + 1)))),
                Ok(None) => None,
                Err(error) => Some((Err((number + 1, error)), None)),
            }
        });
        let answers = numbered
            .take_until(stop.cancelled())
            .filter(|line| std::future::ready(line.as_ref().map_or(true, |(_, line)| !line.trim_ascii().is_empty())))
            .map(|line| {
                let (client, event, stop) = (client.clone(), self.event.clone(), stop.clone());
                async move {
                    let (number, line) =
                        line.map_err(|(number, error)| (number, Status::unknown(error.to_string())))?;
                    let data = String::from_utf8(line).map_err(|_| (number, Status::invalid_argument("not UTF-8")))?;
                    let answer = patiently(client, PublishEventRequest { event, data }, &stop).await;
                    answer.map_err(|status| (number, status))
                }
            })
            .buffer_unordered(MAX_IN_FLIGHT);
        let mut answers = std::pin::pin!(answers);
        let (started, mut shown) = (clock::stopwatch(), clock::stopwatch());
        let mut tally = Tally::default();
        let terminal = stderr().is_terminal();
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(answer) => {
                    tally.published += 1;
                    tally.deliveries += i64::from(answer.deliveries);
                }
                Err((number, status)) => {
                    tally.failed += 1;
                    if tally.failed <= MAX_SHOWN_FAULTS {
                        eprintln!("line {number}: {}", self.client.explain(&status));
                    }
                }
            }
            if terminal && shown.elapsed() >= PROGRESS {
                shown = clock::stopwatch();
                eprint!("\r{}", tally.sentence(started.elapsed()));
            }
        }
        eprintln!("{}{}", if terminal { "\r" } else { "" }, tally.sentence(started.elapsed()));
        if stop.is_cancelled() {
            return Err(Error::Failed("stopped before the end of standard input".to_owned()));
        }
        match tally.failed {
            0 => Ok(()),
            failed => Err(Error::Failed(format!("{failed} lines were not published"))),
        }
    }
}

/// Publishes, and when that is too fast for the rate limit, waits as long as the server says.
async fn patiently(
    mut client: Client,
    request: PublishEventRequest,
    stop: &CancellationToken,
) -> Result<PublishEventResponse, Status> {
    loop {
        let status = match client.publish_event(request.clone()).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => status,
        };
        let retry = status.get_error_details().retry_info().and_then(|info| info.retry_delay);
        let Some(wait) = retry.filter(|_| status.code() == Code::ResourceExhausted) else { return Err(status) };
        tokio::select! {
            () = stop.cancelled() => return Err(status),
            () = tokio::time::sleep(wait) => {}
        }
    }
}

impl Tally {
    fn sentence(&self, elapsed: Duration) -> String {
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let rate = self.published as f64 / elapsed.as_secs_f64().max(0.001);
        format!("{} events published, {} deliveries, {rate:.0} events/s", self.published, self.deliveries)
    }
}
