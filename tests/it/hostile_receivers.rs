//! Receivers that do not behave, from raw sockets: each ends in time, with a reason of its own.

mod tls;

use std::{
    io::Write,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use shortkit_webhooks::{clock, config::Config};
use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
};

use crate::support::{Database, Kind, Receiver, Reply, TestServer, config, soon};

/// One attempt may take this long in these tests.
const TIMEOUT: Duration = Duration::from_secs(1);

/// A receiver that hands each connection to `act`, after the head of a request has come.
async fn raw<F>(act: impl Fn(TcpStream) -> F + Send + 'static) -> String
where
    F: Future<Output = std::io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await;
            tokio::spawn(act(stream));
        }
    });
    format!("http://{address}/")
}

async fn server(database: &Database) -> TestServer {
    TestServer::with(Config { request_timeout: TIMEOUT, ..config(database) }).await
}

/// Sends a test event and asserts how it ended.
async fn assert_ends(server: &TestServer, url: &str, expected: serde_json::Value) -> serde_json::Value {
    let (id, _) = server.webhook(url, &["content.ready"]).await;
    let started = clock::stopwatch();
    let test = server.post(&format!("/v1/webhooks/{id}/test"), "{}").await.data();
    assert!(started.elapsed() < TIMEOUT + Duration::from_secs(2), "{:?} {test}", started.elapsed());
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&test[key], value, "{url} {test}");
    }
    test
}

fn failed(reason: &str) -> serde_json::Value {
    json!({ "status": "failed", "lastError": reason })
}

const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n";

#[tokio::test]
async fn each_ends_in_time_with_its_reason() {
    let database = Database::fresh(Kind::Sqlite).await;
    let server = server(&database).await;

    let silent = raw(async |stream| {
        let _open = stream;
        std::future::pending().await
    })
    .await;
    assert_ends(&server, &silent, failed("Request timeout")).await;
    let drip = raw(async |mut stream| {
        stream.write_all(HEAD).await?;
        stream.write_all(b"content-length: 100000\r\n\r\n").await?;
        drip(stream).await
    })
    .await;
    assert_ends(&server, &drip, failed("Request timeout")).await;
    let nonsense = raw(async |mut stream| stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await).await;
    assert_ends(&server, &nonsense, failed("Invalid HTTP response")).await;
    let mute = raw(async |mut stream| stream.shutdown().await).await;
    assert_ends(&server, &mute, failed("Connection reset")).await;
    let cut = raw(async |mut stream| {
        stream.write_all(HEAD).await?;
        stream.write_all(b"content-length: 100\r\n\r\nabc").await
    })
    .await;
    assert_ends(&server, &cut, failed("Connection reset")).await;
    let reset = raw(async |mut stream| {
        stream.write_all(HEAD).await?;
        stream.write_all(b"content-length: 100\r\n\r\nabc").await?;
        stream.set_zero_linger()
    })
    .await;
    assert_ends(&server, &reset, failed("Connection reset")).await;

    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    assert_ends(&server, &format!("http://{nobody}/"), failed("Connection refused")).await;
    assert_ends(&server, "https://nobody.invalid/", failed("DNS lookup failed")).await;
    server.stop().await;
}

/// An address that neither refuses nor accepts.
#[tokio::test]
async fn what_cannot_be_reached_is_told_from_what_does_not_answer() {
    let database = Database::fresh(Kind::Sqlite).await;
    let server = server(&database).await;
    let full = TcpSocket::new_v4().unwrap();
    full.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let full = full.listen(0).unwrap();
    let address = full.local_addr().unwrap();
    // The one that a queue of no length holds: the system drops what comes after it.
    let _waits = TcpStream::connect(address).await.unwrap();
    for scheme in ["http", "https"] {
        assert_ends(&server, &format!("{scheme}://{address}/"), failed("Connection timeout")).await;
    }
    server.stop().await;
}

/// Sends a byte now and then.
async fn drip(mut stream: impl AsyncWrite + Unpin) -> std::io::Result<()> {
    loop {
        stream.write_all(b"x").await?;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn heads_have_an_end() {
    let database = Database::fresh(Kind::Sqlite).await;
    let server = server(&database).await;
    let endless = raw(async |mut stream| {
        stream.write_all(HEAD).await?;
        loop {
            stream.write_all(b"x-filler: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n").await?;
        }
    })
    .await;
    assert_ends(&server, &endless, failed("Invalid HTTP response")).await;
    let one_line = raw(async |mut stream| {
        stream.write_all(b"HTTP/1.1 200 ").await?;
        loop {
            stream.write_all(&[b'O'; 4096]).await?;
        }
    })
    .await;
    assert_ends(&server, &one_line, failed("Invalid HTTP response")).await;
    let many = raw(async |mut stream| {
        stream.write_all(HEAD).await?;
        stream.write_all("a:b\r\n".repeat(10_000).as_bytes()).await?;
        stream.write_all(b"content-length: 0\r\n\r\n").await
    })
    .await;
    assert_ends(&server, &many, failed("Invalid HTTP response")).await;
    let informational = raw(async |mut stream| {
        loop {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
    })
    .await;
    assert_ends(&server, &informational, failed("Request timeout")).await;
    server.stop().await;
}

/// 16 KiB are read; then the connection is gone, and nothing is read to make it fit for use again.
#[tokio::test]
async fn a_long_answer_is_dropped_and_not_drained() {
    let database = Database::fresh(Kind::Sqlite).await;
    let server = server(&database).await;
    for head in ["transfer-encoding: chunked\r\n\r\n", "content-length: 1000000000000\r\n\r\n", "\r\n"] {
        let (ended, mut end) = tokio::sync::mpsc::unbounded_channel();
        let endless = raw(move |mut stream| {
            let ended = ended.clone();
            async move {
                stream.write_all(HEAD).await?;
                stream.write_all(head.as_bytes()).await?;
                let chunk = format!("1000\r\n{}\r\n", "x".repeat(0x1000));
                let mut sent = 0;
                while stream.write_all(chunk.as_bytes()).await.is_ok() {
                    sent += chunk.len();
                }
                let _ = ended.send(sent);
                Ok(())
            }
        })
        .await;
        let test = assert_ends(&server, &endless, json!({ "status": "success", "statusCode": 200 })).await;
        assert_eq!(test["response"].as_str().unwrap().len(), 16 * 1024);
        // What the system's own buffers hold, and no more.
        let sent = soon("the end of the connection", end.recv()).await.unwrap();
        assert!(sent < 16 * 1024 * 1024, "{sent}");
    }
    server.stop().await;
}

/// Not unpacked at all: what cannot grow needs no bound.
#[tokio::test]
async fn a_gzip_bomb_stays_packed() {
    let database = Database::fresh(Kind::Sqlite).await;
    let server = server(&database).await;
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    packer.write_all(&vec![0; 10_000_000]).unwrap();
    let packed = Arc::new(packer.finish().unwrap());
    assert!(packed.len() < 16 * 1024, "{}", packed.len());
    let length = String::from_utf8_lossy(&packed).replace('\0', "\u{fffd}").len();
    let bomb = raw(move |mut stream| {
        let packed = Arc::clone(&packed);
        async move {
            stream.write_all(HEAD).await?;
            let head = format!("content-encoding: gzip\r\ncontent-length: {}\r\n\r\n", packed.len());
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(&packed).await
        }
    })
    .await;
    let test = assert_ends(&server, &bomb, json!({ "status": "success" })).await;
    assert_eq!(test["response"].as_str().unwrap().len(), length);
    server.stop().await;
}

#[tokio::test]
async fn redirects_are_an_answer() {
    let database = Database::fresh(Kind::Sqlite).await;
    let server = server(&database).await;
    let elsewhere = Receiver::start().await;
    for status in [300, 301, 302, 303, 304, 307, 308] {
        let location = elsewhere.url();
        let sends_on = Receiver::scripted(move |_, _| Reply {
            headers: vec![("location", location.clone())],
            ..Reply::status(status)
        })
        .await;
        let test = assert_ends(&server, &sends_on.url(), failed("Redirects are not followed")).await;
        assert_eq!(test["statusCode"], status);
    }
    assert_eq!(elsewhere.received().len(), 0);
    server.stop().await;
}

/// Whatever stands in a URL, the request has the lines that it should.
#[tokio::test]
async fn a_url_adds_no_lines_to_a_request() {
    let database = Database::fresh(Kind::Sqlite).await;
    let server = server(&database).await;
    let heads: Arc<Mutex<Vec<String>>> = Arc::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let kept = Arc::clone(&heads);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = vec![0; 8192];
            let length = stream.read(&mut head).await.unwrap();
            kept.lock().unwrap().push(String::from_utf8_lossy(&head[..length]).into_owned());
            let _ = accept(&mut stream).await;
        }
    });
    let odd = ["/a\r\nx-evil: 1\r\n\r\nb", "/%0d%0ax-evil:%201", "/?a\r\nx-evil:1", "/\tx-evil:1", "/ä x-evil: 1"];
    for path in odd {
        assert_ends(&server, &format!("http://{address}{path}"), json!({ "status": "success" })).await;
    }
    let heads = heads.lock().unwrap().clone();
    assert_eq!(heads.len(), odd.len());
    for head in heads {
        let (head, _) = head.split_once("\r\n\r\n").unwrap();
        let mut lines = head.lines();
        let first = lines.next().unwrap();
        assert!(
            first.starts_with("POST /") && first.ends_with(" HTTP/1.1") && first.split(' ').count() == 3,
            "{first}"
        );
        let names: Vec<&str> = lines.map(|line| line.split_once(": ").unwrap().0).collect();
        assert_eq!(names.len(), 13, "{names:?}");
        assert!(!names.contains(&"x-evil"), "{names:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn an_address_is_judged_at_every_attempt() {
    let database = Database::fresh(Kind::Sqlite).await;
    let open = server(&database).await;
    let receiver = Receiver::start().await;
    let urls = [receiver.url(), format!("http://localhost:{}/", receiver.address.port())];
    let mut ids = Vec::new();
    for url in &urls {
        ids.push(open.webhook(url, &["content.ready"]).await.0);
    }
    let key = open.key.clone();
    open.stop().await;

    // The operator has changed the policy since.
    let mut server = TestServer::with(Config { allow_loopback: false, ..config(&database) }).await;
    server.key = key;
    for id in ids {
        let test = server.post(&format!("/v1/webhooks/{id}/test"), "{}").await.data();
        assert_eq!(test["lastError"], "Blocked address", "{test}");
    }
    for url in urls {
        let body = json!({ "url": url, "events": ["content.ready"] }).to_string();
        let refused = server.post("/v1/webhooks", &body).await;
        assert_eq!((refused.status, &refused.json()["error"]["details"]["field"]), (400, &json!("url")));
    }
    assert_eq!(receiver.received().len(), 0);
    server.stop().await;
}

async fn accept(stream: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nOK").await?;
    stream.shutdown().await
}

#[tokio::test]
async fn connections_are_kept() {
    let database = Database::fresh(Kind::Sqlite).await;
    let server = server(&database).await;
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connections);
    let receiver = raw(move |mut stream| {
        counted.fetch_add(1, Ordering::SeqCst);
        async move {
            loop {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nOK").await?;
                if stream.read(&mut [0; 4096]).await? == 0 {
                    return Ok(());
                }
            }
        }
    })
    .await;
    for _ in 0..5 {
        assert_ends(&server, &receiver, json!({ "status": "success" })).await;
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
    server.stop().await;
}
