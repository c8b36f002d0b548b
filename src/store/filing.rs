//! Which rows of the log of changes are whose, on SQLite: they are entered by tenant many at a time, behind the commits. Entered
//! with each commit, they would change a page for each tenant in it, and SQLite writes each page whole that a commit changes.
//! A reader takes what is filed, and goes through the rest of the log for what is not. What has been filed is written down
//! together with it: whatever a crash leaves is filed with what comes next.
//!
//! A run of rows is filed tenant by tenant, some rows in a step. So a page is changed once for all rows of the run, and a step
//! takes little longer when the tenants are many; those that are done begin with the rest behind the run, the others with
//! the run.
//!
//! PostgreSQL has an index instead: with a commit it writes the entry alone.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::Duration,
};

use super::{Store, parameter::Parameter, sql::Sql};
use crate::{clock::Seldom, webhook::Tenant};

/// A run has so many rows, and begins as soon as there are as many. What is not filed, which each reader of a tenant's log goes
/// through, is two of them and a commit at most: during a run, each step files more than has come since the last.
const RUN: i64 = 2_048;
/// A step files so many rows, and the others of the last tenant among them. Publishes wait for it, for two or three
/// milliseconds, and longer where entries are long.
const STEP: i64 = 256;
/// That it fails is said once in this time.
static FAILED: Seldom = Seldom::new(Duration::from_secs(1));

/// Not beyond the newest row: what comes later is not filed yet.
const BEGIN_RUN: &str = "UPDATE changes_filed SET run_end = min(changes_filed.seq + ?, newest.seq) \
    FROM (SELECT max(seq) AS seq FROM changes) AS newest \
    WHERE changes_filed.run_end = changes_filed.seq AND newest.seq > changes_filed.seq";
const CHOOSE_TENANTS: &str = "UPDATE changes_filed AS filed SET (next_organization, next_environment) = ( \
    SELECT organization, environment FROM changes WHERE seq > filed.seq AND seq <= filed.run_end \
    AND (organization, environment) > (filed.organization, filed.environment) \
    ORDER BY organization, environment LIMIT 1 OFFSET ? - 1)";
/// In order, so that each page is changed once.
const FILE: &str = "INSERT INTO changes_of_tenants (organization, environment, seq) \
    SELECT changes.organization, changes.environment, changes.seq FROM changes_filed AS filed \
    CROSS JOIN changes ON changes.seq > filed.seq AND changes.seq <= filed.run_end \
    WHERE (changes.organization, changes.environment) > (filed.organization, filed.environment) \
    AND (next_organization IS NULL \
    OR (changes.organization, changes.environment) <= (next_organization, next_environment)) \
    ORDER BY changes.organization, changes.environment, changes.seq";
const GO_ON: &str = "UPDATE changes_filed SET seq = CASE WHEN next_organization IS NULL THEN run_end ELSE seq END, \
    organization = COALESCE(next_organization, ''), environment = COALESCE(next_environment, '')";
/// Numbers have gaps only where old rows were removed.
const LEFT: &str = "SELECT max(COALESCE((SELECT max(seq) FROM changes), 0) - seq, 0) FROM changes_filed";

/// Removes what is filed of rows that a condition names, after which there is a parenthesis to close.
pub(super) const REMOVE: &str = "DELETE FROM changes_of_tenants WHERE (organization, environment, seq) IN \
    (SELECT organization, environment, seq";

/// What the writer knows of rows that are not filed.
pub(super) struct Filing {
    /// How many there are. It looks with each step, so that those few count that others write: retries by hand, and what is
    /// taken over.
    left: AtomicI64,
    /// How many have come since it last asked.
    added: AtomicI64,
}

/// A step of filing.
pub(super) struct Step {
    run: i64,
    rows: i64,
}

impl Default for Filing {
    /// Nobody knows before the first step.
    fn default() -> Self {
        Self { left: AtomicI64::new(RUN), added: AtomicI64::new(0) }
    }
}

impl Filing {
    /// Rows were added to the log.
    pub(super) fn logged(&self, rows: usize) {
        self.added.fetch_add(i64::try_from(rows).unwrap_or(RUN), Ordering::Relaxed);
    }

    /// The step that is due, if one is. While a run goes on, no row of it counts as filed.
    fn due(&self) -> Option<Step> {
        let added = self.added.swap(0, Ordering::Relaxed);
        let left = self.left.fetch_add(added, Ordering::Relaxed) + added;
        (left >= RUN).then(|| Step { run: RUN, rows: STEP.max(added + added / 4) })
    }
}

impl Step {
    /// A transaction, and behind it a look at what is left.
    pub(super) fn on_sqlite(self) -> (String, Vec<Parameter>) {
        let text = format!("BEGIN IMMEDIATE;{BEGIN_RUN};{CHOOSE_TENANTS};{FILE};{GO_ON};COMMIT;{LEFT}");
        (text, vec![Parameter::Int(self.run), Parameter::Int(self.rows)])
    }
}

impl Store {
    /// Makes a step when one is due, behind a commit, and answers with how many rows it had; none when there was none.
    pub(super) async fn file_changes(&self) -> i64 {
        if !self.sqlite() {
            return 0;
        }
        let Some(step) = self.0.filing.due() else { return 0 };
        let rows = step.rows;
        match self.0.commits.file(step).await {
            Ok(left) => {
                self.0.filing.left.store(left, Ordering::Relaxed);
                rows
            }
            Err(error) => {
                // Not behind each commit, which waits for it: as soon as another run has come.
                self.0.filing.left.store(0, Ordering::Relaxed);
                if let Some(count) = FAILED.reasons() {
                    tracing::warn!(%error, count, "the log of changes is not filed by tenant; trying again later");
                }
                0
            }
        }
    }

    /// Makes as many steps as are due: at the start, when nobody waits for one, since what was taken over then may be much.
    pub(super) async fn file_changes_at_start(&self) {
        while self.file_changes().await > 0 {}
    }
}

/// Adds a query for the numbers of a tenant's rows from one on, and the lengths of their entries. Of the rows that are not filed
/// it reads what stands before those.
pub(super) fn lengths(sql: &mut Sql, tenant: &Tenant, from: i64) {
    let (organization, environment) = (tenant.organization(), tenant.environment().as_str());
    sql.text(
        "SELECT filed.seq AS seq, octet_length(changes.entries) AS bytes FROM changes_of_tenants AS filed \
         CROSS JOIN changes ON changes.seq = filed.seq WHERE filed.organization = ",
    );
    sql.value(organization).text(" AND filed.environment = ").value(environment);
    sql.text(" AND filed.seq >= ").value(from);
    // One bound: with two, SQLite might go through the log from the wrong one on.
    sql.text(" UNION ALL SELECT seq, octet_length(entries) FROM changes WHERE seq > max(").value(from - 1);
    sql.text(", (SELECT CASE WHEN ").row([organization.into(), environment.into()]);
    sql.text(" <= (organization, environment) THEN run_end ELSE seq END FROM changes_filed)) AND organization = ");
    sql.value(organization).text(" AND environment = ").value(environment);
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use sea_orm::{ConnectionTrait, DbBackend};

    use super::*;
    use crate::{
        store::{ChangeFilter, Lease, NewEvent, log},
        webhook::{Environment, EventData},
    };

    const TENANTS: [(&str, Environment); 3] =
        [("acme", Environment::Live), ("acme", Environment::Test), ("other", Environment::Test)];

    fn tenant(index: usize) -> Tenant {
        let (organization, environment) = TENANTS[index];
        Tenant::new(organization, environment).unwrap()
    }

    /// Whose row it is; of the last ones of seven the first tenant has more than the others.
    fn whose(seq: i64) -> usize {
        [0, 1, 1, 2, 0, 0, 0][(seq % 7) as usize]
    }

    /// Adds rows up to a number to the log, which the tenants have in turns, from so many milliseconds after the beginning.
    async fn log_until(store: &Store, upto: i64, at: i64) {
        let cases: String = (0..7)
            .map(|rest| {
                let (organization, environment) = TENANTS[whose(rest)];
                format!("({rest},'{organization}','{}'),", environment.as_str())
            })
            .collect();
        let entry = r#"{"k":"attempted","w":"whk_1","d":"del_1","e":"content.ready","s":"failed","n":1,"t":0}"#;
        let text = format!(
            "INSERT INTO changes (seq, organization, environment, entries, occurred_at_ms) \
             WITH RECURSIVE n (i) AS (SELECT 1 + COALESCE((SELECT max(seq) FROM changes), 0) \
             UNION ALL SELECT i + 1 FROM n WHERE i < {upto}), \
             whose (rest, organization, environment) AS (VALUES {}) \
             SELECT i, organization, environment, '[{entry}]', {at} FROM n JOIN whose ON rest = i % 7 ORDER BY i",
            cases.trim_end_matches(',')
        );
        store.0.write.execute_unprepared(&text).await.unwrap();
    }

    /// Makes a step, of two tenants or more of a run of seven rows for each; how many rows are left.
    async fn file(store: &Store, run: i64) -> i64 {
        store.0.commits.file(Step { run, rows: run / 2 + 1 }).await.unwrap()
    }

    async fn number(store: &Store, sql: &str) -> i64 {
        let row = store.0.write.query_one_raw(Sql::new(sql).build(DbBackend::Sqlite)).await.unwrap().unwrap();
        row.try_get_by_index(0).unwrap()
    }

    /// The rows of a tenant after one, in as many reads as it takes.
    async fn rows_after(store: &Store, tenant: &Tenant, row: i64) -> Vec<i64> {
        let (mut after, mut found) = (log::end(row), Vec::new());
        loop {
            let (_, rows) = store.read_log(tenant, after).await.unwrap();
            let Some(last) = rows.last() else { return found };
            assert!(rows.iter().all(|row| row.organization == tenant.organization()));
            after = log::end(last.seq);
            found.extend(rows.iter().map(|row| row.seq));
        }
    }

    #[tokio::test]
    async fn what_is_filed_and_what_is_not_is_read_as_one() {
        let (_directory, store) = Store::fresh().await;
        log_until(&store, 400, 0).await;
        let mut left = vec![400];
        while left.last() != Some(&0) {
            for index in 0..TENANTS.len() {
                for after in [0, 1, 90, 91, 92, 180, 265, 399, 400] {
                    let expected: Vec<i64> = (after + 1..=400).filter(|seq| whose(*seq) == index).collect();
                    assert_eq!(rows_after(&store, &tenant(index), after).await, expected, "{index} {after} {left:?}");
                }
            }
            left.push(file(&store, 91).await);
        }
        assert_eq!(left, [400, 400, 309, 309, 218, 218, 127, 127, 36, 0], "two steps for each run of 91");
        assert_eq!(number(&store, "SELECT count(*) FROM changes_of_tenants").await, 400);
        assert_eq!(file(&store, 91).await, 0, "nothing is filed twice");
    }

    #[tokio::test]
    async fn a_stream_misses_nothing_that_is_filed_while_it_reads() {
        let (_directory, store) = Store::fresh().await;
        store.0.feed.begin(0);
        log_until(&store, 700, 0).await;
        file(&store, 100).await;
        let filter = |index| ChangeFilter { tenant: tenant(index), webhook_id: None, status: None, event_type: None };
        let mut streams = Vec::new();
        for index in 0..TENANTS.len() {
            streams.push(store.watch(filter(index), Some(0)).await.unwrap());
        }
        for seq in 1..=1_400 {
            let seen = streams[whose(seq)].next().await.unwrap();
            assert_eq!(log::row(seen.seq), seq);
            if seq % 20 == 0 {
                file(&store, 50).await;
            }
            if seq == 350 {
                log_until(&store, 1_400, 0).await;
            }
        }
        assert_eq!(file(&store, 50).await, 0);
    }

    /// What old rows leave: nothing of what was filed, and no gap that anything is filed beyond.
    #[tokio::test]
    async fn what_is_removed_is_not_filed_any_more() {
        let (_directory, store) = Store::fresh().await;
        log_until(&store, 300, 0).await;
        file(&store, 200).await;
        let new = crate::clock::now().millis();
        log_until(&store, 350, new).await;
        store.purge().await.unwrap();
        assert_eq!(number(&store, "SELECT min(seq) FROM changes").await, 301);
        assert_eq!(number(&store, "SELECT count(*) FROM changes_of_tenants").await, 0);
        loop {
            for index in 0..TENANTS.len() {
                let expected: Vec<i64> = (301..=350).filter(|seq| whose(*seq) == index).collect();
                assert_eq!(rows_after(&store, &tenant(index), 300).await, expected);
            }
            if file(&store, 120).await == 0 {
                break;
            }
        }
        assert_eq!(number(&store, "SELECT count(*) FROM changes_of_tenants").await, 50);
        // The newest one stays, and what comes after it is not filed yet.
        store.0.write.execute_unprepared("UPDATE changes SET occurred_at_ms = 0").await.unwrap();
        store.purge().await.unwrap();
        assert_eq!(number(&store, "SELECT group_concat(seq) = '350' FROM changes_of_tenants").await, 1);
        log_until(&store, 351, new).await;
        assert_eq!(rows_after(&store, &tenant(whose(351)), 300).await.last(), Some(&351));
        while file(&store, 120).await > 0 {}
        assert_eq!(number(&store, "SELECT count(*) FROM changes_of_tenants").await, 2);
    }

    /// Commits wait for these: none goes through the log or through what is filed.
    #[tokio::test]
    async fn sqlite_finds_by_key_what_it_files_and_removes() {
        const RANGE: &str = "SEARCH changes USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)";
        const KEY: &str = "SEARCH changes_of_tenants USING PRIMARY KEY (organization=? AND environment=? AND seq=?)";
        let (_directory, store) = Store::fresh().await;
        let remove = format!("{REMOVE} FROM changes WHERE seq >= 1 AND seq <= 256 AND occurred_at_ms < 1)");
        for (sql, expected) in [
            (BEGIN_RUN, vec!["SEARCH changes"]),
            (CHOOSE_TENANTS, vec![RANGE]),
            (FILE, vec![RANGE]),
            (GO_ON, vec![]),
            (LEFT, vec!["SEARCH changes"]),
            (&*remove, vec![KEY, RANGE]),
        ] {
            let plan = store.plan(Sql::new(sql).build(DbBackend::Sqlite)).await;
            assert!(!plan.iter().any(|step| step.starts_with("SCAN changes") && !step.contains("filed")), "{plan:?}");
            assert!(expected.iter().all(|step| plan.iter().any(|found| found == step)), "{sql}: {plan:?}");
        }
    }

    /// The writer files by what it wrote, no more often, and as much as comes.
    #[tokio::test]
    async fn the_writer_files_when_there_is_enough() {
        let (_directory, store) = Store::fresh().await;
        for insert in [
            "INSERT INTO webhooks (id, organization, environment, url, events, status, secret, created_at_ms) \
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 512) \
             SELECT 'whk_' || i, 'org-' || i, 'live', 'https://example.com/', '[]', 'active', '', 1 FROM n",
            "INSERT INTO subscriptions (organization, environment, event_type, webhook_id) \
             SELECT organization, environment, 'content.ready', id FROM webhooks",
        ] {
            store.0.write.execute_unprepared(insert).await.unwrap();
        }
        let publish = async |number: i64| {
            let tenant = Tenant::new(&format!("org-{number}"), Environment::Live).unwrap();
            let event = NewEvent { event_type: "content.ready".to_owned(), data: EventData::parse("{}").unwrap() };
            let lease = Lease { length: Duration::from_secs(60), first_wait: Duration::ZERO };
            store.publish(tenant, vec![event], lease, None).await.unwrap();
        };
        let left = async || number(&store, "SELECT (SELECT max(seq) FROM changes) - seq FROM changes_filed").await;
        // What was left from before is looked for behind the first commit; each of the tenants is a step, and then it ends.
        log_until(&store, RUN + 100, 0).await;
        for _ in 0..=TENANTS.len() {
            publish(1).await;
        }
        // A caller is answered before a step: what comes next is behind it.
        publish(1).await;
        assert_eq!(left().await, 105);
        // As many rows as publishes: each is of another tenant than the others of its commit.
        for count in [512, 512, 512, RUN - 1 - 105 - 3 * 512] {
            join_all((1..=count).map(publish)).await;
        }
        assert_eq!((left().await, store.0.filing.left.load(Ordering::Relaxed)), (RUN - 1, RUN - 1));
        // Row 2,048 begins a run, which takes a few steps.
        let run_end = async || number(&store, "SELECT run_end - seq FROM changes_filed").await;
        assert_eq!(run_end().await, 0);
        publish(1).await;
        publish(1).await;
        assert_eq!((left().await, run_end().await), (RUN + 1, RUN));
        for _ in 0..RUN / STEP {
            publish(1).await;
        }
        assert_eq!((run_end().await, left().await), (0, 1 + RUN / STEP));
    }

    /// A step files more rows than come, so that what is left does not grow, but shrinks.
    #[test]
    fn a_step_is_larger_than_what_came() {
        let filing = Filing::default();
        assert_eq!(filing.due().map(|step| step.rows), Some(STEP), "nobody knows what there is");
        filing.left.store(0, Ordering::Relaxed);
        filing.logged(RUN as usize - 1);
        assert!(filing.due().is_none());
        filing.logged(800);
        filing.logged(400);
        assert_eq!(filing.due().map(|step| step.rows), Some(1_500));
        assert_eq!(filing.due().map(|step| step.rows), Some(STEP));
    }

    #[tokio::test]
    async fn what_cannot_be_filed_is_filed_later() {
        let (_directory, store) = Store::fresh().await;
        log_until(&store, 10, 0).await;
        // What is acknowledged waits for the disk, whatever became of a step.
        let full = async || assert_eq!(number(&store, "SELECT synchronous FROM pragma_synchronous").await, 2);
        let rename = async |sql: &str| store.0.write.execute_unprepared(sql).await.unwrap();
        rename("ALTER TABLE changes_of_tenants RENAME TO away").await;
        store.file_changes().await;
        full().await;
        rename("ALTER TABLE away RENAME TO changes_of_tenants").await;
        assert_eq!(rows_after(&store, &tenant(0), 0).await, [4, 5, 6, 7]);
        assert_eq!(number(&store, "SELECT run_end FROM changes_filed").await, 0);
        assert_eq!(store.file_changes().await, 0, "not behind each commit");
        store.0.filing.logged(RUN as usize);
        assert_eq!(store.file_changes().await, RUN + RUN / 4);
        full().await;
        assert_eq!(store.0.filing.left.load(Ordering::Relaxed), 0);
        assert_eq!(number(&store, "SELECT count(*) FROM changes_of_tenants").await, 10);
    }
}
