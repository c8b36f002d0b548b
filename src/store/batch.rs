//! Natural batching: what queues up while one commit runs is the next batch, so a lone item waits for nobody and a
//! crowd shares the cost of the disk.

use std::{
    future::Future,
    sync::{Arc, Weak},
};

use tokio::sync::{mpsc, oneshot};

use super::Error;

/// One commit takes at most this many items; the rest is in the next.
const MAX_BATCH: usize = 256;
/// This many items may wait for a commit; one more is refused with [`Error::Overloaded`].
const MAX_QUEUED: usize = 16_384;

/// Hands items to one task that commits them together.
pub(super) struct Batcher<I, O> {
    queue: mpsc::Sender<(I, oneshot::Sender<Result<O, Error>>)>,
}

impl<I: Send + 'static, O: Send + 'static> Batcher<I, O> {
    /// Starts the task. `commit` answers each item in the order given, or fails them all. The task does not keep the
    /// owner, which has the batcher, alive.
    pub(super) fn start<S, C, F>(owner: Weak<S>, commit: C) -> Self
    where
        S: Send + Sync + 'static,
        C: Fn(Arc<S>, Vec<I>) -> F + Send + 'static,
        F: Future<Output = Result<Vec<O>, Error>> + Send,
    {
        let (queue, mut waiting) = mpsc::channel(MAX_QUEUED);
        tokio::spawn(async move {
            let mut batch = Vec::with_capacity(MAX_BATCH);
            while waiting.recv_many(&mut batch, MAX_BATCH).await > 0 {
                let Some(owner) = owner.upgrade() else { return };
                let (items, answers): (Vec<I>, Vec<oneshot::Sender<_>>) = batch.drain(..).unzip();
                match commit(owner, items).await {
                    Ok(outputs) => {
                        // A caller that left in the meantime misses only the answer: its item is committed.
                        answers.into_iter().zip(outputs).for_each(|(answer, output)| drop(answer.send(Ok(output))));
                    }
                    Err(error) => answers.into_iter().for_each(|answer| drop(answer.send(Err(error.clone())))),
                }
            }
        });
        Self { queue }
    }

    /// Waits until `item` is committed.
    pub(super) async fn submit(&self, item: I) -> Result<O, Error> {
        let (answer, committed) = oneshot::channel();
        self.queue.try_send((item, answer)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Error::Overloaded,
            mpsc::error::TrySendError::Closed(_) => Error::Closed,
        })?;
        committed.await.map_err(|_| Error::Closed)?
    }
}
