//! A network namespace in which every address is this machine.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
};

use crate::support::{Says, serve_names, soon};

/// An address of each range that is not public, the edges of some, and those where clouds keep secrets.
pub(super) const INSIDE: [&str; 38] = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "240.0.0.1",
    "255.255.255.254",
    "::",
    "::1",
    "::10.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::a00:1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:a9fe:a9fe::1",
    "3fff::1",
    "4000::1",
    "5f00::1",
    "fd00:ec2::254",
    "fec0::1",
];
/// Addresses that the system opens no connection to, whatever the routes say.
pub(super) const UNREACHABLE: [&str; 5] = ["224.0.0.1", "239.255.255.255", "255.255.255.255", "fe80::1", "ff02::1"];
/// Addresses of the public internet, as far as anybody here can tell.
pub(super) const PUBLIC_V4: &str = "93.184.216.34";
pub(super) const PUBLIC_V6: &str = "2606:2800:220:1::1";
/// One of them that neither refuses nor accepts, on this port; another one that the same name has does.
const DEAD_V4: &str = "93.184.216.99";
pub(super) const HALF_DEAD: u16 = 9001;
/// What the operator allows beside them.
pub(super) const ALLOWED: &str = "10.77.0.0/16";
/// Where somebody listens, on every address.
pub(super) const PORTS: [u16; 3] = [80, 443, 9000];
const NAME_SERVER: &str = "9.9.9.9:53";

/// The namespace that this process is in.
pub(super) struct World {
    pub(super) directory: TempDir,
    turned: Arc<AtomicBool>,
    silenced: watch::Receiver<usize>,
    heard: watch::Receiver<Vec<(IpAddr, u16)>>,
    taken: AtomicUsize,
    _dead: (TcpListener, TcpStream),
}

/// Whether the service may open a connection there.
pub(super) fn may_be_dialled(address: IpAddr) -> bool {
    let allowed: ipnet::IpNet = ALLOWED.parse().unwrap();
    allowed.contains(&address) || [PUBLIC_V4, PUBLIC_V6].iter().any(|public| *public == address.to_string())
}

/// An address in URLs, on each port.
pub(super) fn urls(address: &str) -> [String; 3] {
    let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
    [format!("http://{host}:9000/"), format!("http://{host}/"), format!("https://{host}/")]
}

impl World {
    pub(super) async fn new() -> Self {
        run("ip", &["link", "set", "lo", "up"]);
        run("ip", &["route", "add", "local", "default", "dev", "lo"]);
        run("ip", &["-6", "route", "add", "local", "default", "dev", "lo"]);
        let directory = tempfile::tempdir().unwrap();
        let resolv = directory.path().join("resolv.conf");
        let (server, _) = NAME_SERVER.split_once(':').unwrap();
        fs::write(&resolv, format!("nameserver {server}\n")).unwrap();
        run("mount", &["--bind", resolv.to_str().unwrap(), "/etc/resolv.conf"]);

        let turned = Arc::new(AtomicBool::new(false));
        let (silence, silenced) = watch::channel(0);
        serve_names(NAME_SERVER.parse().unwrap(), script(Arc::clone(&turned), silence)).await;
        let (hear, heard) = watch::channel(Vec::new());
        for port in PORTS {
            // Of both families.
            let listener = TcpListener::bind(("::", port)).await.unwrap();
            tokio::spawn(listen(listener, hear.clone()));
        }
        let live = TcpListener::bind((PUBLIC_V4, HALF_DEAD)).await.unwrap();
        tokio::spawn(listen(live, hear));
        Self { directory, turned, silenced, heard, taken: AtomicUsize::new(0), _dead: dead().await }
    }

    /// Whether names that turn now point inside.
    pub(super) fn turn(&self, turned: bool) {
        self.turned.store(turned, Ordering::SeqCst);
    }

    /// Waits until so many questions got no answer.
    pub(super) async fn queries_for(&self, what: &str, count: usize) {
        soon(what, self.silenced.clone().wait_for(|queries| *queries >= count)).await.unwrap();
    }

    /// Every connection since the last call, by the address and port that were dialled.
    pub(super) async fn heard(&self) -> Vec<(IpAddr, u16)> {
        // Connections are accepted in their order: when these have been, all before them have been.
        let mut last: Vec<SocketAddr> = Vec::new();
        for port in PORTS {
            let address = SocketAddr::from(([1, 1, 1, 1], port));
            TcpStream::connect(address).await.unwrap();
            last.push(address);
        }
        let all_came = |heard: &Vec<(IpAddr, u16)>| {
            let heard = heard.get(self.taken.load(Ordering::SeqCst)..).unwrap_or_default();
            last.iter().all(|last| heard.contains(&(last.ip(), last.port())))
        };
        let heard = soon("the last", self.heard.clone().wait_for(all_came)).await.unwrap().clone();
        let taken = self.taken.swap(heard.len(), Ordering::SeqCst);
        heard[taken..].iter().filter(|(ip, _)| *ip != last[0].ip()).copied().collect()
    }
}

/// A queue of no length and the one that it holds: the system drops what comes after it.
async fn dead() -> (TcpListener, TcpStream) {
    let address = SocketAddr::from((DEAD_V4.parse::<Ipv4Addr>().unwrap(), HALF_DEAD));
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(address).unwrap();
    (socket.listen(0).unwrap(), TcpStream::connect(address).await.unwrap())
}

/// What the name server says.
fn script(turned: Arc<AtomicBool>, silence: watch::Sender<usize>) -> impl Fn(&str, &str) -> Says + Send {
    let alternations = AtomicUsize::new(0);
    move |name, family| {
        let public = || [PUBLIC_V4, PUBLIC_V6].map(|address| address.parse().unwrap()).to_vec();
        let inside = |index: &str| -> IpAddr { INSIDE[index.parse::<usize>().unwrap()].parse().unwrap() };
        let (kind, index) = name.trim_end_matches(".example").rsplit_once('-').unwrap_or((name, ""));
        match (kind, turned.load(Ordering::SeqCst)) {
            ("inside", _) | ("turning", true) => Says::Addresses(vec![inside(index)]),
            ("mixed", true) => Says::Addresses([vec![inside(index)], public()].concat()),
            ("silent", true) => {
                silence.send_modify(|queries| *queries += 1);
                Says::Silence
            }
            ("alias.example", true) => Says::Alias("inside-2.example"),
            ("half-dead", _) => Says::Addresses([DEAD_V4, PUBLIC_V4].map(|address| address.parse().unwrap()).to_vec()),
            ("alternating.example", _) if family == "AAAA" => Says::Addresses(Vec::new()),
            // Public at first, when the webhook is registered.
            ("alternating.example", _) => match alternations.fetch_add(1, Ordering::SeqCst) % 2 {
                0 => Says::Addresses(public()),
                _ => Says::Addresses(vec![inside("2")]),
            },
            ("turning" | "mixed" | "silent" | "alias.example" | "public.example", _) => Says::Addresses(public()),
            _ => Says::Missing,
        }
    }
}

async fn listen(listener: TcpListener, hear: watch::Sender<Vec<(IpAddr, u16)>>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let dialled = stream.local_addr().unwrap();
        hear.send_modify(|heard| heard.push((dialled.ip().to_canonical(), dialled.port())));
        // Who wants to encrypt has been heard, and is not answered.
        if dialled.port() != 443 {
            tokio::spawn(answer(stream));
        }
    }
}

/// Answers one request: with a redirect to the inside, without end, or with 200.
async fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut request = Vec::new();
    let whole = |request: &[u8]| {
        let text = String::from_utf8_lossy(request).to_lowercase();
        let (head, body) = text.split_once("\r\n\r\n")?;
        let length = head.split("content-length: ").nth(1)?.lines().next()?.parse::<usize>().ok()?;
        (body.len() >= length).then(|| head.split(' ').nth(1).unwrap_or_default().to_owned())
    };
    let path = loop {
        if let Some(path) = whole(&request) {
            break path;
        }
        if stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    };
    if let Some(status) = path.strip_prefix("/redirect/") {
        let to = "http://169.254.169.254:9000/latest/meta-data/";
        let answer = format!("HTTP/1.1 {status} Elsewhere\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n");
        stream.write_all(answer.as_bytes()).await?;
    } else if path.starts_with("/endless") {
        stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await?;
        let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
        loop {
            stream.write_all(chunk.as_bytes()).await?;
        }
    } else {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nOK").await?;
    }
    stream.shutdown().await
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
