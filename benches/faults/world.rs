//! What every scenario stands on: nodes on a database, two tenants with a webhook each, publishers, the books.

use std::{
    ops::Range,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use http::Method;
use sea_orm::{ConnectionTrait, Database, DbErr, Statement};
use serde_json::{Value, json};
use shortkit_webhooks::clock;
use tempfile::TempDir;

use crate::{
    ledger::{Ledger, Outcome},
    load::{Keys, Load},
    node::{Launch, Node},
    receiver::Receiver,
};

/// The tenants; each has one webhook.
pub(crate) const ORGANIZATIONS: [&str; 2] = ["acme", "rival"];
/// Attempts under way to one webhook on one node.
pub(crate) const MAX_IN_FLIGHT: usize = 16;
/// A lease outlasts the request by this much: `dispatch::LEASE_MARGIN`.
pub(crate) const LEASE_MARGIN: Duration = Duration::from_secs(30);
/// The request timeout of the nodes: short, so that leases are, and long enough for a receiver on a busy machine, whose
/// late answer would be a repeat that nothing here has caused.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a lease is.
pub(crate) const LEASE: Duration = Duration::from_secs(LEASE_MARGIN.as_secs() + REQUEST_TIMEOUT.as_secs());
/// A publisher that has no answer within this time gives up.
const PATIENCE: Duration = Duration::from_secs(20);

/// Everything of one scenario; gone when dropped.
pub(crate) struct World {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) receiver: Receiver,
    pub(crate) launches: Vec<Launch>,
    pub(crate) nodes: Vec<Option<Node>>,
    pub(crate) caller: Caller,
    webhooks: Vec<String>,
    _directory: TempDir,
}

/// Where the nodes are now, and a client that calls them.
#[derive(Clone)]
pub(crate) struct Caller {
    http: reqwest::Client,
    doors: Arc<Mutex<Vec<Option<String>>>>,
    key: String,
}

impl World {
    /// Starts `count` nodes on the database at `url`, or one on a SQLite database of its own, after `prepare` had its say
    /// in how.
    pub(crate) async fn start(
        count: usize,
        url: Option<&str>,
        prepare: impl Fn(usize, Launch) -> Launch,
    ) -> Result<Self, String> {
        let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
        let sqlite = sqlite_url(directory.path());
        let url = url.unwrap_or(&sqlite);
        let ledger = Arc::new(Ledger::default());
        let receiver = Receiver::start(Arc::clone(&ledger)).await;
        let (mut launches, mut nodes) = (Vec::new(), Vec::new());
        let master_key = STANDARD.encode(clock::random::<32>());
        for index in 0..count {
            let launch = Launch::new(&directory.path().join(format!("node-{index}")), url)
                // What one node encrypts the others must read.
                .env("SHORTKIT_MASTER_KEY", &master_key)
                .arg("--request-timeout", &format!("{}s", REQUEST_TIMEOUT.as_secs()))
                .arg("--max-in-flight", &MAX_IN_FLIGHT.to_string())
                // Many and short waits: a delivery that meets several crashes in a row is not to end for it.
                .arg("--retry-schedule", &format!("0s{}", ",1s".repeat(19)));
            let launch = prepare(index, launch);
            nodes.push(Some(launch.start().await?));
            launches.push(launch);
        }
        let key = nodes[0].as_ref().map(|node| node.key.clone()).unwrap_or_default();
        let doors = nodes.iter().map(|node| node.as_ref().map(|node| node.base.clone())).collect();
        let http =
            reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().map_err(|error| error.to_string())?;
        let caller = Caller { http, doors: Arc::new(Mutex::new(doors)), key };
        let mut world = Self { ledger, receiver, launches, nodes, caller, webhooks: Vec::new(), _directory: directory };
        for organization in ORGANIZATIONS {
            let body = json!({ "url": world.receiver.url(organization), "events": ["content.ready"] });
            let made = world.caller.call(0, Method::POST, organization, "/v1/webhooks", &body.to_string()).await?;
            let text = |key: &str| made["data"][key].as_str().map(str::to_owned).ok_or_else(|| made.to_string());
            world.receiver.trust(organization, &text("secret")?);
            world.webhooks.push(text("id")?);
        }
        Ok(world)
    }

    /// `kill -9`, noted as a fault; publishers go to the others.
    pub(crate) async fn kill(&mut self, index: usize) {
        self.caller.close(index);
        self.ledger.fault();
        if let Some(node) = self.nodes[index].take() {
            node.kill().await;
        }
    }

    /// Starts the node again that was killed or has ended.
    pub(crate) async fn restart(&mut self, index: usize) -> Result<(), String> {
        let node = self.launches[index].start().await?;
        self.caller.open(index, &node.base);
        self.nodes[index] = Some(node);
        Ok(())
    }

    pub(crate) fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().expect("the node runs")
    }

    /// Starts `publishers`, each of which publishes, waits for `pause`, and publishes again.
    pub(crate) fn load(&self, publishers: usize, pause: Duration) -> Load {
        Load::start(self, publishers, pause, Keys::None)
    }

    /// The same with idempotency keys for every other publish. One that has a key is published again until its outcome is
    /// known.
    pub(crate) fn load_with_keys(&self, publishers: usize, pause: Duration) -> Load {
        Load::start(self, publishers, pause, Keys::EveryOther)
    }

    /// Waits until everything acknowledged has arrived, every attempt is recorded, and of what was published together
    /// nothing is left to be stored or discarded, or `time` has passed.
    pub(crate) async fn settle(&self, time: Duration) {
        let started = clock::stopwatch();
        while started.elapsed() < time {
            if self.ledger.missing() == 0
                && self.stats().await.is_ok_and(|stats| stats.is_settled())
                && self.kept().await.is_ok_and(|kept| kept == 0)
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The statistics of all webhooks together.
    pub(crate) async fn stats(&self) -> Result<Stats, String> {
        let mut sum = Stats::default();
        for (organization, id) in ORGANIZATIONS.iter().zip(&self.webhooks) {
            let answer = self.caller.call(0, Method::GET, organization, &format!("/v1/webhooks/{id}"), "").await?;
            let count = |key: &str| answer["data"]["stats"][key].as_u64().ok_or_else(|| answer.to_string());
            sum.total += count("totalDeliveries")?;
            sum.successful += count("successfulDeliveries")?;
            sum.failed += count("failedDeliveries")?;
        }
        Ok(sum)
    }

    /// How much is still kept of what was published together.
    pub(crate) async fn kept(&self) -> Result<i64, String> {
        let count = async {
            let database = Database::connect(&self.launches[0].database_url).await?;
            let sql = "SELECT (SELECT count(*) FROM publish_parts) + (SELECT count(*) FROM publish_drafts)";
            let statement = Statement::from_string(database.get_database_backend(), sql);
            let row = database.query_one_raw(statement).await;
            let _ = database.close().await;
            row?.ok_or(DbErr::RecordNotFound(sql.to_owned()))?.try_get_by_index(0)
        };
        count.await.map_err(|error: DbErr| error.to_string())
    }

    /// Path of the webhook of `organization`.
    pub(crate) fn webhook(&self, organization: &str) -> String {
        let index = ORGANIZATIONS.iter().position(|known| *known == organization).expect("a known organisation");
        format!("/v1/webhooks/{}", self.webhooks[index])
    }
}

/// What `stats` says.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Stats {
    pub(crate) total: u64,
    pub(crate) successful: u64,
    pub(crate) failed: u64,
}

impl Stats {
    pub(crate) fn is_settled(&self) -> bool {
        self.total == self.successful + self.failed
    }
}

impl Caller {
    /// Nobody is sent to this node any more.
    pub(crate) fn close(&self, index: usize) {
        self.doors.lock().expect("no panic")[index] = None;
    }

    pub(crate) fn open(&self, index: usize, base: &str) {
        self.doors.lock().expect("no panic")[index] = Some(base.to_owned());
    }

    /// Whether there is anybody to call.
    pub(crate) fn is_open(&self) -> bool {
        self.door(0).is_some()
    }

    /// The address of an open node: number `door`, going round.
    fn door(&self, door: usize) -> Option<String> {
        let doors = self.doors.lock().expect("no panic");
        let open: Vec<&String> = doors.iter().flatten().collect();
        (!open.is_empty()).then(|| open[door % open.len()].clone())
    }

    /// Publishes the next event of the books and notes how it ended; its answer when there was one.
    pub(crate) async fn publish(
        &self,
        ledger: &Ledger,
        door: usize,
        organization: &'static str,
    ) -> Option<(u16, Value)> {
        if self.door(door).is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
            return None;
        }
        let numbers = ledger.begin(organization, 1);
        self.publish_again(ledger, door, organization, numbers, None).await
    }

    /// Publishes events that are in the books, perhaps not for the first time: one as such, more of them together.
    pub(crate) async fn publish_again(
        &self,
        ledger: &Ledger,
        door: usize,
        organization: &str,
        numbers: Range<u64>,
        idempotency_key: Option<&str>,
    ) -> Option<(u16, Value)> {
        let event = |number| {
            let mut data = json!({ "number": number });
            if idempotency_key.is_some() {
                // Tells those who see only what is stored.
                data["with_key"] = true.into();
            }
            json!({ "event": "content.ready", "data": data })
        };
        let (path, body) = if numbers.end - numbers.start == 1 {
            ("/v1/events", event(numbers.start))
        } else {
            ("/v1/events/batch", json!({ "events": numbers.clone().map(event).collect::<Vec<_>>() }))
        };
        let answer = match self.door(door) {
            Some(base) => self.send(&base, Method::POST, organization, path, &body.to_string(), idempotency_key).await,
            None => None,
        };
        let outcome = match &answer {
            Some((200..300, _)) => Outcome::Acknowledged,
            Some((status, _)) => Outcome::Refused(*status),
            None => Outcome::Unknown,
        };
        if let Some((200..300, answer)) = &answer {
            let data = &answer["data"];
            let events = data["events"].as_array().map_or(std::slice::from_ref(data), Vec::as_slice);
            ledger.named(numbers.clone(), &events.iter().filter_map(|event| event["id"].as_str()).collect::<Vec<_>>());
        }
        ledger.end(numbers, outcome);
        answer
    }

    /// A call of an open node that must succeed.
    pub(crate) async fn call(
        &self,
        door: usize,
        method: Method,
        organization: &str,
        path: &str,
        body: &str,
    ) -> Result<Value, String> {
        let base = self.door(door).ok_or("no node is there")?;
        match self.send(&base, method, organization, path, body, None).await {
            Some((200..300, answer)) => Ok(answer),
            other => Err(format!("{path}: {other:?}")),
        }
    }

    /// Status and body; none when no answer came.
    pub(crate) async fn send(
        &self,
        base: &str,
        method: Method,
        organization: &str,
        path: &str,
        body: &str,
        idempotency_key: Option<&str>,
    ) -> Option<(u16, Value)> {
        let mut request = self.http.request(method, format!("{base}{path}")).bearer_auth(&self.key);
        if !body.is_empty() {
            request = request.header("content-type", "application/json").body(body.to_owned());
        }
        if let Some(key) = idempotency_key {
            request = request.header("idempotency-key", key);
        }
        let response = request.header("x-shortkit-organization", organization).send().await.ok()?;
        let status = response.status().as_u16();
        let text = response.text().await.ok()?;
        Some((status, serde_json::from_str(&text).unwrap_or(Value::String(text))))
    }
}

pub(crate) fn sqlite_url(directory: &Path) -> String {
    format!("sqlite://{}?mode=rwc", directory.join("faults.db").display())
}
