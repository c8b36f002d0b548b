//! A way to PostgreSQL that loses the reply of one commit, and then is down until it is mended. A commit is a statement
//! that is a transaction of its own; what it carries tells it.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    task::JoinHandle,
};

const UP: u8 = 0;
const LOSING: u8 = 1;
const DOWN: u8 = 2;

pub(super) struct LossyProxy {
    url: String,
    state: Arc<AtomicU8>,
    task: JoinHandle<()>,
}

impl LossyProxy {
    /// In front of the server that `url` names; the commit is the one that carries `data`.
    pub(super) async fn start(url: &str, data: &'static str) -> Self {
        let (user, rest) = url.split_once('@').expect("a user");
        let (server, name) = rest.split_once('/').expect("a database");
        let (server, state) = (server.to_owned(), Arc::new(AtomicU8::new(UP)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("{user}@{}/{name}", listener.local_addr().unwrap());
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if shared.load(Ordering::SeqCst) != DOWN {
                    let server = TcpStream::connect(&server).await.unwrap();
                    tokio::spawn(forward(client, server, data, Arc::clone(&shared)));
                }
            }
        });
        Self { url, state, task }
    }

    pub(super) fn url(&self) -> String {
        self.url.clone()
    }

    pub(super) fn lose_the_next_commit(&self) {
        self.state.store(LOSING, Ordering::SeqCst);
    }

    pub(super) fn mend(&self) {
        self.state.store(UP, Ordering::SeqCst);
    }
}

impl Drop for LossyProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn forward(client: TcpStream, server: TcpStream, data: &'static str, state: Arc<AtomicU8>) {
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let asking = copy(from_client, to_server, |bytes| {
        let commit = bytes.windows(data.len()).any(|window| window == data.as_bytes());
        // It passes, and from here on nothing else does: the first thing that is lost is its reply.
        let lost = commit && state.compare_exchange(LOSING, DOWN, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        lost || state.load(Ordering::SeqCst) != DOWN
    });
    let answering = copy(from_server, to_client, |_| state.load(Ordering::SeqCst) != DOWN);
    tokio::select! {
        () = answering => {}
        () = asking => {}
    }
}

/// Passes on what `may` pass; ends at the first that may not.
async fn copy(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, may: impl Fn(&[u8]) -> bool) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let bytes = &buffer[..length];
        if !may(bytes) || to.write_all(bytes).await.is_err() {
            return;
        }
    }
}
