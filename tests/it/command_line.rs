//! The binary as a person runs it.

use std::{path::Path, process::Stdio};

use shortkit_webhooks::store::Store;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::Command,
};

use crate::support::{Database, FILED_CHANGES, Kind, PUBLISH_DRAFTS, Receiver, TestServer, on_both_databases, soon};

on_both_databases!(keys_from_making_to_revoking, an_upgrade_says_what_it_does);

/// The binary, about to run in `directory`.
pub(crate) fn binary(arguments: &[&str], directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shortkit-webhooks"));
    command.args(arguments).current_dir(directory).kill_on_drop(true);
    command
}

/// Exit code, standard output and standard error.
pub(crate) async fn run(mut command: Command, input: &str) -> (i32, String, String) {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // A command that does not read its input may be gone already.
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    let output = soon("the end", child.wait_with_output()).await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

async fn keys_from_making_to_revoking(database: Database) {
    let directory = tempfile::tempdir().unwrap();
    let keys = async |arguments: &[&str]| {
        let mut command = binary(&["keys"], directory.path());
        command.args(arguments).args(["--log", "error", "--database-url", &database.url]);
        run(command, "").await
    };
    let create = ["create", "--organization", "acme", "--environment", "live", "--expires-in", "90d"];
    let (code, key, notes) = keys(&create).await;
    assert_eq!(code, 0, "{notes}");
    assert!(key.starts_with("sk_live_") && key.lines().count() == 1, "{key}");
    let (_, json, _) = keys(&["create", "--environment", "test", "--kind", "service", "--json"]).await;
    let service: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(service["key"].as_str().unwrap().starts_with("svc_test_"));
    assert_eq!(service.get("organization"), None);

    let (_, list, _) = keys(&["list"]).await;
    assert_eq!(list.lines().count(), 3, "{list}");
    assert!(list.contains("acme") && list.contains("secret") && list.contains("active"), "{list}");
    assert!(!list.contains(key.trim()), "never the key");
    let id = service["id"].as_str().unwrap();
    assert_eq!(keys(&["revoke", id]).await.0, 0);
    let (_, list, _) = keys(&["list", "--json"]).await;
    let states: Vec<serde_json::Value> = list.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let state = |id: &str| states.iter().find(|key| key["id"] == id).unwrap()["state"].clone();
    assert_eq!(state(id), "revoked");
    let (code, _, error) = keys(&["revoke", "key_none"]).await;
    assert!(code == 1 && error.contains("key_none"), "{error}");
    assert_eq!(keys(&["create", "--environment", "test"]).await.0, 2, "whose?");
    let for_ever = ["create", "--organization", "acme", "--environment", "test", "--expires-in", "9000years"];
    assert_eq!(keys(&for_ever).await.0, 2, "no time can say when");
}

async fn an_upgrade_says_what_it_does(database: Database) {
    let directory = tempfile::tempdir().unwrap();
    let command = async |arguments: &[&str]| {
        let mut command = binary(arguments, directory.path());
        command.args(["--database-url", &database.url]);
        run(command, "").await
    };
    let (code, _, notes) = command(&["migrate"]).await;
    assert_eq!((code, notes.as_str()), (0, "the schema is up to date\n"), "a new database has no upgrade");
    database.undo_publish_drafts().await;
    database.undo_filed_changes().await;
    if database.url.starts_with("sqlite:") {
        // Other nodes may serve a PostgreSQL, whoever knows their versions.
        let serving = Store::connect(&database.url).await.unwrap();
        serving.take_exclusively().unwrap();
        let (code, _, error) = command(&["migrate"]).await;
        assert!(code == 1 && error.contains("another process"), "{error}");
    }
    let (code, _, error) = command(&["keys", "list"]).await;
    assert!(code == 1 && error.contains(PUBLISH_DRAFTS) && error.contains("shortkit-webhooks migrate"), "{error}");
    let (code, _, notes) = command(&["migrate"]).await;
    assert_eq!(code, 0, "{notes}");
    for migration in [PUBLISH_DRAFTS, FILED_CHANGES] {
        let said = |words: &str| notes.lines().any(|line| line.contains(migration) && line.contains(words));
        assert!(said("bringing the schema up to date") && said("the migration is done"), "{notes}");
    }
    assert_eq!(command(&["migrate"]).await.2, "the schema is up to date\n");
    assert_eq!(command(&["keys", "list"]).await.0, 0);

    database.execute("INSERT INTO seaql_migrations (version, applied_at) VALUES ('m9999_later', 1)").await;
    let (code, _, error) = command(&["keys", "list"]).await;
    assert!(code == 1 && error.contains("m9999_later") && error.contains("a later version"), "{error}");
}

#[tokio::test]
async fn exit_codes_say_what_was_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let code = async |arguments: &[&str]| run(binary(arguments, directory.path()), "").await;
    assert_eq!(code(&["serve", "--nope"]).await.0, 2);
    assert_eq!(code(&[]).await.0, 2);
    let (exit, _, error) = code(&["serve", "--listen", "x", "--retry-schedule", "soon"]).await;
    assert_eq!(exit, 64);
    assert!(error.contains("listen:") && error.contains("retry-schedule:"), "all faults: {error}");
    let (exit, _, error) = code(&["migrate", "--database-url", "postgres://nobody@127.0.0.1:1/none"]).await;
    assert!(exit == 1 && error.contains("--database-url"), "says what to do: {error}");
    let (exit, _, error) = code(&["migrate", "--database-url", "sqlite://none/here.db?mode=rwc"]).await;
    assert!(exit == 1 && error.contains("--database-url"), "says what to do: {error}");
    let database = Database::fresh(Kind::Postgres).await;
    let (exit, _, error) = code(&["migrate", "--database-url", &format!("{}_not", database.url)]).await;
    assert!(exit == 1 && error.contains("createdb"), "says what to do: {error}");
    let (exit, out, _) = code(&["serve", "--help"]).await;
    assert!(exit == 0 && out.contains("SHORTKIT_RETRY_SCHEDULE"));
    assert_eq!(code(&["migrate", "--log", "error"]).await.0, 0);
    assert!(directory.path().join("shortkit.db").exists());
}

#[tokio::test]
async fn a_sqlite_database_is_served_once() {
    let directory = tempfile::tempdir().unwrap();
    let serve = ["serve", "--dev", "--log", "error", "--listen", "127.0.0.1:0", "--internal-listen", "127.0.0.1:0"];
    let mut first = binary(&serve, directory.path()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(first.stdout.take().unwrap()).lines();
    for begins in ["listening on http://127.0.0.1:", "internal port on http://127.0.0.1:"] {
        let line = soon("a line", lines.next_line()).await.unwrap().unwrap();
        assert!(line.starts_with(begins), "{line}");
    }
    let (code, out, error) = run(binary(&serve, directory.path()), "").await;
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(error.contains("another process"), "{error}");
    first.start_kill().unwrap();
    first.wait().await.unwrap();
}

/// Keys of a version whose keys had no checksum are replaced, and those of the last start are not.
#[tokio::test]
async fn development_keys_work_at_every_start() {
    let directory = tempfile::tempdir().unwrap();
    let old = "sk_test_0123456789abcdef0123456789abcdef0123456789a";
    let kept = format!(r#"{{"secret":"{old}","service":"{old}"}}"#);
    std::fs::write(directory.path().join("shortkit.db.dev-keys.json"), kept).unwrap();
    let mut printed = Vec::new();
    for _ in 0..2 {
        let serve = ["serve", "--dev", "--log", "error", "--listen", "127.0.0.1:0"];
        let mut server = binary(&serve, directory.path()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
        let origin = soon("a line", lines.next_line()).await.unwrap().unwrap().replace("listening on ", "");
        let key = loop {
            let line = soon("a line", lines.next_line()).await.unwrap().unwrap();
            if let Some(rest) = line.trim().strip_prefix("secret key") {
                break rest.split_whitespace().next().unwrap().to_owned();
            }
        };
        let _ = rustls::crypto::ring::default_provider().install_default();
        let list = reqwest::Client::builder().no_proxy().build().unwrap().get(format!("{origin}/v1/webhooks"));
        assert_eq!(soon("an answer", list.bearer_auth(&key).send()).await.unwrap().status(), 200, "{key}");
        printed.push(key);
        server.start_kill().unwrap();
        server.wait().await.unwrap();
    }
    assert!(printed[0] == printed[1] && printed[0] != old, "{printed:?}");
}

/// What `--dev` prints works when pasted into a shell.
#[tokio::test]
async fn the_lines_of_development_mode_work() {
    let directory = tempfile::tempdir().unwrap();
    let serve = ["serve", "--dev", "--log", "error", "--listen", "127.0.0.1:0"];
    let mut server = binary(&serve, directory.path()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    let receiver = Receiver::start().await;
    let mut curls = Vec::new();
    loop {
        let line = soon("a line", lines.next_line()).await.unwrap().unwrap();
        if line.trim().starts_with("curl ") {
            curls.push(line.trim().replace("localhost:9000", &receiver.address.to_string()));
        }
        if line.contains("WatchDeliveries") {
            break;
        }
    }
    assert_eq!(curls.len(), 3);
    for curl in curls {
        let mut shell = Command::new("sh");
        shell.args(["-c", &curl.replacen("curl ", "curl -sS --fail-with-body ", 1)]);
        let (code, out, error) = run(shell, "").await;
        assert_eq!(code, 0, "{curl}\n{out}{error}");
        assert!(out.starts_with(r#"{"data":"#), "{out}");
    }
    let got = receiver.wait_for(1).await.remove(0);
    assert!(got.body.contains(r#""duration":45.2"#));
    server.start_kill().unwrap();
    server.wait().await.unwrap();
}

#[tokio::test]
async fn listen_verifies_and_prints() {
    let directory = tempfile::tempdir().unwrap();
    let server = TestServer::on_sqlite().await;
    let mut listener = binary(&["listen", "--port", "0"], directory.path()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(listener.stdout.take().unwrap()).lines();
    let url = soon("a line", lines.next_line()).await.unwrap().unwrap().replace("listening on ", "");
    let (id, secret) = server.webhook(&url, &["content.ready"]).await;
    listener.start_kill().unwrap();
    listener.wait().await.unwrap();

    let port = url.rsplit(':').next().unwrap();
    for (secret, status, word) in [(secret.as_str(), "202", "verified"), ("whsec_AAAA", "202", "NOT VERIFIED")] {
        let arguments = ["listen", "--port", port, "--secret", secret, "--status", status];
        let mut listener = binary(&arguments, directory.path()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(listener.stdout.take().unwrap()).lines();
        let mut next = async || soon("a line", lines.next_line()).await.unwrap().unwrap();
        assert!(next().await.starts_with("listening on"));
        let test = server.post(&format!("/v1/webhooks/{id}/test"), "{}").await.data();
        assert_eq!(test["statusCode"], if word == "verified" { 202 } else { 401 });
        next().await;
        let line = next().await;
        assert!(line.contains(&format!("X-Shortform-Signature {word}")), "{line}");
        assert!(line.contains(&format!("webhook-signature {word}")), "{line}");
        listener.start_kill().unwrap();
        listener.wait().await.unwrap();
    }
    server.stop().await;
}

#[tokio::test]
async fn publish_and_watch() {
    let directory = tempfile::tempdir().unwrap();
    let server = TestServer::on_sqlite().await;
    let receiver = Receiver::start().await;
    let (id, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let address = format!("http://{}", server.address);
    let client = |arguments: &[&str]| {
        let mut command = binary(arguments, directory.path());
        command.env("SHORTKIT_SERVER", &address).env("SHORTKIT_KEY", &server.key);
        command
    };
    let token = {
        let mut watch = server.watch().await;
        server.publish("content.ready", "{}").await;
        watch.next().await.resume_token
    };
    let mut watch = client(&["watch", "--webhook", &id, "--resume", &token]);
    // Bound to the filter that got it: the stream above watched every webhook.
    let (code, _, error) = run(watch, "").await;
    assert!(code == 1 && error.contains("resume token"), "{error}");
    watch = client(&["watch", "--resume", &token]);
    let mut watch = watch.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();

    let (code, out, error) = run(client(&["publish", "content.ready", "--data", r#"{"n":1}"#]), "").await;
    assert!(code == 0 && out.starts_with("evt_") && error.contains("deliveries made: 1"), "{out}{error}");
    let (code, _, error) = run(client(&["publish", "content.ready"]), "{\"n\":2}\n\nnope\n{\"n\":3}\n").await;
    assert_eq!(code, 1);
    assert!(error.contains("line 3: ") && error.contains("2 events published, 2 deliveries"), "{error}");
    let folder = std::fs::File::open(directory.path()).unwrap();
    let ended = client(&["publish", "content.ready"]).stdin(folder).stderr(Stdio::null()).status();
    assert!(!soon("the end of a faulty input", ended).await.unwrap().success());
    receiver.wait_for(4).await;
    let mut successes = 0;
    while successes < 4 {
        let line = soon("a line", lines.next_line()).await.unwrap().unwrap();
        assert!(line.contains(&id), "{line}");
        successes += usize::from(line.contains("success"));
    }
    watch.start_kill().unwrap();
    watch.wait().await.unwrap();
    server.stop().await;
}
