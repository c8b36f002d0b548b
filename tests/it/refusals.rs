//! What is published while the database is away is refused, however many do.

use std::time::Duration;

use futures_util::future::join_all;
use http::Method;
use shortkit_webhooks::{clock, config::Config, store::KeyKind, webhook::Environment};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

use crate::support::{Database, Kind, Receiver, TestServer, config};

/// A publish without a database is refused within this time.
const REFUSED: Duration = Duration::from_secs(5);
/// Publishes that wait at the same time: more than a commit has while several organisations write.
const PUBLISHERS: usize = 64;
const EVENT: &str = r#"{"event":"content.ready","data":{}}"#;

/// A way to the server at `address`, until told to end; then nobody listens any more.
async fn way_to(address: String, ends: watch::Receiver<bool>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let way = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let mut ended = ends.clone();
        let accept = async {
            loop {
                let (mut from, _) = listener.accept().await.unwrap();
                let (address, mut until) = (address.clone(), ends.clone());
                tokio::spawn(async move {
                    let mut to = TcpStream::connect(address).await.unwrap();
                    tokio::select! {
                        _ = copy_bidirectional(&mut from, &mut to) => {}
                        _ = until.wait_for(|ends| *ends) => {}
                    }
                });
            }
        };
        tokio::select! {
            () = accept => {}
            _ = ended.wait_for(|ended| *ended) => {}
        }
    });
    way
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_publishes_while_the_database_is_away_is_refused_in_time() {
    let database = Database::fresh(Kind::Postgres).await;
    let (address, name) = database.url["postgres://postgres@".len()..].split_once('/').unwrap();
    let (end, ends) = watch::channel(false);
    let way = way_to(address.to_owned(), ends).await;
    let config = Config { database_url: format!("postgres://postgres@{way}/{name}"), ..config(&database) };
    let receiver = Receiver::start().await;
    let server = TestServer::with(config).await;
    server.webhook(&receiver.url(), &["content.ready"]).await;
    let mut keys = Vec::new();
    for number in 0..PUBLISHERS {
        // Several of each of them: they take turns.
        let organization = format!("organization{}", number % 4);
        keys.push(server.new_key(Some(&organization), KeyKind::Secret, Environment::Test).await);
    }
    let publish = async |key: &String| {
        let request = server.anonymous(Method::POST, "/v1/events").bearer_auth(key);
        let began = clock::stopwatch();
        let answer = server.send(request.header("content-type", "application/json").body(EVENT)).await;
        (answer.status, began.elapsed())
    };
    let before = join_all(keys.iter().map(&publish)).await;
    assert!(before.iter().all(|(status, _)| *status == 202), "{before:?}");
    end.send_replace(true);
    let refused = join_all(keys.iter().map(&publish)).await;
    assert!(refused.iter().all(|(status, took)| *status == 503 && *took < REFUSED), "{refused:?}");
    server.stop().await;
}
