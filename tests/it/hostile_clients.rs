//! Clients that do not behave, from raw sockets: each is dropped or bounded, and the others are served.

mod wire;

use std::time::Duration;

use serde_json::Value;
use shortkit_webhooks::{clock, config::Config, grpc, listen::Limits, store::KeyKind, webhook::Environment};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::Code;
use tonic_types::StatusExt;

use self::wire::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, PRIORITY, PUSH_PROMISE, RST_STREAM, SETTINGS,
    WINDOW_UPDATE, frame, get, opening, post,
};
use crate::{
    support::{Database, Kind, Receiver, TestServer, config, soon},
    transport::response,
};

/// What takes long by default takes this long here.
const SHORT: Duration = Duration::from_millis(500);
/// Frames that no server may take from a flood, and more than fit between two sockets while it is read slowly.
const FAR_TOO_MANY: usize = 2_000_000;

async fn server(limits: Limits) -> (TestServer, Database) {
    let database = Database::fresh(Kind::Sqlite).await;
    (TestServer::with(Config { limits, ..config(&database) }).await, database)
}

async fn connect(server: &TestServer) -> TcpStream {
    TcpStream::connect(server.address).await.unwrap()
}

/// The proof that the others are served.
async fn assert_serves(server: TestServer) {
    assert_eq!(server.get("/v1/webhooks").await.status, 200);
    server.stop().await;
}

/// Waits until the server has closed the connection; everything that it said before.
async fn closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut said = Vec::new();
    // A reset is an end too.
    let _ = soon("the end of the connection", stream.read_to_end(&mut said)).await;
    said
}

/// Opens an HTTP/2 connection and sends what `next` makes, until the server has had enough; how many it took. Answers
/// are read meanwhile, so that it is not for them that the connection ends.
async fn flooded(server: &TestServer, mut next: impl FnMut(usize) -> Vec<u8>) -> usize {
    let (mut read, mut write) = connect(server).await.into_split();
    let reader = tokio::spawn(async move {
        let mut said = Vec::new();
        let _ = read.read_to_end(&mut said).await;
    });
    write.write_all(&opening(None)).await.unwrap();
    let mut sent = 0;
    while !reader.is_finished() && write.write_all(&next(sent)).await.is_ok() {
        sent += 1;
        assert!(sent < FAR_TOO_MANY, "the flood goes on for ever");
    }
    soon("the end of the connection", reader).await.unwrap();
    sent
}

/// The next frame: type, flags, stream and payload; none at the end of the connection.
async fn read_frame(client: &mut TcpStream) -> Option<(u8, u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    soon("a frame", client.read_exact(&mut head)).await.ok()?;
    let [a, b, c, kind, flags, stream @ ..] = head;
    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    soon("a payload", client.read_exact(&mut payload)).await.ok()?;
    Some((kind, flags, u32::from_be_bytes(stream), payload))
}

/// The id of the client's stream number `index`.
fn stream(index: usize) -> u32 {
    u32::try_from(2 * index + 1).unwrap()
}

#[tokio::test]
async fn floods_end_their_connection() {
    let (server, _database) = server(Limits::default()).await;
    // CVE-2023-44487, rapid reset: far fewer than the streams that may be open ever are.
    flooded(&server, |index| {
        let pair = |stream| {
            let reset = frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes());
            [frame(HEADERS, END_HEADERS | END_STREAM, stream, &get("/v1/webhooks", "")), reset].concat()
        };
        (50 * index..50 * (index + 1)).flat_map(|index| pair(stream(index))).collect()
    })
    .await;
    // CVE-2024-27316 and its kin: a head without end, which is no more read than one that is a little too large.
    let sent = flooded(&server, |index| match index {
        0 => frame(HEADERS, END_STREAM, 1, &get("/", "")),
        _ => frame(CONTINUATION, 0, 1, &wire::literal("x", "y")),
    })
    .await;
    assert!(sent < 10_000, "{sent}");
    flooded(&server, |index| match index {
        0 => frame(HEADERS, END_STREAM, 1, &get("/", "")),
        _ => frame(CONTINUATION, 0, 1, &[]),
    })
    .await;
    // CVE-2019-9512, 9515, 9513: pings, settings, priorities, and frames of no known type.
    flooded(&server, |_| frame(PING, 0, 0, &[0; 8])).await;
    flooded(&server, |_| frame(SETTINGS, 0, 0, &[])).await;
    flooded(&server, |index| frame(PRIORITY, 0, stream(index), &[0, 0, 0, 0, 1])).await;
    flooded(&server, |_| frame(0xee, 0, 0, &[0; 8])).await;
    // CVE-2019-9518: pieces of a body that hold nothing.
    flooded(&server, |index| match index {
        0 => frame(HEADERS, END_HEADERS, 1, &post("/v1/events", &server.key)),
        _ => frame(DATA, 0, 1, &[]),
    })
    .await;
    // Windows by one byte, so that they do not overflow for long, for nothing that was sent; and one stream that is gone,
    // reset again and again.
    flooded(&server, |_| frame(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes())).await;
    flooded(&server, |index| match index {
        0 => frame(HEADERS, END_HEADERS | END_STREAM, 1, &get("/v1/webhooks", "")),
        _ => frame(RST_STREAM, 0, 1, &8_u32.to_be_bytes()),
    })
    .await;
    // A window that overflows.
    flooded(&server, |_| frame(WINDOW_UPDATE, 0, 0, &0x7fff_ffff_u32.to_be_bytes())).await;
    flooded(&server, |_| frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2])).await;
    assert_serves(server).await;
}

#[tokio::test]
async fn ten_thousand_streams_on_one_connection() {
    let (server, _database) = server(Limits::default()).await;
    let head = |index| frame(HEADERS, END_HEADERS, stream(index), &post("/v1/events", &server.key));
    let sent = flooded(&server, head).await;
    // 100 are open, 1,024 are refused; what was in the buffers of both sides comes on top.
    assert!(sent < 10_000, "{sent}");
    assert_serves(server).await;
}

/// Whoever has shown no key is read slowly, over both protocols, also when it does not wait for its answers.
#[tokio::test]
async fn calls_without_a_key() {
    let (server, _database) = server(Limits::default()).await;
    let at_least = Duration::from_millis(250);
    let started = clock::stopwatch();
    let mut client = connect(&server).await;
    for path in ["/nowhere", "/v1/webhooks"].repeat(40) {
        client.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
        assert!([404, 401].contains(&response(&mut client).await.0));
    }
    assert!(started.elapsed() >= at_least, "50 at once and 50 a second: {:?}", started.elapsed());

    // Each call is taken back when it has been begun, so that no hundred are ever under way.
    let (started, mut client) = (clock::stopwatch(), connect(&server).await);
    client.write_all(&opening(None)).await.unwrap();
    for index in 0..8 {
        let streams = || (10 * index..10 * (index + 1)).map(stream);
        let heads = streams().flat_map(|id| frame(HEADERS, END_HEADERS, id, &post("/v1/events", "")));
        let resets = streams().flat_map(|id| frame(RST_STREAM, 0, id, &8_u32.to_be_bytes()));
        client.write_all(&heads.collect::<Vec<_>>()).await.unwrap();
        client.write_all(&frame(PING, 0, 0, &[0; 8])).await.unwrap();
        while read_frame(&mut client).await.expect("the connection goes on").0 != PING {}
        client.write_all(&resets.collect::<Vec<_>>()).await.unwrap();
    }
    assert!(started.elapsed() >= at_least, "50 at once and 50 a second: {:?}", started.elapsed());

    // Bodies that nobody wants.
    let (started, mut client) = (clock::stopwatch(), connect(&server).await);
    for _ in 0..2 {
        client.write_all(b"POST /v1/events HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n\r\n").await.unwrap();
        client.write_all(&[b'x'; 900_000]).await.unwrap();
        assert_eq!(response(&mut client).await.0, 401);
    }
    assert!(started.elapsed() >= at_least, "800 KiB at once and 800 a second: {:?}", started.elapsed());
    drop(client);
    assert_serves(server).await;
}

#[tokio::test]
async fn heads_that_do_not_end() {
    let (server, _database) = server(Limits { head_time: SHORT, ..Limits::default() }).await;
    let half_a_head = frame(HEADERS, END_STREAM, 1, &get("/", ""));
    for beginning in [
        Vec::new(),
        b"PRI * HTT".to_vec(),
        b"GET / HTTP/1.1\r\nhost: x\r\n".to_vec(),
        b"\r\n\r\n\r\n".to_vec(),
        opening(None),
        [opening(None), half_a_head].concat(),
    ] {
        let what = String::from_utf8_lossy(&beginning).into_owned();
        let started = clock::stopwatch();
        let mut client = connect(&server).await;
        client.write_all(&beginning).await.unwrap();
        closed(&mut client).await;
        // Beside its own time, that of a polite end.
        assert!(started.elapsed() < Duration::from_secs(20), "{what:?}: {:?}", started.elapsed());
    }
    // Bytes that come now and then do not help.
    let (mut read, mut write) = connect(&server).await.into_split();
    let mut said = Vec::new();
    let drip = async {
        write.write_all(b"GET / HTTP/1.1\r\n").await?;
        loop {
            write.write_all(b"x: y\r\n").await?;
            tokio::time::sleep(SHORT / 20).await;
        }
    };
    tokio::select! {
        ended = drip => { let _: std::io::Result<()> = ended; }
        _ = soon("the end of the connection", read.read_to_end(&mut said)) => {}
    }
    assert_serves(server).await;
}

#[tokio::test]
async fn bodies_that_do_not_end() {
    let (server, _database) = server(Limits { body_time: SHORT, ..Limits::default() }).await;
    let key = &server.key;
    let mut client = connect(&server).await;
    let head = format!(
        "POST /v1/events HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{"
    );
    client.write_all(head.as_bytes()).await.unwrap();
    let said = String::from_utf8(closed(&mut client).await).unwrap();
    assert!(said.starts_with("HTTP/1.1 504") && said.contains("DEADLINE_EXCEEDED"), "{said}");

    let mut client = connect(&server).await;
    let head = frame(HEADERS, END_HEADERS, 1, &wire::grpc("/shortkit.webhooks.v1.DeliveryService/PublishEvent", key));
    let message = frame(DATA, 0, 1, &[0, 0, 0, 0, 100, 1]);
    client.write_all(&[opening(None), head, message].concat()).await.unwrap();
    loop {
        let (kind, flags, stream, _) = read_frame(&mut client).await.expect("an answer");
        if stream == 1 && kind == HEADERS && flags & END_STREAM != 0 {
            break;
        }
    }
    drop(client);
    assert_serves(server).await;
}

#[tokio::test]
async fn clients_that_never_read() {
    let (server, _database) = server(Limits { write_time: SHORT, ..Limits::default() }).await;
    // HTTP/1.1: requests in one go, until the server cannot answer any more. With a key, so that they are read.
    let client = connect(&server).await;
    let (read, mut write) = client.into_split();
    let request = format!("GET /v1/webhooks HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\r\n", server.key);
    let requests = request.repeat(1_000).into_bytes();
    let ended = soon("the end of the connection", async { while write.write_all(&requests).await.is_ok() {} });
    ended.await;
    drop(read);

    // HTTP/2: no room for one byte of the answer, while everything else goes on.
    let mut client = connect(&server).await;
    let head = frame(HEADERS, END_HEADERS | END_STREAM, 1, &get("/v1/webhooks", &server.key));
    client.write_all(&[opening(Some(0)), head].concat()).await.unwrap();
    loop {
        let (kind, _, stream, _) = read_frame(&mut client).await.expect("the connection goes on");
        assert_ne!((kind, stream), (GOAWAY, 0));
        if (kind, stream) == (RST_STREAM, 1) {
            break;
        }
    }
    client.write_all(&frame(PING, 0, 0, &[7; 8])).await.unwrap();
    loop {
        let (kind, _, _, payload) = read_frame(&mut client).await.expect("the connection goes on");
        if kind == PING && payload == [7; 8] {
            break;
        }
    }
    drop(client);
    assert_serves(server).await;
}

/// A peer that is gone without a word, while a stream is open for it and there is nothing to write.
#[tokio::test]
async fn peers_that_are_silent() {
    let (server, _database) = server(Limits { silent_time: SHORT, ping_time: SHORT, ..Limits::default() }).await;
    let mut client = connect(&server).await;
    let watch = wire::grpc("/shortkit.webhooks.v1.DeliveryService/WatchDeliveries", &server.key);
    let head = frame(HEADERS, END_HEADERS, 1, &watch);
    let message = frame(DATA, END_STREAM, 1, &[0; 5]);
    client.write_all(&[opening(None), head, message].concat()).await.unwrap();
    let started = clock::stopwatch();
    closed(&mut client).await;
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    assert_serves(server).await;
}

#[tokio::test]
async fn heads_that_are_too_large() {
    let (server, _database) = server(Limits::default()).await;
    let large = format!("GET / HTTP/1.1\r\nhost: x\r\nx-large: {}\r\n\r\n", "y".repeat(16 * 1024));
    let many = format!("GET / HTTP/1.1\r\nhost: x\r\n{}\r\n", "x: y\r\n".repeat(100));
    let target = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "y".repeat(17 * 1024));
    for (head, status) in [(large, "431"), (many, "431"), (target, "431")] {
        let mut client = connect(&server).await;
        client.write_all(head.as_bytes()).await.unwrap();
        let said = String::from_utf8(closed(&mut client).await).unwrap();
        assert!(said.starts_with(&format!("HTTP/1.1 {status}")), "{said}");
    }
    let fits = format!("GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-large: {}\r\n\r\n", "y".repeat(15 * 1024));
    let mut client = connect(&server).await;
    client.write_all(fits.as_bytes()).await.unwrap();
    assert!(closed(&mut client).await.starts_with(b"HTTP/1.1 404"));

    // A head without end is not kept.
    let (mut read, mut write) = connect(&server).await.into_split();
    let endless = async {
        write.write_all(b"GET / HTTP/1.1\r\nx: ").await?;
        loop {
            write.write_all(&[b'y'; 1024]).await?;
        }
    };
    let mut said = Vec::new();
    tokio::select! {
        ended = endless => { let _: std::io::Result<()> = ended; }
        _ = soon("the end of the connection", read.read_to_end(&mut said)) => {}
    }

    // HTTP/2: refused while it is a little too large, and the end of the connection when it is much too large.
    let mut client = connect(&server).await;
    let part = wire::literal("x-large", &"y".repeat(8 * 1024));
    let head = frame(HEADERS, END_STREAM, 1, &[get("/", ""), part.clone()].concat());
    let more = [frame(CONTINUATION, 0, 1, &part), frame(CONTINUATION, END_HEADERS, 1, &part)].concat();
    client.write_all(&[opening(None), head, more].concat()).await.unwrap();
    loop {
        let (kind, _, stream, payload) = read_frame(&mut client).await.expect("an answer");
        if (kind, stream) == (HEADERS, 1) {
            // As a literal, since 431 is not in the table of HPACK; three bytes in its Huffman code.
            assert_eq!(payload, [0x48, 0x83, 0x69, 0x90, 0xff], "431");
            break;
        }
    }
    drop(client);
    assert_serves(server).await;
}

#[tokio::test]
async fn connections_beyond_the_limit() {
    let (server, _database) = server(Limits { connections: 6, ..Limits::default() }).await;
    // One of three is the connection that made nothing yet.
    let mut open = vec![connect(&server).await, connect(&server).await, connect(&server).await];
    for client in &mut open {
        client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut first = [0; 12];
        soon("an answer", client.read_exact(&mut first)).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 404");
    }
    let mut fourth = connect(&server).await;
    let _ = fourth.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert_eq!(closed(&mut fourth).await, b"", "one address has at most half");
    let mut first = open.remove(0);
    first.shutdown().await.unwrap();
    closed(&mut first).await;
    assert_serves(server).await;
}

/// A stranger is refused before its body is read, and a body that is there already does not hide the answer.
#[tokio::test]
async fn bodies_without_a_key() {
    let (server, _database) = server(Limits::default()).await;
    let mut client = connect(&server).await;
    let head = frame(HEADERS, END_HEADERS, 1, &post("/v1/events", "sk_test_nobody"));
    client.write_all(&[opening(None), head].concat()).await.unwrap();
    loop {
        let (kind, _, stream, payload) = read_frame(&mut client).await.expect("an answer");
        if (kind, stream) == (HEADERS, 1) {
            assert_eq!(payload[..4], [0x48, 0x82, 0x68, 0x01], "401 in the Huffman code of HPACK");
            break;
        }
    }
    let mut client = connect(&server).await;
    for (headers, body) in [
        ("expect: 100-continue\r\ncontent-length: 900000", String::new()),
        // Announced and not sent: the answer does not wait for it as long as a good key's would.
        ("content-length: 900000", String::new()),
        ("content-length: 900000", "x".repeat(900_000)),
    ] {
        let mut client = connect(&server).await;
        let head = format!("POST /v1/events HTTP/1.1\r\nhost: x\r\n{headers}\r\n\r\n");
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(body.as_bytes()).await.unwrap();
        let mut first = [0; 12];
        soon("an answer", client.read_exact(&mut first)).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 401", "{headers}");
    }
    // What came too much is read for nothing, so that the connection goes on.
    for (path, status) in [("/v1/events", "401"), ("/nowhere", "404"), ("/v1/events", "401")] {
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n\r\n");
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(&[b'x'; 900_000]).await.unwrap();
        assert_eq!(response(&mut client).await.0.to_string(), status);
    }
    drop(client);
    assert_serves(server).await;
}

#[tokio::test]
async fn bodies_beyond_what_is_held() {
    let (mut server, _database) = server(Limits { body_bytes: 5 * 1024 * 1024, ..Limits::default() }).await;
    let body = format!(r#"{{"event":"content.ready","data":{{"a":"{}"}}}}"#, "x".repeat(700 * 1024));
    let mut slow = connect(&server).await;
    let head = frame(HEADERS, END_HEADERS, 1, &post("/v1/events", &server.key));
    slow.write_all(&[opening(None), head].concat()).await.unwrap();
    // As much as may be on its way at a time; what the server has read, it says by opening the window again.
    let (most, piece) = (65_535, 16 * 1024);
    let (mut sent, mut taken) = (0, 0);
    while body.len() - sent > piece {
        if sent + piece <= taken + most {
            slow.write_all(&frame(DATA, 0, 1, &body.as_bytes()[sent..sent + piece])).await.unwrap();
            sent += piece;
            continue;
        }
        let (kind, _, stream, payload) = read_frame(&mut slow).await.expect("the connection goes on");
        if (kind, stream) == (WINDOW_UPDATE, 1) {
            taken += u32::from_be_bytes(payload.try_into().unwrap()) as usize;
        }
    }
    // Of the 2.5 MiB of one address, an organization has no more than is free: one, and not two.
    let refused = server.post("/v1/events", &body).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (429, &Value::from("RATE_LIMITED")));
    assert!(refused.headers.contains_key("retry-after"));
    let data = format!(r#"{{"a":"{}"}}"#, "x".repeat(700 * 1024));
    let publish = grpc::proto::PublishEventRequest { event: "content.ready".to_owned(), data };
    let refused = server.deliveries().publish_event(publish).await.unwrap_err();
    let details = refused.get_error_details();
    assert_eq!((refused.code(), &*details.error_info().unwrap().reason), (Code::ResourceExhausted, "RATE_LIMITED"));
    assert!(details.retry_info().is_some());
    let theirs = server.new_key(Some("other"), KeyKind::Secret, Environment::Test).await;
    let own = std::mem::replace(&mut server.key, theirs);
    assert_eq!(server.post("/v1/events", &body).await.status, 202);
    server.key = own;
    slow.write_all(&frame(DATA, END_STREAM, 1, &body.as_bytes()[sent..])).await.unwrap();
    loop {
        let (kind, _, stream, payload) = read_frame(&mut slow).await.expect("an answer");
        if (kind, stream) == (HEADERS, 1) {
            assert_eq!(payload[..4], [0x48, 0x82, 0x10, 0x05], "202 in the Huffman code of HPACK");
            break;
        }
    }
    assert_eq!(server.post("/v1/events", &body).await.status, 202, "given back");
    drop(slow);
    assert_serves(server).await;
}

/// What reflection and health answer to whoever asks is never so long that room is counted for it: here there is none.
#[tokio::test]
async fn answers_without_a_key() {
    use prost::Message;
    use tonic_reflection::pb::v1::{ServerReflectionRequest, server_reflection_request::MessageRequest};

    let (server, _database) = server(Limits { body_bytes: 16 * 1024, ..Limits::default() }).await;
    let client = reqwest::Client::builder().no_proxy().http2_prior_knowledge().build().unwrap();
    let ask = async |path: &str, messages: &[Vec<u8>]| {
        let framed =
            |message: &Vec<u8>| [&[0], &u32::try_from(message.len()).unwrap().to_be_bytes()[..], message].concat();
        let body = messages.iter().flat_map(framed).collect::<Vec<u8>>();
        let request =
            client.post(format!("http://{}/{path}", server.address)).header("content-type", "application/grpc");
        let answer = request.body(body).send().await.unwrap();
        let status = answer.headers().get("grpc-status").cloned();
        (status, answer.bytes().await.expect("it is not cut off").len())
    };
    let pool = prost_reflect::DescriptorPool::decode(grpc::DESCRIPTORS).unwrap();
    for reflection in ["grpc.reflection.v1", "grpc.reflection.v1alpha"].map(|of| format!("{of}.ServerReflection")) {
        let path = format!("{reflection}/ServerReflectionInfo");
        for file in pool.files() {
            let of_host = |bytes: usize| {
                let message_request = Some(MessageRequest::FileByFilename(file.name().to_owned()));
                ServerReflectionRequest { host: "x".repeat(bytes), message_request }.encode_to_vec()
            };
            let room = 256 - of_host(0).len() - 3;
            let (most, more) = (of_host(room), of_host(room + 1));
            assert!(most.len() == 256 && more.len() == 257);
            let length = ask(&path, &[most]).await.1;
            assert!(length > 256 && length <= 16 * 1024, "{}: {length}", file.name());
            assert_eq!(ask(&path, &[more]).await.1, 0, "{}", file.name());
            let many = vec![of_host(0); 20];
            assert!(ask(&path, &many).await.1 > 0);
        }
    }
    let too_long = ask("grpc.health.v1.Health/Check", &[[vec![0x0a, 0xff, 0x01], vec![b'x'; 255]].concat()]).await;
    assert_eq!(too_long.0.unwrap(), "8", "RESOURCE_EXHAUSTED");
    assert_serves(server).await;
}

/// Long answers that nobody takes, plain and compressed: there is room for so many, and none for one more. Short ones go on.
#[tokio::test]
async fn answers_beyond_what_is_held() {
    let (server, _database) = server(Limits { body_bytes: 2 * 1024 * 1024, ..Limits::default() }).await;
    let receiver = Receiver::start().await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let body = format!(r#"{{"event":"content.ready","data":{{"a":"{}"}}}}"#, "x".repeat(300 * 1024));
    assert_eq!(server.post("/v1/events", &body).await.status, 202);
    let list = format!("/v1/webhooks/{id}/deliveries");
    for compressed in [false, true] {
        let mut slow = connect(&server).await;
        let encoding = if compressed { wire::literal("accept-encoding", "gzip") } else { Vec::new() };
        let head = [get(&list, &server.key), encoding].concat();
        slow.write_all(&opening(Some(0))).await.unwrap();
        // Of the 1 MiB of its address, an organization has no more than is free: one, and not two.
        for (index, refused) in [(0, false), (1, true)] {
            slow.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, stream(index), &head)).await.unwrap();
            let (mut begun, mut cut) = (false, false);
            while if refused { !cut } else { !begun } {
                let (kind, _, of, _) = read_frame(&mut slow).await.expect("the connection goes on");
                assert!(kind != DATA && (kind, of) != (RST_STREAM, stream(0)), "the first one waits");
                begun |= (kind, of) == (HEADERS, stream(index));
                cut |= (kind, of) == (RST_STREAM, stream(index));
            }
        }
        assert_eq!(server.get("/v1/webhooks").await.status, 200, "{compressed}");
        slow.write_all(&frame(RST_STREAM, 0, stream(0), &8_u32.to_be_bytes())).await.unwrap();
        slow.write_all(&frame(PING, 0, 0, &[0; 8])).await.unwrap();
        while read_frame(&mut slow).await.expect("the connection goes on").0 != PING {}
        assert!(server.get(&list).await.text.len() > 300 * 1024, "given back");
    }
    assert_serves(server).await;
}

#[tokio::test]
async fn connections_do_not_last_for_ever() {
    let old = Limits { age: SHORT, age_grace: SHORT, ..Limits::default() };
    // What is still under way when the grace is over is cut off.
    let (of_streams, _database) = server(old.clone()).await;
    let mut stream = of_streams.watch().await;
    assert!(soon("the end of the stream", stream.0.message()).await.is_err());
    assert_serves(of_streams).await;
    for limits in [old, Limits { idle_time: SHORT, head_time: SHORT, ..Limits::default() }] {
        let (server, _database) = server(limits).await;
        let mut client = connect(&server).await;
        let head = frame(HEADERS, END_HEADERS | END_STREAM, 1, &get("/v1/webhooks", &server.key));
        client.write_all(&[opening(None), head].concat()).await.unwrap();
        let (started, mut kinds) = (clock::stopwatch(), Vec::new());
        while let Some((kind, _, _, _)) = read_frame(&mut client).await {
            kinds.push(kind);
        }
        assert!(kinds.contains(&HEADERS) && kinds.contains(&GOAWAY), "served, then asked to leave: {kinds:?}");
        // Silence alone ends it too, but later.
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        assert_serves(server).await;
    }
}

#[tokio::test]
async fn json_as_deep_as_a_body_can_be() {
    let (server, _database) = server(Limits::default()).await;
    let deep = 500_000;
    for body in [
        "[".repeat(deep),
        r#"{"a":"#.repeat(100_000),
        format!(r#"{{"event":"content.ready","data":{}1{}}}"#, r#"{"a":"#.repeat(100_000), "}".repeat(100_000)),
        format!(r#"{{"event":"content.ready","data":{{"a":{}{}}}}}"#, "[".repeat(deep), "]".repeat(deep)),
        format!(r#"{{"event":"content.ready","unknown":{}{}}}"#, "[".repeat(deep), "]".repeat(deep)),
    ] {
        let answer = server.post("/v1/events", &body).await;
        assert_eq!(answer.status, 400, "{}", answer.text);
    }
    assert_serves(server).await;
}
