//! What a scenario came to, for people and for machines.

use std::time::Duration;

use sea_orm::{ConnectionTrait, Database, DbBackend, Statement};
use serde_json::{Value, json};

use crate::{
    ledger::{Sums, Together},
    world::World,
};

/// The result of one scenario.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) sums: Sums,
    pub(crate) integrity: String,
    /// Why it did not pass; none when it did.
    pub(crate) failures: Vec<String>,
    /// What else was measured.
    pub(crate) notes: Vec<String>,
    /// Whether this machine could not play it.
    pub(crate) impossible: bool,
}

impl Report {
    /// What holds in every scenario, after everything has settled: nothing lost, nothing foreign, every signature good,
    /// and the service's own books agree with ours.
    pub(crate) async fn of(world: &World) -> Self {
        let mut report = Self { sums: world.ledger.sums(), integrity: "ok".to_owned(), ..Self::default() };
        let Sums { acknowledged, received, lost, deliveries, .. } = report.sums;
        let Together { batches, unacknowledged, stored, in_part } = report.sums.together;
        report.check(acknowledged > 0, || "nothing was acknowledged".to_owned());
        report.check(lost == 0, || format!("{lost} acknowledged events were lost"));
        report.check(in_part == 0, || format!("{in_part} of {batches} batches arrived in part"));
        if batches > 0 {
            let rest = format!("{unacknowledged} of them not acknowledged, of which {stored} were stored nevertheless");
            report.notes.push(format!("batches: {batches}, {rest}"));
        }
        report.failures.extend(report.sums.violations.clone());
        match world.stats().await {
            Err(error) => report.failures.push(format!("no statistics: {error}")),
            Ok(stats) => {
                report.check(stats.failed == 0, || format!("{} deliveries ended as failed", stats.failed));
                report.check(stats.is_settled(), || format!("deliveries are still pending: {stats:?}"));
                let agrees = stats.successful == deliveries as u64 && deliveries == received;
                if !agrees {
                    let books = format!("{stats:?}, but {deliveries} deliveries of {received} events were received");
                    report.integrity.clone_from(&books);
                    report.failures.push(books);
                }
            }
        }
        report.check_file(world).await;
        if !report.failures.is_empty() {
            let logs = world.launches.iter().enumerate();
            report
                .notes
                .extend(logs.map(|(index, launch)| format!("node {index} last logged: {}", launch.last_words())));
        }
        report
    }

    /// What parts are added to.
    #[cfg(feature = "failpoints")]
    pub(crate) fn all_fine() -> Self {
        Self { integrity: "ok".to_owned(), ..Self::default() }
    }

    /// Adds what a part came to.
    #[cfg(feature = "failpoints")]
    pub(crate) fn add(&mut self, part: &str, other: Self) {
        self.sums.add(&other.sums);
        if other.integrity != "ok" {
            self.integrity = other.integrity;
        }
        self.failures.extend(other.failures.into_iter().map(|failure| format!("{part}: {failure}")));
        self.notes.extend(other.notes.into_iter().map(|note| format!("{part}: {note}")));
    }

    /// A scenario that could not be played to its end.
    pub(crate) fn failed(error: String) -> Self {
        Self { integrity: "-".to_owned(), failures: vec![error], ..Self::default() }
    }

    /// A scenario that this machine does not let us play.
    pub(crate) fn impossible(why: String) -> Self {
        Self {
            integrity: "-".to_owned(),
            notes: vec![format!("not played: {why}")],
            impossible: true,
            ..Self::default()
        }
    }

    pub(crate) fn check(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds {
            self.failures.push(otherwise());
        }
    }

    /// Checks the file of SQLite.
    pub(crate) async fn check_file(&mut self, world: &World) {
        if let Some(fault) = sqlite_fault(&world.launches[0].database_url).await {
            self.failures.push(format!("integrity_check: {fault}"));
            self.integrity = fault;
        }
    }

    /// Checks that `what` took at most `bound`, and notes the figure.
    pub(crate) fn within(&mut self, what: &str, took: Option<Duration>, bound: Duration) {
        match took {
            Some(took) => self.notes.push(format!("{what}: {:.1} s", took.as_secs_f64())),
            None => self.notes.push(format!("{what}: never")),
        }
        self.check(took.is_some_and(|took| took <= bound), || format!("{what} took {took:?}, more than {bound:?}"));
    }

    /// Checks that no more requests came twice than there can have been.
    pub(crate) fn repeats_at_most(&mut self, bound: usize) {
        let repeated = self.sums.repeated;
        self.check(repeated <= bound, || format!("{repeated} requests were repeated, more than {bound}"));
    }

    /// The same of those of each delivery.
    #[cfg(feature = "failpoints")]
    pub(crate) fn repeats_of_each_at_most(&mut self, bound: usize) {
        let most = self.sums.most_repeated;
        self.check(most <= bound, || format!("a request was repeated {most} times, more than {bound}"));
    }

    pub(crate) fn passed(&self) -> bool {
        self.failures.is_empty()
    }

    pub(crate) fn verdict(&self) -> &'static str {
        match self {
            Self { impossible: true, .. } => "not played",
            fine if fine.passed() => "PASS",
            _ => "FAIL",
        }
    }

    pub(crate) fn header() -> String {
        format!(
            "{:22} {:>6} {:>9} {:>9} {:>9} {:>6} {:>8} {:>11}  {:10} verdict",
            "scenario", "faults", "published", "acked", "received", "lost", "repeated", "recovered", "integrity"
        )
    }

    pub(crate) fn row(&self, scenario: &str) -> String {
        let Sums { faults, published, acknowledged, received, lost, repeated, recovered, .. } = self.sums;
        let integrity = if self.integrity.len() <= 10 { &self.integrity } else { "broken" };
        let (verdict, recovered) = (self.verdict(), recovered.as_secs_f64());
        format!(
            "{scenario:22} {faults:6} {published:9} {acknowledged:9} {received:9} {lost:6} {repeated:8} {recovered:9.1} s  \
             {integrity:10} {verdict}"
        )
    }

    pub(crate) fn json(&self, scenario: &str) -> Value {
        let sums = &self.sums;
        json!({
            "scenario": scenario,
            "verdict": self.verdict(),
            "faults": sums.faults,
            "published": sums.published,
            "acknowledged": sums.acknowledged,
            "received": sums.received,
            "lost": sums.lost,
            "repeated": sums.repeated,
            "most_repeated": sums.most_repeated,
            "recovered_secs": sums.recovered.as_secs_f64(),
            "integrity": self.integrity,
            "failures": self.failures,
            "notes": self.notes,
        })
    }
}

/// What SQLite finds wrong with its file; none for PostgreSQL, which has no such check of its own.
async fn sqlite_fault(url: &str) -> Option<String> {
    let url = url.strip_suffix("?mode=rwc").filter(|url| url.starts_with("sqlite:"))?;
    let checked = async {
        let connection = Database::connect(format!("{url}?mode=ro")).await?;
        let statement = Statement::from_string(DbBackend::Sqlite, "PRAGMA integrity_check");
        let rows = connection.query_all_raw(statement).await?;
        let found = rows.iter().map(|row| row.try_get_by_index::<String>(0)).collect::<Result<Vec<_>, _>>()?;
        let _ = connection.close().await;
        Ok::<_, sea_orm::DbErr>(found.join("; "))
    };
    match checked.await {
        Ok(found) => (found != "ok").then_some(found),
        Err(error) => Some(error.to_string()),
    }
}
