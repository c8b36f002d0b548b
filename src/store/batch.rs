//! What goes into one commit of the [`super::writer`].

use std::sync::Arc;

use super::{
    leases::Release,
    publish::{Draft, Publish, Published, parts::Done},
    record::Finished,
    writes::{Answer, Write},
};
use crate::failpoint;

/// Drafts, results and leases to give back, each with where its outcome goes.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) drafts: Vec<(Draft, Done)>,
    pub(super) finished: Vec<(Arc<Finished>, Answer<bool>)>,
    pub(super) releases: Vec<(Release, Answer<()>)>,
    /// How much it is to write, in results or deliveries.
    pub(super) weight: usize,
}

/// New events, of which nobody knows yet where they go.
pub(super) type Publishes = Vec<(Box<Publish>, Answer<Vec<Published>>)>;

impl Batch {
    /// Everything in `writes` that is what it will be, and beside it what is to be drafted first.
    pub(super) fn of(writes: Vec<Write>) -> (Self, Publishes) {
        let (mut batch, mut publishes) = (Self::default(), Vec::new());
        for write in writes {
            match write {
                Write::Publish(publish, answer) => publishes.push((publish, answer)),
                Write::Draft(draft, done) => batch.drafts.push((*draft, done)),
                Write::Finish(finished, answer) => batch.finished.push((finished, answer)),
                Write::Release(release, answer) => batch.releases.push((release, answer)),
            }
        }
        (batch, publishes)
    }

    pub(super) fn len(&self) -> usize {
        self.drafts.len() + self.finished.len() + self.releases.len()
    }

    /// A step of everything that is in it.
    pub(super) fn reached(&self, step: &str) {
        let all = || self.drafts.iter().map(|(draft, _)| draft);
        if all().any(Draft::is_whole) {
            failpoint::reached("piece", step);
        }
        if all().any(Draft::is_part) {
            failpoint::reached("part", step);
        }
        if !all().all(|draft| draft.is_whole() || draft.is_part()) {
            failpoint::reached("publish", step);
        }
        if !self.finished.is_empty() {
            failpoint::reached("record", step);
        }
    }

    /// Everything but the named publishes that others have done, and these.
    pub(super) fn without(mut self, repeated: &[bool]) -> (Self, Self) {
        let (mut left_out, mut repeated) = (Self::default(), repeated.iter());
        for (draft, answer) in std::mem::take(&mut self.drafts) {
            let named = draft.kept().is_some();
            let of = if named && repeated.next() == Some(&true) { &mut left_out } else { &mut self };
            of.drafts.push((draft, answer));
        }
        (self, left_out)
    }

    /// Each item on its own.
    pub(super) fn split(self) -> impl Iterator<Item = Self> {
        let drafts = self.drafts.into_iter().map(|draft| Self { drafts: vec![draft], ..Self::default() });
        let finished = self.finished.into_iter().map(|finished| Self { finished: vec![finished], ..Self::default() });
        let releases = self.releases.into_iter().map(|release| Self { releases: vec![release], ..Self::default() });
        drafts.chain(finished).chain(releases)
    }
}
