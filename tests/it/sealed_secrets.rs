//! Signing secrets are encrypted in the database, and the master key can be replaced while the service runs.

use std::{fs, path::Path, sync::Arc};

use futures_util::future::join_all;
use serde_json::json;
use shortkit_webhooks::{
    config::Config,
    grpc::proto::DeliveryStatus,
    store::{self, Store},
    vault::Vault,
    webhook::{Secret, SigningKey, verify_shortform},
};

use crate::{
    command_line::{binary, run},
    support::{Database, MASTER_KEY, Received, Receiver, TestServer, config, on_both_databases, soon},
};

on_both_databases!(
    secrets_from_before_are_encrypted_at_the_first_start,
    secrets_that_were_moved_do_not_sign,
    what_cannot_be_signed_fails_where_it_is_seen,
    a_missing_master_key_is_named_at_the_start,
    a_master_key_is_replaced_under_way,
    a_replacement_that_was_ended_goes_on,
);

fn signed_with(secret: &str, got: &Received) -> bool {
    let key = SigningKey::new(&Secret::parse(secret).unwrap());
    verify_shortform(&key, got.header("x-shortform-signature"), got.body.as_bytes()).is_ok()
}

fn has(contents: &[u8], needle: &str) -> bool {
    contents.windows(needle.len()).any(|window| window == needle.as_bytes())
}

fn vault(keys: &[&str]) -> Vault {
    Vault::parse(&keys.join("\n")).unwrap()
}

async fn master_keys(database: &Database) -> Vec<Option<String>> {
    let rows = database.rows("SELECT master_key_id FROM webhooks ORDER BY id").await;
    rows.iter().map(|row| row.try_get_by_index(0).unwrap()).collect()
}

/// The current and the previous secret of a webhook from before there were master keys.
fn plain_secrets(number: u8) -> [Secret; 2] {
    [0, 1].map(|which| {
        let mut bytes = [number; 32];
        bytes[0] = which;
        Secret::from_random(&bytes)
    })
}

async fn insert_plain(database: &Database, count: u8, url: &str) {
    let webhook = |number: u8| {
        let [secret, previous] = plain_secrets(number);
        format!(
            "('whk_{number:03}','acme','test','{url}','[\"content.ready\"]','active','{}','{}',9999999999999,1)",
            secret.expose(),
            previous.expose()
        )
    };
    let subscription = |number: u8| format!("('acme','test','content.ready','whk_{number:03}')");
    let rows = |row: &dyn Fn(u8) -> String| (0..count).map(row).collect::<Vec<_>>().join(",");
    let columns = "id, organization, environment, url, events, status, secret, previous_secret, \
                   previous_secret_expires_at_ms, created_at_ms";
    database.execute(&format!("INSERT INTO webhooks ({columns}) VALUES {}", rows(&webhook))).await;
    let columns = "organization, environment, event_type, webhook_id";
    database.execute(&format!("INSERT INTO subscriptions ({columns}) VALUES {}", rows(&subscription))).await;
}

async fn secrets_from_before_are_encrypted_at_the_first_start(database: Database) {
    let receiver = Receiver::start().await;
    Store::connect(&database.url).await.unwrap().migrate().await.unwrap();
    insert_plain(&database, 2, &receiver.url()).await;
    let [secret, previous] = plain_secrets(1);
    assert!(has(&database.contents().await, secret.expose()) && has(&database.contents().await, previous.expose()));

    let server = TestServer::start(&database).await;
    assert_eq!(server.publish("content.ready", "{}").await, 2);
    let got = receiver.wait_for(2).await;
    for number in 0..2 {
        let of = |got: &&Received| got.header("x-shortform-webhook-id") == format!("whk_{number:03}");
        let got = got.iter().find(of).unwrap();
        for secret in plain_secrets(number) {
            assert!(signed_with(secret.expose(), got), "{number}");
        }
    }
    server.stop().await;
    let contents = database.contents().await;
    assert!(!has(&contents, secret.expose()) && !has(&contents, previous.expose()));
}

async fn secrets_that_were_moved_do_not_sign(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (mine, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let (other, _) = server.webhook(&receiver.url(), &["content.errored"]).await;
    let copied = "UPDATE webhooks SET secret = (SELECT o.secret FROM webhooks o WHERE o.id =";
    assert_eq!(database.execute(&format!("{copied} '{other}') WHERE id = '{mine}'")).await, 1);
    let error = |result: Result<_, store::Error>| result.err().unwrap().to_string();
    // Asked together, they are read together; each is answered for itself.
    let ids: [Arc<str>; 3] = [&mine, &other, "whk_none"].map(Into::into);
    let asked = (0..300).map(|index| server.store.target(&ids[index % ids.len()]));
    for (index, answer) in join_all(asked).await.into_iter().enumerate() {
        match index % ids.len() {
            0 => assert!(error(answer).contains("does not open")),
            1 => assert!(answer.unwrap().is_some_and(|target| target.webhook_id == other)),
            _ => assert!(answer.unwrap().is_none()),
        }
    }

    // Nor does one that was put there in plain text.
    let [planted, _] = plain_secrets(7);
    let sql = format!("UPDATE webhooks SET secret = '{}', master_key_id = NULL WHERE id = '{mine}'", planted.expose());
    assert_eq!(database.execute(&sql).await, 1);
    assert!(error(server.store.target(&mine.as_str().into()).await).contains("not sealed"));
    server.stop().await;
}

async fn what_cannot_be_signed_fails_where_it_is_seen(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::start().await;
    let (damaged, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let (unknown, _) = server.webhook(&receiver.url(), &["content.ready"]).await;
    for change in [
        format!("secret = 'AAAA' WHERE id = '{damaged}'"),
        // As where the new one of a replacement has not come to this node.
        format!("master_key_id = 'ffffffffffffffff' WHERE id = '{unknown}'"),
    ] {
        assert_eq!(database.execute(&format!("UPDATE webhooks SET {change}")).await, 1);
    }
    let mut watch = server.watch().await;
    assert_eq!(server.publish("content.ready", "{}").await, 2);
    const REASON: &str = "Signing secret cannot be read";
    for change in watch.until(2, |change| change.status() == DeliveryStatus::Failed).await {
        assert_eq!((change.attempts, change.last_error.as_deref()), (6, Some(REASON)));
    }
    for id in [damaged, unknown] {
        let test = server.post(&format!("/v1/webhooks/{id}/test"), "{}").await.data();
        assert_eq!((&test["status"], &test["lastError"]), (&json!("failed"), &json!(REASON)));
    }
    assert!(receiver.received().is_empty());
    server.stop().await;
}

async fn a_missing_master_key_is_named_at_the_start(database: Database) {
    let server = TestServer::start(&database).await;
    server.webhook("https://example.com/", &["content.ready"]).await;
    server.stop().await;
    let directory = tempfile::tempdir().unwrap();
    let serve = async |key: Option<&str>| {
        let arguments = ["serve", "--listen", "127.0.0.1:0", "--log", "error", "--database-url", &database.url];
        let mut command = binary(&arguments, directory.path());
        key.map(|key| command.env("SHORTKIT_MASTER_KEY", key));
        run(command, "").await
    };
    let (code, out, error) = serve(None).await;
    assert_eq!((code, out.as_str()), (64, ""), "{error}");
    let way = error.lines().find(|line| line.contains("openssl")).unwrap().trim();
    let mut shell = tokio::process::Command::new("sh");
    shell.args(["-c", &format!("{way} && ls -l shortkit.master-key")]).current_dir(directory.path());
    let (code, listing, _) = run(shell, "").await;
    assert!(code == 0 && listing.starts_with("-rw-------"), "the way that is told works: {listing}");

    let other = fs::read_to_string(directory.path().join("shortkit.master-key")).unwrap();
    let (code, out, error) = serve(Some(&other)).await;
    assert_eq!((code, out.as_str()), (1, ""), "{error}");
    assert!(error.contains(vault(&[MASTER_KEY]).current()) && error.contains(vault(&[&other]).current()), "{error}");
    assert!(!error.contains(other.trim()), "{error}");
}

async fn rotate_master(database: &Database, file: &Path) -> (i32, String, String) {
    let mut command = binary(&["keys", "rotate-master", "--log", "error"], file.parent().unwrap());
    command.args(["--database-url", &database.url, "--master-key-file", file.to_str().unwrap()]);
    run(command, "").await
}

async fn a_master_key_is_replaced_under_way(database: Database) {
    let new = Vault::new_master_key();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("master-keys");
    fs::write(&file, MASTER_KEY).unwrap();
    let watched =
        |keys: &[&str]| Config { vault: Some(vault(keys)), master_key_file: Some(file.clone()), ..config(&database) };
    let server = TestServer::with(watched(&[MASTER_KEY])).await;
    let receiver = Receiver::start().await;
    let (id, first) = server.webhook(&receiver.url(), &["content.ready"]).await;
    let path = format!("/v1/webhooks/{id}/rotate-secret");
    let second = server.post(&path, "{}").await.data()["secret"].as_str().unwrap().to_owned();
    let (unchanged, _) = server.webhook(&receiver.url(), &["content.errored"]).await;

    // A file without a key that is in use changes nothing; the whole one is taken as soon as it is there.
    fs::write(&file, &*new).unwrap();
    fs::write(&file, format!("{}\n{MASTER_KEY}\n", *new)).unwrap();
    let (current, old) = (vault(&[&new]).current().to_owned(), vault(&[MASTER_KEY]).current().to_owned());
    let taken = async {
        loop {
            let (id, _) = server.webhook(&receiver.url(), &["content.errored"]).await;
            let sql = format!("SELECT master_key_id FROM webhooks WHERE id = '{id}'");
            if database.rows(&sql).await[0].try_get_by_index::<String>(0).unwrap() == current {
                break;
            }
        }
    };
    soon("that the new master key is taken", taken).await;
    assert!(master_keys(&database).await.contains(&Some(old)));
    let (code, _, notes) = rotate_master(&database, &file).await;
    assert_eq!(code, 0, "{notes}");
    assert!(notes.contains(&current), "{notes}");
    assert!(master_keys(&database).await.iter().all(|id| *id == Some(current.clone())));

    // Signed with both secrets, before and after a restart with the new master key alone.
    server.publish("content.ready", "{}").await;
    let got = receiver.wait_for(1).await.remove(0);
    assert!(signed_with(&first, &got) && signed_with(&second, &got));
    server.stop().await;
    fs::write(&file, &*new).unwrap();
    let server = TestServer::with(watched(&[&new])).await;
    server.publish("content.ready", "{}").await;
    let got = receiver.wait_for(2).await.remove(1);
    assert!(signed_with(&first, &got) && signed_with(&second, &got));
    assert!(server.store.target(&unchanged.as_str().into()).await.is_ok());
    server.stop().await;
    let (code, _, notes) = rotate_master(&database, &file).await;
    assert!(code == 0 && notes.contains("0 of 0"), "nothing is left to do: {notes}");
}

async fn a_replacement_that_was_ended_goes_on(database: Database) {
    let store = Store::connect(&database.url).await.unwrap();
    store.migrate().await.unwrap();
    insert_plain(&database, 250, "https://example.com/").await;
    assert_eq!(store.unlock(vault(&[MASTER_KEY])).await.unwrap(), 250);
    assert_eq!(store.unlock(vault(&[MASTER_KEY])).await.unwrap(), 0);
    let new = Vault::new_master_key();
    let refused = store.unlock(vault(&[&new])).await.unwrap_err();
    assert!(matches!(refused, store::Error::MissingMasterKey { .. }), "{refused}");
    store.unlock(vault(&[&new, MASTER_KEY])).await.unwrap();
    database.execute("UPDATE webhooks SET secret = previous_secret WHERE id = 'whk_120'").await;

    let mut first_step = None;
    let panics = std::panic::AssertUnwindSafe(store.reseal_secrets(|so_far| {
        first_step = Some(so_far.done);
        panic!("the process ends here");
    }));
    assert!(futures_util::FutureExt::catch_unwind(panics).await.is_err());
    assert_eq!(first_step, Some(100));
    let resealed = store.reseal_secrets(|_| ()).await.unwrap();
    assert_eq!((resealed.total, resealed.done), (150, 149));
    assert_eq!(resealed.damaged, ["whk_120"], "the damaged one is named and holds up nothing");
    assert_eq!(store.reseal_secrets(|_| ()).await.unwrap().damaged, ["whk_120"]);
}
