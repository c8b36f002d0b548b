//! A way to PostgreSQL on which things go wrong.

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

use super::Database;

/// A way to a database. When this is dropped, it ends, with all that is connected, and nobody listens any more.
pub(crate) struct Way {
    /// Of the database.
    pub(crate) url: String,
    /// How often it has gone silent.
    silences: watch::Sender<usize>,
    /// Whether who connects is turned away.
    closed: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Way {
    pub(crate) async fn to(database: &Database) -> Self {
        let (user, rest) = database.url.split_once('@').unwrap();
        let (server, name) = rest.split_once('/').unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("{user}@{}/{name}", listener.local_addr().unwrap());
        let (silences, silence) = watch::channel(0);
        let (closed, is_closed) = watch::channel(false);
        let server = server.to_owned();
        let task = tokio::spawn(async move {
            // They end with it.
            let mut connections = JoinSet::new();
            while let Ok((mut from, _)) = listener.accept().await {
                if *is_closed.borrow() {
                    continue;
                }
                let (mut silence, server) = (silence.clone(), server.clone());
                silence.mark_unchanged();
                connections.spawn(async move {
                    let mut to = TcpStream::connect(server).await.unwrap();
                    tokio::select! {
                        _ = copy_bidirectional(&mut from, &mut to) => {}
                        // Both ends stay as they are: nothing is said of it.
                        _ = silence.changed() => std::future::pending().await,
                    }
                });
            }
        });
        Self { url, silences, closed, task }
    }

    /// Turns away who connects from now on, or takes them again.
    pub(crate) fn close(&self, closed: bool) {
        self.closed.send_replace(closed);
    }

    /// What is connected hears nothing more; who connects from now on does.
    pub(crate) fn go_silent(&self) {
        self.silences.send_modify(|count| *count += 1);
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.task.abort();
    }
}
