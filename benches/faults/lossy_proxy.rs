//! A way to PostgreSQL on which the reply of a commit is lost when somebody wants that, and whatever follows; the one of the
//! tests loses one that is known beforehand. A commit of the engine is a statement that is a transaction of its own. What it
//! carries tells it, and so does the reply: only that of what is committed is lost.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{oneshot, watch},
    task::JoinHandle,
};

/// An event in a commit, or a result, as the log of changes has them …
const EVENT: &[u8] = br#""k":"created""#;
const RESULT: &[u8] = br#""k":"attempted""#;
/// … and an event that is kept first: it is stored later, in parts.
const KEPT: &[u8] = br#"{\"number\":"#;
/// The end of a reply that leaves no transaction open, and what comes before when the statement was done.
const READY: &[u8] = b"Z\0\0\0\x05I";
const DONE: &[u8] = b"SELECT 1\0";
/// In the data of an event that is published with a key.
const KEYED: &[u8] = b"with_key";
/// A commit is waited for so long; then the scenario has failed.
const PATIENCE: Duration = Duration::from_secs(30);
/// What is read at a time.
const BUFFER_BYTES: usize = 64 * 1024;

/// What follows a reply that was lost.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Then {
    /// Its connection ends.
    Cut,
    /// Nothing comes on it any more, and it does not end.
    Silence,
    /// All connections end, and there are no new ones until [`LossyProxy::mend`].
    Down,
}

/// Which commit it is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Which {
    /// The next one with a result.
    Result,
    /// The next one with an event that was published with a key, and so will be published again.
    Keyed,
    /// The next one with several events, most of which were published together.
    Together,
}

/// What was in a commit whose reply was lost.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Carried {
    pub(crate) events: usize,
    /// Of the events.
    pub(crate) keyed: usize,
    pub(crate) results: usize,
}

/// A running proxy; it and all its connections end when it is dropped.
pub(crate) struct LossyProxy {
    pub(crate) url: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    server: String,
    /// For the next commit; none when it is to be answered.
    wanted: Mutex<Option<Wanted>>,
    down: watch::Sender<bool>,
}

struct Wanted {
    which: Which,
    then: Then,
    lost: oneshot::Sender<Carried>,
}

/// A commit whose reply is to be lost.
struct Loss {
    wanted: Wanted,
    carried: Carried,
    reply: Vec<u8>,
}

impl LossyProxy {
    /// In front of the server that `url` names.
    pub(crate) async fn start(url: &str) -> Result<Self, String> {
        let (user, rest) = url.split_once('@').ok_or("a URL without a user")?;
        let (server, database) = rest.split_once('/').ok_or("a URL without a database")?;
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|error| error.to_string())?;
        let address = listener.local_addr().map_err(|error| error.to_string())?;
        let url = format!("{user}@{address}/{database}");
        let shared =
            Arc::new(Shared { server: server.to_owned(), wanted: Mutex::default(), down: watch::Sender::new(false) });
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { url, shared, task })
    }

    /// Loses the reply of a commit; what that carried.
    pub(crate) async fn lose(&self, which: Which, then: Then) -> Result<Carried, String> {
        let (lost, carried) = oneshot::channel();
        self.shared.want(Wanted { which, then, lost });
        let carried = tokio::time::timeout(PATIENCE, carried).await.map_err(|_| "no commit came".to_owned())?;
        carried.map_err(|_| "a connection ended before its commit was answered".to_owned())
    }

    pub(crate) fn mend(&self) {
        self.shared.down.send_replace(false);
    }
}

impl Drop for LossyProxy {
    fn drop(&mut self) {
        self.task.abort();
        self.shared.down.send_replace(true);
    }
}

impl Shared {
    fn want(&self, wanted: Wanted) {
        *self.wanted.lock().expect("no panic while it was held") = Some(wanted);
    }

    /// What is to happen to something that carries this.
    fn wanted(&self, carried: Carried) -> Option<Wanted> {
        let mut wanted = self.wanted.lock().expect("no panic while it was held");
        wanted.take_if(|wanted| match wanted.which {
            Which::Result => carried.results > 0,
            Which::Keyed => carried.keyed > 0,
            Which::Together => carried.events > 1,
        })
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((client, _)) = listener.accept().await {
        let (mut down, shared) = (shared.down.subscribe(), Arc::clone(&shared));
        // Accepted and ended, as by a load balancer that has no server.
        if client.set_nodelay(true).is_err() || *down.borrow() {
            continue;
        }
        tokio::spawn(async move {
            tokio::select! {
                _ = forward(client, shared) => {}
                _ = down.wait_for(|down| *down) => {}
            }
        });
    }
}

/// Passes on what is said until one side ends, or the reply of a commit was lost. A client that waits for a reply asks for
/// nothing else meanwhile.
async fn forward(mut client: TcpStream, shared: Arc<Shared>) -> std::io::Result<()> {
    let mut server = TcpStream::connect(&shared.server).await?;
    server.set_nodelay(true)?;
    let (mut asked, mut answered) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    let mut loss: Option<Loss> = None;
    loop {
        tokio::select! {
            length = client.read(&mut asked) => {
                let bytes = &asked[..length?];
                if bytes.is_empty() {
                    return Ok(());
                }
                let carried = Carried::of(bytes);
                match &mut loss {
                    Some(loss) => loss.carried.add(carried),
                    None => {
                        loss = shared.wanted(carried).map(|wanted| Loss { wanted, carried, reply: Vec::new() });
                    }
                }
                server.write_all(bytes).await?;
            }
            length = server.read(&mut answered) => {
                let bytes = &answered[..length?];
                if bytes.is_empty() {
                    return Ok(());
                }
                loss = match loss {
                    Some(loss) => match loss.go_on(bytes) {
                        Reply::Goes { wanted, reply } => {
                            // It was no commit, or was refused: another one's turn.
                            shared.want(wanted);
                            client.write_all(&reply).await?;
                            None
                        }
                        Reply::Comes(loss) => Some(loss),
                        Reply::IsLost { wanted, carried } => {
                            drop(server);
                            return wanted.follow(carried, client, &shared).await;
                        }
                    },
                    None => {
                        client.write_all(bytes).await?;
                        None
                    }
                };
            }
        }
    }
}

/// How far a reply is.
enum Reply {
    /// Not all of it is there.
    Comes(Loss),
    /// It says that something is committed.
    IsLost { wanted: Wanted, carried: Carried },
    /// It says something else.
    Goes { wanted: Wanted, reply: Vec<u8> },
}

impl Loss {
    fn go_on(mut self, bytes: &[u8]) -> Reply {
        self.reply.extend_from_slice(bytes);
        let Self { wanted, carried, reply } = self;
        // Whether a transaction is open then, is the last byte.
        let ends = reply.len() >= READY.len() && reply[..reply.len() - 1].ends_with(&READY[..READY.len() - 1]);
        if !ends {
            Reply::Comes(Self { wanted, carried, reply })
        } else if reply.ends_with(READY) && count(&reply, DONE) > 0 {
            Reply::IsLost { wanted, carried }
        } else {
            Reply::Goes { wanted, reply }
        }
    }
}

impl Wanted {
    /// Tells that the reply is lost, and does what follows.
    async fn follow(self, carried: Carried, mut client: TcpStream, shared: &Shared) -> std::io::Result<()> {
        if matches!(self.then, Then::Down) {
            shared.down.send_replace(true);
        }
        let _ = self.lost.send(carried);
        if matches!(self.then, Then::Silence) {
            // Until its client gives up.
            tokio::io::copy(&mut client, &mut tokio::io::sink()).await?;
        }
        Ok(())
    }
}

impl Carried {
    fn of(bytes: &[u8]) -> Self {
        let events = count(bytes, EVENT) + count(bytes, KEPT);
        Self { events, keyed: count(bytes, KEYED), results: count(bytes, RESULT) }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.events += other.events;
        self.results += other.results;
        self.keyed += other.keyed;
    }
}

fn count(bytes: &[u8], mark: &[u8]) -> usize {
    bytes.windows(mark.len()).filter(|window| *window == mark).count()
}
