//! What is published together and stored in parts (see [`super::parts`]) is kept before, in pieces: all at once, half a
//! megabyte would be a long commit too. A row of `publish_drafts` stands for it from the first piece on, and says until when
//! the next one is to come; the commit of the last piece removes that row, and with that, all parts are accepted. What is one
//! piece only is accepted at once. Where the row's lease runs out before, whoever finds it discards what is kept: its caller
//! was promised nothing. Each piece needs the row, so none comes after that.

use std::ops::Range;

use sea_orm::{ConnectionTrait, DbBackend};

use super::{
    Draft, DraftEvent, Published,
    parts::{Done, PART, data},
};
use crate::{
    clock,
    store::{
        Error, Store,
        rows::{Column, Rows, int, text},
        sql::Sql,
        writer::BYTES_PER_ITEM,
    },
};

/// So many publishes that were given up are discarded at a time.
const MAX_DISCARDED: usize = 64;

const DRAFTS: &[Column] = &[text("id"), text("node"), int("lease_expires_at_ms")];
pub(in crate::store) const INSERT_DRAFTS: &str = "INSERT INTO publish_drafts (id, node, lease_expires_at_ms) \
    SELECT id, node, lease_expires_at_ms FROM {rows}";
/// Each only if it is this node's.
pub(in crate::store) const RENEW_DRAFTS: &str = "UPDATE publish_drafts \
    SET lease_expires_at_ms = rows.lease_expires_at_ms FROM {rows} \
    WHERE publish_drafts.id = rows.id AND publish_drafts.node = rows.node";
/// Each only if it is this node's.
pub(in crate::store) const REMOVE_DRAFTS: &str =
    "DELETE FROM publish_drafts WHERE (id, node) IN (SELECT id, node FROM {rows})";

const PARTS: &[Column] = &[text("id"), text("node"), int("lease_expires_at_ms"), text("content")];
pub(in crate::store) const INSERT_PARTS: &str = "INSERT INTO publish_parts (id, node, lease_expires_at_ms, content) \
    SELECT id, node, lease_expires_at_ms, content FROM {rows}";

/// What is to be kept, and how far it is.
pub(super) struct Whole {
    /// The ids of its parts begin with it.
    id: String,
    published: Vec<Published>,
    /// Events that are stored as it is accepted.
    events: Vec<DraftEvent>,
    parts: Vec<Draft>,
    /// The parts that are kept next.
    piece: Range<usize>,
}

/// The rows that keep a piece each.
pub(in crate::store) struct Pieces {
    /// For [`INSERT_DRAFTS`]: first pieces.
    pub(in crate::store) begun: Rows,
    /// For [`RENEW_DRAFTS`]: those in between.
    pub(in crate::store) renewed: Rows,
    /// For [`REMOVE_DRAFTS`]: last pieces.
    pub(in crate::store) accepted: Rows,
    /// For [`INSERT_PARTS`]: all.
    pub(in crate::store) parts: Rows,
}

impl Whole {
    pub(super) fn new(id: String, published: Vec<Published>, events: Vec<DraftEvent>, parts: Vec<Draft>) -> Self {
        let mut whole = Self { id, published, events, parts, piece: 0..0 };
        whole.go_on();
        whole
    }

    /// The next piece is as much to write as a part.
    fn go_on(&mut self) {
        let (start, mut bytes) = (self.piece.end, 0);
        let full = self.parts[start..].iter().enumerate().position(|(index, part)| {
            bytes += data(&part.events);
            index + 1 + bytes / BYTES_PER_ITEM >= PART
        });
        self.piece = start..full.map_or(self.parts.len(), |last| start + last + 1);
    }

    fn piece(&self) -> &[Draft] {
        &self.parts[self.piece.clone()]
    }

    fn is_first(&self) -> bool {
        self.piece.start == 0
    }

    fn is_last(&self) -> bool {
        self.piece.end == self.parts.len()
    }

    /// What is stored as events with this piece.
    pub(super) fn events(&self) -> &[DraftEvent] {
        if self.is_last() { &self.events } else { &[] }
    }

    pub(super) fn published(&self) -> &[Published] {
        &self.published
    }

    /// How much this piece is to write: little for each part, and its data.
    pub(super) fn weight(&self) -> usize {
        let bytes: usize = self.piece().iter().map(|part| data(&part.events)).sum();
        self.piece.len() + self.events().len() + (bytes + data(self.events())) / BYTES_PER_ITEM
    }
}

impl Draft {
    /// Whether it is kept first, in pieces.
    pub(in crate::store) fn is_whole(&self) -> bool {
        self.whole.is_some()
    }

    /// Whether it is accepted with what it writes now.
    pub(super) fn is_accepted_now(&self) -> bool {
        self.whole.as_ref().is_none_or(Whole::is_last)
    }

    /// It, or all of its parts.
    pub(super) fn parts(&self) -> &[Self] {
        self.whole.as_ref().map_or(std::slice::from_ref(self), |whole| &whole.parts)
    }

    /// What comes after a piece: the next one, or, now that all is accepted, the parts.
    pub(in crate::store) fn after_piece(mut self, done: Done) -> Vec<(Self, Done)> {
        match (self.whole.take(), done) {
            (Some(whole), Done::Caller(answer)) if whole.is_last() => {
                Self::accepted(whole.parts, whole.published, self.room, answer).collect()
            }
            (Some(mut whole), done) => {
                whole.go_on();
                self.whole = Some(whole);
                vec![(self, done)]
            }
            (None, _) => Vec::new(),
        }
    }
}

impl Pieces {
    pub(in crate::store) fn of<'a>(
        backend: DbBackend,
        node: &str,
        drafts: impl Iterator<Item = &'a Draft>,
    ) -> Result<Self, Error> {
        let [mut begun, mut renewed, mut accepted] = [(); 3].map(|()| Rows::new(backend, DRAFTS));
        let mut parts = Rows::new(backend, PARTS);
        for (draft, whole) in drafts.filter_map(|draft| Some((draft, draft.whole.as_ref()?))) {
            let leased_until = draft.leased_until.millis();
            let rows = match (whole.is_first(), whole.is_last()) {
                (true, true) => None,
                (true, false) => Some(&mut begun),
                (false, false) => Some(&mut renewed),
                (false, true) => Some(&mut accepted),
            };
            if let Some(rows) = rows {
                rows.push([(&whole.id).into(), node.into(), leased_until.into()]);
            }
            for part in whole.piece() {
                let (id, content) = (part.part.as_deref().unwrap_or_default(), part.content()?);
                parts.push([id.into(), node.into(), leased_until.into(), content.as_str().into()]);
            }
        }
        Ok(Self { begun, renewed, accepted, parts })
    }
}

impl Store {
    /// Discards what was not accepted before its lease ran out, or whatever its lease when `all`.
    pub(super) async fn discard_drafts(&self, all: bool) -> Result<(), Error> {
        let until = if all { i64::MAX } else { clock::now().millis() };
        loop {
            let (reader, writer) = (&self.0.engine_read, &self.0.engine_write);
            let backend = reader.get_database_backend();
            let mut sql = Sql::new("SELECT id FROM publish_drafts WHERE lease_expires_at_ms <= ");
            sql.value(until).text(&format!(" LIMIT {MAX_DISCARDED}"));
            let found = self.heard(async { Ok(reader.query_all_raw(sql.build(backend)).await?) }).await?;
            for row in &found {
                let id: String = row.try_get_by_index(0)?;
                let discard = async {
                    let transaction = self.write_by(writer).await?;
                    // Its next piece may have come meanwhile, or comes after this and finds nothing.
                    let mut draft = Sql::new("DELETE FROM publish_drafts WHERE id = ");
                    draft.value(id.as_str()).text(" AND lease_expires_at_ms <= ").value(until);
                    if transaction.execute_raw(draft.build(backend)).await?.rows_affected() == 1 {
                        let mut parts = Sql::new("DELETE FROM publish_parts WHERE substr(id, 1, length(");
                        parts.value(id.as_str()).text(")) = ").value(id.as_str());
                        transaction.execute_raw(parts.build(backend)).await?;
                    }
                    Ok(transaction.commit().await?)
                };
                self.heard(discard).await?;
            }
            if found.len() < MAX_DISCARDED {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::store::{
        publish::parts::tests::{LEASE, count, draft},
        writer::Write,
    };

    fn done() -> Done {
        Done::Caller(oneshot::channel().0)
    }

    /// The rows that are kept now: how far it is, whether it is accepted, and the parts.
    fn piece(draft: &Draft) -> ([usize; 3], Vec<String>) {
        let rows = Pieces::of(DbBackend::Sqlite, "n", std::iter::once(draft)).unwrap();
        let parts = draft.whole.as_ref().unwrap().piece().iter().map(|part| part.part.clone().unwrap());
        ([&rows.begun, &rows.renewed, &rows.accepted].map(Rows::len), parts.collect())
    }

    #[tokio::test]
    async fn pieces_are_small_and_the_last_one_accepts() {
        let (_directory, store) = Store::fresh().await;
        for (events, most) in [(100, 1), (1_000, 4)] {
            let mut draft = draft(&store, &vec![(1, 500); events], true);
            let all: Vec<_> = draft.parts().iter().map(|part| part.part.clone().unwrap()).collect();
            let (mut kept, mut pieces) = (Vec::new(), 0);
            let parts = loop {
                let (rows, parts) = piece(&draft);
                let last = kept.len() + parts.len() == all.len();
                assert_eq!(
                    rows,
                    match (pieces, last) {
                        (0, true) => [0, 0, 0],
                        (0, false) => [1, 0, 0],
                        (_, false) => [0, 1, 0],
                        (_, true) => [0, 0, 1],
                    }
                );
                assert!(!parts.is_empty() && draft.weight() <= 2 * PART, "{}", draft.weight());
                assert_eq!(draft.is_accepted_now(), last);
                kept.extend(parts);
                pieces += 1;
                let mut next = draft.after_piece(done());
                if last {
                    break next;
                }
                draft = next.remove(0).0;
            };
            assert_eq!(kept, all);
            assert_eq!(parts.len(), all.len());
            assert!(pieces >= most, "{pieces}");
        }
    }

    /// Of a publish of several pieces, as a node would that ends then.
    async fn keep(store: &Store, pieces: usize) -> Draft {
        let mut draft = draft(store, &[(1, 500); 1_000], true);
        for number in 0..pieces {
            if number > 0 {
                draft = draft.after_piece(done()).remove(0).0;
            }
            let rows = Pieces::of(DbBackend::Sqlite, &store.0.node, std::iter::once(&draft)).unwrap();
            let script = crate::store::script::Script::default()
                .with(INSERT_DRAFTS, rows.begun)
                .with(RENEW_DRAFTS, rows.renewed)
                .with(INSERT_PARTS, rows.parts);
            store.0.commits.run(script).await.unwrap();
        }
        draft
    }

    async fn left(store: &Store) -> [i64; 4] {
        let mut left = [0; 4];
        for (left, table) in left.iter_mut().zip(["publish_drafts", "publish_parts", "events", "deliveries"]) {
            *left = count(store, table).await;
        }
        left
    }

    #[tokio::test]
    async fn what_was_not_accepted_is_discarded_at_the_next_start() {
        let (_directory, store) = Store::fresh().await;
        keep(&store, 2).await;
        let [drafts, parts, ..] = left(&store).await;
        assert!(drafts == 1 && parts > 1);
        assert_eq!(store.store_kept_parts(LEASE.length, || true).await.unwrap(), 0);
        assert_eq!(left(&store).await, [1, parts, 0, 0], "its lease holds");
        store.store_kept_parts_at_start(LEASE.length).await.unwrap();
        assert_eq!(left(&store).await, [0; 4]);
    }

    /// Neither is a part of it taken over, nor does what comes too late leave anything behind.
    #[tokio::test]
    async fn what_comes_too_late_is_refused() {
        let (_directory, store) = Store::fresh().await;
        for pieces in [2, 10] {
            let draft = keep(&store, pieces).await;
            let (next, _) = draft.after_piece(done()).remove(0);
            assert_eq!((next.is_whole(), next.is_accepted_now()), (true, pieces == 10), "the last piece as well");
            let sql = "UPDATE publish_parts SET lease_expires_at_ms = 1";
            store.0.write.execute_unprepared(sql).await.unwrap();
            assert_eq!(store.store_kept_parts(LEASE.length, || true).await.unwrap(), 0, "it is not accepted");
            let sql = "UPDATE publish_drafts SET lease_expires_at_ms = 1";
            store.0.write.execute_unprepared(sql).await.unwrap();
            assert_eq!(store.store_kept_parts(LEASE.length, || true).await.unwrap(), 0);
            assert_eq!(left(&store).await, [0; 4]);
            let (answer, answered) = oneshot::channel();
            store.writer().unwrap().send(Write::Draft(Box::new(next), Done::Caller(answer))).unwrap();
            assert!(matches!(answered.await.unwrap(), Err(Error::TakenOver)));
            assert_eq!(left(&store).await, [0; 4]);
        }
    }
}
