//! Requests that their callers named with an idempotency key: done once, and answered alike however often they are asked.
//!
//! There are two ways to do a request once. A call that is one transaction keeps its answer in that transaction
//! ([`Keep`]): what was committed can be asked for again, also when the reply of the commit was lost, and of two that
//! race the second fails on the first one's row. Any other call claims its name first ([`Store::claim_request`]) and puts its
//! answer there at the end; the claim of a node that died runs out.

use std::{collections::HashSet, sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend};

use super::{
    Error, Store,
    rows::{Column, Rows, int, text},
    script::{Expected, Outcome, Script},
    sql::Sql,
};
use crate::{
    clock,
    vault::{OpenError, Purpose},
    webhook::Tenant,
};

/// An answer is kept for so long.
const KEEP: Duration = Duration::from_secs(24 * 60 * 60);
/// An answer is at most this long; the longest there is, that of a test event, has 16 KiB of the receiver's.
const MAX_ANSWER_BYTES: usize = 64 * 1024;

const COLUMNS: &[Column] = &[
    text("organization"),
    text("environment"),
    text("call"),
    text("idempotency_key"),
    text("fingerprint"),
    text("answer"),
    text("master_key_id"),
    int("expires_at_ms"),
];
/// What has expired makes room; what has not stays, and then the number of rows says so.
const INSERT: &str = "INSERT INTO idempotency_keys \
    (organization, environment, call, idempotency_key, fingerprint, answer, master_key_id, expires_at_ms) \
    SELECT organization, environment, call, idempotency_key, fingerprint, answer, master_key_id, expires_at_ms \
    FROM {rows} WHERE TRUE \
    ON CONFLICT (organization, environment, call, idempotency_key) DO UPDATE SET fingerprint = excluded.fingerprint, \
    claim = NULL, answer = excluded.answer, master_key_id = excluded.master_key_id, \
    expires_at_ms = excluded.expires_at_ms \
    WHERE idempotency_keys.expires_at_ms <= excluded.expires_at_ms - {keep}";

/// A request by the name that its caller gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedRequest {
    /// Whose it is: the same name means something else for another tenant …
    pub tenant: Tenant,
    /// … and for another call.
    pub call: String,
    /// The idempotency key.
    pub key: String,
    /// Tells one body from another.
    pub fingerprint: String,
}

/// What is known of a named request.
#[derive(Debug, PartialEq, Eq)]
pub enum Remembered {
    /// Nothing: it may be done.
    Nothing,
    /// It is being done.
    AtWork,
    /// The name was given to another request.
    OtherBody,
    /// It was done, with this answer.
    Answer(Vec<u8>),
}

/// The right to do a named request.
#[derive(Debug)]
pub struct Claim {
    request: Arc<NamedRequest>,
    id: String,
}

/// The answer that a result is for the caller.
type AnswerOf<T> = dyn Fn(&T) -> Vec<u8> + Send + Sync;

/// What a transaction keeps beside its work: the name of the request, and its answer.
pub struct Keep<T> {
    request: Arc<NamedRequest>,
    answer: Box<AnswerOf<T>>,
}

/// An answer about to be kept.
pub(super) struct Kept<'a> {
    request: &'a NamedRequest,
    answer: Vec<u8>,
}

impl<T> Keep<T> {
    /// Keeps what `answer` makes of the result.
    pub fn new(request: Arc<NamedRequest>, answer: impl Fn(&T) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self { request, answer: Box::new(answer) }
    }

    pub(super) fn of(&self, done: &T) -> Kept<'_> {
        Kept { request: &self.request, answer: (self.answer)(done) }
    }
}

impl NamedRequest {
    fn place(&self) -> [&str; 4] {
        [self.tenant.organization(), self.tenant.environment().as_str(), &self.call, &self.key]
    }

    /// Adds the condition that picks its row.
    fn pick<'s>(&self, sql: &'s mut Sql) -> &'s mut Sql {
        let [organization, environment, call, key] = self.place();
        sql.text(" WHERE organization = ").value(organization).text(" AND environment = ").value(environment);
        sql.text(" AND call = ").value(call).text(" AND idempotency_key = ").value(key)
    }
}

impl Store {
    /// What is known of a request.
    pub async fn remembered(&self, request: &NamedRequest) -> Result<Remembered, Error> {
        let mut sql = Sql::new("SELECT fingerprint, answer, master_key_id FROM idempotency_keys");
        request.pick(&mut sql).text(" AND expires_at_ms > ").value(clock::now().millis());
        let row = self.0.read.query_one_raw(sql.build(self.0.read.get_database_backend())).await?;
        let Some(row) = row else { return Ok(Remembered::Nothing) };
        let (fingerprint, answer, master_key_id): (String, Option<String>, Option<String>) =
            row.try_get_many_by_index()?;
        if fingerprint != request.fingerprint {
            return Ok(Remembered::OtherBody);
        }
        let Some((answer, master_key_id)) = answer.zip(master_key_id) else { return Ok(Remembered::AtWork) };
        Ok(Remembered::Answer(self.open_answer(request, &answer, &master_key_id)?))
    }

    /// Takes a request on for `length` at most; none when another has done so, or has done it.
    pub async fn claim_request(&self, request: Arc<NamedRequest>, length: Duration) -> Result<Option<Claim>, Error> {
        let (id, now) = (clock::new_id("run"), clock::now());
        let mut sql = Sql::new(
            "INSERT INTO idempotency_keys \
             (organization, environment, call, idempotency_key, fingerprint, claim, expires_at_ms) VALUES ",
        );
        let [organization, environment, call, key] = request.place();
        sql.row([
            organization.into(),
            environment.into(),
            call.into(),
            key.into(),
            request.fingerprint.as_str().into(),
            id.as_str().into(),
            now.after(length).millis().into(),
        ]);
        sql.text(
            " ON CONFLICT (organization, environment, call, idempotency_key) DO UPDATE SET \
             fingerprint = excluded.fingerprint, claim = excluded.claim, answer = NULL, master_key_id = NULL, \
             expires_at_ms = excluded.expires_at_ms WHERE idempotency_keys.expires_at_ms <= ",
        );
        sql.value(now.millis());
        let _turn = self.0.lanes.turn_to_change(request.tenant.shared_organization()).await?;
        Ok((self.change_keys(sql).await? > 0).then_some(Claim { request, id }))
    }

    /// Puts the answer where the claim was; false when the claim had run out and another took it.
    pub async fn answer_claim(&self, claim: &Claim, answer: &[u8]) -> Result<bool, Error> {
        let (answer, master_key_id) = self.seal_answer(&claim.request, answer)?;
        let mut sql = Sql::new("UPDATE idempotency_keys SET claim = NULL, answer = ");
        sql.value(answer).text(", master_key_id = ").value(master_key_id);
        sql.text(", expires_at_ms = ").value(clock::now().after(KEEP).millis());
        claim.request.pick(&mut sql).text(" AND claim = ").value(claim.id.as_str());
        Ok(self.change_keys(sql).await? > 0)
    }

    /// Gives a claim back, because nothing was done.
    pub async fn release_claim(&self, claim: &Claim) -> Result<(), Error> {
        let mut sql = Sql::new("DELETE FROM idempotency_keys");
        claim.request.pick(&mut sql).text(" AND claim = ").value(claim.id.as_str());
        self.change_keys(sql).await.map(drop)
    }

    /// Gives back what this node claimed before it was started again. Only on SQLite, where no other node can have claimed
    /// anything; on PostgreSQL the claims of dead nodes run out.
    pub async fn release_claims_at_start(&self) -> Result<(), Error> {
        if self.sqlite() {
            self.change_keys(Sql::new("DELETE FROM idempotency_keys WHERE claim IS NOT NULL")).await?;
        }
        Ok(())
    }

    /// Keeps answers in the transaction that does the work. Fails with [`Error::Repeated`], and the work is not to be
    /// done, when one of the requests was done by another in between.
    pub(super) async fn keep_answers(
        &self,
        transaction: &DatabaseTransaction,
        answers: Vec<Kept<'_>>,
    ) -> Result<(), Error> {
        let script = self.keep(Script::default(), transaction.get_database_backend(), answers)?;
        match script.run(transaction).await? {
            Outcome::Done => Ok(()),
            Outcome::Missed(_) => Err(Error::Repeated),
        }
    }

    /// Adds to a script what [`Store::keep_answers`] does; the script finds out whether one was done in between.
    pub(super) fn keep(&self, script: Script, backend: DbBackend, mut answers: Vec<Kept<'_>>) -> Result<Script, Error> {
        if answers.is_empty() {
            return Ok(script);
        }
        // In one order on all nodes: two that wait for each other's rows would wait for ever.
        answers.sort_by(|one, other| one.request.place().cmp(&other.request.place()));
        if answers.windows(2).any(|pair| pair[0].request.place() == pair[1].request.place()) {
            return Err(Error::Repeated);
        }
        let mut rows = Rows::new(backend, COLUMNS);
        let expires_at_ms = clock::now().after(KEEP).millis();
        for Kept { request, answer } in &answers {
            let [organization, environment, call, key] = request.place();
            let (answer, master_key_id) = self.seal_answer(request, answer)?;
            rows.push([
                organization.into(),
                environment.into(),
                call.into(),
                key.into(),
                (&request.fingerprint).into(),
                (&answer).into(),
                (&master_key_id).into(),
                expires_at_ms.into(),
            ]);
        }
        let insert = INSERT.replace("{keep}", &KEEP.as_millis().to_string());
        Ok(script.with_each(insert, rows, Expected::Name))
    }

    /// Which of these were done already, or stand in front of themselves here.
    pub(super) async fn repeated<'a>(&self, answers: impl Iterator<Item = Kept<'a>>) -> Result<Vec<bool>, Error> {
        let requests: Vec<&NamedRequest> = answers.map(|kept| kept.request).collect();
        let mut sql = Sql::new(
            "SELECT organization, environment, call, idempotency_key FROM idempotency_keys WHERE expires_at_ms > ",
        );
        sql.value(clock::now().millis());
        sql.text(" AND (organization, environment, call, idempotency_key) IN (VALUES ");
        for (index, request) in requests.iter().enumerate() {
            sql.text(if index > 0 { "," } else { "" });
            sql.row(request.place().map(Into::into));
        }
        sql.text(")");
        let reader = &self.0.engine_read;
        let statement = sql.build(reader.get_database_backend());
        let rows = self.looked_up(async { Ok(reader.query_all_raw(statement).await?) }).await?;
        let mut done = HashSet::new();
        for row in rows {
            let place: (String, String, String, String) = row.try_get_many_by_index()?;
            done.insert(<[String; 4]>::from(place));
        }
        Ok(requests.iter().map(|request| !done.insert(request.place().map(str::to_owned))).collect())
    }

    /// An answer as it is stored: some carry a secret.
    fn seal_answer(&self, request: &NamedRequest, answer: &[u8]) -> Result<(String, String), Error> {
        if answer.len() > MAX_ANSWER_BYTES {
            return Err(Error::TooLong("answer to keep"));
        }
        let sealed = self.vault()?.seal(Purpose::Answer, &request.place(), answer);
        Ok((STANDARD.encode(sealed.bytes), sealed.master_key_id))
    }

    /// What [`Store::seal_answer`] sealed.
    fn open_answer(&self, request: &NamedRequest, stored: &str, master_key_id: &str) -> Result<Vec<u8>, Error> {
        let sealed = STANDARD.decode(stored).map_err(|_| OpenError::Damaged)?;
        Ok(self.vault()?.open(Purpose::Answer, &request.place(), master_key_id, &sealed)?.to_vec())
    }

    async fn change_keys(&self, sql: Sql) -> Result<u64, Error> {
        self.looked_up(self.run(sql)).await
    }
}
