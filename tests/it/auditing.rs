//! Every change that somebody asked for leaves an entry that stays.

use std::collections::BTreeSet;

use http::Method;
use serde_json::{Value, json};
use shortkit_webhooks::{
    grpc::proto::{
        AuditAction, CreateWebhookRequest, ListAuditEntriesRequest, audit_service_client::AuditServiceClient,
    },
    store::{KeyKind, NewKey},
    vault::Vault,
    webhook::Environment,
};
use tonic::{Code, Request};

use crate::{
    command_line::{binary, run},
    support::{Bearer, Database, MASTER_KEY, Receiver, Reply, TestServer, on_both_databases, soon},
};

on_both_databases!(
    every_change_is_recorded_with_who_and_why,
    a_change_that_failed_is_not_recorded,
    pages_and_filters_agree,
    nobody_sees_what_another_tenant_did,
    entries_can_only_be_added,
    the_command_line_lists_what_all_did,
);

async fn entries(server: &TestServer, query: &str) -> Vec<Value> {
    server.get(&format!("/v1/audit?limit=100{query}")).await.data().as_array().unwrap().clone()
}

/// The only key of the server's own tenant.
async fn own_key(server: &TestServer) -> String {
    server.store.list_keys().await.unwrap().last().unwrap().id.clone()
}

async fn every_change_is_recorded_with_who_and_why(database: Database) {
    let server = TestServer::start(&database).await;
    let receiver = Receiver::scripted(|_, _| Reply::status(500)).await;
    let key = own_key(&server).await;
    let mut wanted = Vec::new();
    let mut did = |action: &str, resource: &str, answer: &crate::support::Answer| {
        answer.data();
        let request = answer.headers["x-request-id"].to_str().unwrap().to_owned();
        wanted.push((action.to_owned(), resource.to_owned(), request));
    };
    let new = json!({ "url": receiver.url(), "events": ["content.ready"] }).to_string();
    let made = server.post("/v1/webhooks", &new).await;
    let id = made.data()["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/webhooks/{id}");
    did("webhook_created", &id, &made);
    did("webhook_updated", &id, &server.patch(&path, r#"{"status":"active","description":"whsec_hidden"}"#).await);
    did("secret_rotated", &id, &server.post(&format!("{path}/rotate-secret"), "{}").await);
    let test = server.post(&format!("{path}/test"), "{}").await.data();
    let delivery = test["deliveryId"].as_str().unwrap();
    did("delivery_retried", delivery, &server.post(&format!("{path}/deliveries/{delivery}/retry"), "{}").await);
    did("webhook_deleted", &id, &server.delete(&path).await);

    let listed = entries(&server, "").await;
    let (changes, made_key) = listed.split_at(5);
    for (entry, (action, resource, request)) in changes.iter().zip(wanted.into_iter().rev()) {
        assert!(
            entry["id"].as_str().unwrap().starts_with("aud_") && entry["occurredAt"].as_str().unwrap().ends_with('Z')
        );
        assert_eq!(entry["action"], action);
        assert_eq!(entry["actor"], key, "{action}");
        assert_eq!(entry["resourceId"], resource, "{action}");
        assert_eq!(entry["webhookId"], id, "{action}");
        assert_eq!(entry["requestId"], request, "{action}");
        let changed = if action == "webhook_updated" { json!(["description", "status"]) } else { Value::Null };
        assert_eq!(entry.get("changedFields").cloned().unwrap_or_default(), changed, "names, and never values");
    }
    assert_eq!(made_key.len(), 1, "{made_key:?}");
    assert_eq!((&made_key[0]["action"], &made_key[0]["actor"]), (&json!("key_created"), &json!("cli")));
    assert_eq!(made_key[0]["resourceId"], key);
    assert_eq!(made_key[0].get("requestId"), None);

    // What a service key does for the tenant is the tenant's to see, over gRPC too.
    let service = server.new_key(None, KeyKind::Service, Environment::Test).await;
    let mut request = Request::new(CreateWebhookRequest {
        url: receiver.url(),
        events: vec!["content.ready".to_owned()],
        description: None,
    });
    request.metadata_mut().insert("authorization", format!("Bearer {service}").parse().unwrap());
    request.metadata_mut().insert("x-shortkit-organization", "acme".parse().unwrap());
    let mut client =
        shortkit_webhooks::grpc::proto::webhook_service_client::WebhookServiceClient::new(server.channel());
    client.create_webhook(request).await.unwrap();
    let service = server.store.list_keys().await.unwrap().remove(0);
    assert_eq!(entries(&server, "&action=webhook_created").await[0]["actor"], service.id);
    assert!(server.store.revoke_key(&service.id).await.unwrap() && server.store.revoke_key(&service.id).await.unwrap());
    assert_eq!(entries(&server, "&action=key_revoked").await, Vec::<Value>::new(), "a service key is no tenant's");
    server.stop().await;
    let rows = database.rows("SELECT resource_id FROM audit WHERE action = 'key_revoked'").await;
    assert_eq!(rows.len(), 1, "revoked once, however often it is asked for");
}

async fn a_change_that_failed_is_not_recorded(database: Database) {
    let server = TestServer::start(&database).await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    let before = entries(&server, "").await;
    for (method, path, body) in [
        (Method::POST, "/v1/webhooks".to_owned(), r#"{"url":"https://10.0.0.1/","events":["content.ready"]}"#),
        (Method::PATCH, format!("/v1/webhooks/{id}"), "{}"),
        (Method::PATCH, "/v1/webhooks/whk_none".to_owned(), r#"{"status":"active"}"#),
        (Method::POST, "/v1/webhooks/whk_none/rotate-secret".to_owned(), "{}"),
        (Method::POST, format!("/v1/webhooks/{id}/deliveries/del_none/retry"), "{}"),
        (Method::DELETE, "/v1/webhooks/whk_none".to_owned(), ""),
    ] {
        let answer = server.call(method, &path, body).await;
        assert!(answer.status == 400 || answer.status == 404, "{} {}", answer.status, answer.text);
    }
    assert_eq!(entries(&server, "").await, before);

    // Nor is a change made that cannot be recorded: both are one transaction.
    database.execute("ALTER TABLE audit RENAME TO gone").await;
    assert_eq!(server.delete(&format!("/v1/webhooks/{id}")).await.status, 500);
    assert_eq!(server.patch(&format!("/v1/webhooks/{id}"), r#"{"status":"disabled"}"#).await.status, 500);
    assert_eq!(server.get(&format!("/v1/webhooks/{id}")).await.data()["status"], "active");
    server.stop().await;
}

async fn pages_and_filters_agree(database: Database) {
    let server = TestServer::start(&database).await;
    let mut webhooks = Vec::new();
    for _ in 0..3 {
        webhooks.push(server.webhook("https://example.com/", &["content.ready"]).await.0);
    }
    for _ in 0..4 {
        server.post(&format!("/v1/webhooks/{}/rotate-secret", webhooks[1]), "{}").await.data();
    }
    let of_one = format!("&webhookId={}", webhooks[1]);
    let filters = [("", 8), ("&action=secret_rotated", 4), (of_one.as_str(), 5), ("&webhookId=whk_none", 0)];
    for (filter, count) in filters {
        let all = entries(&server, filter).await;
        assert_eq!(all.len(), count, "{filter}");
        let (mut paged, mut cursor) = (Vec::new(), String::new());
        loop {
            let answer = server.get(&format!("/v1/audit?limit=2{filter}{cursor}")).await;
            paged.extend(answer.data().as_array().unwrap().clone());
            let meta = &answer.json()["meta"];
            if cursor.is_empty() {
                assert_eq!(meta["total"], count, "{filter}");
                // What happens from here on moves no page.
                server.patch(&format!("/v1/webhooks/{}", webhooks[0]), r#"{"status":"active"}"#).await.data();
            }
            match meta["nextCursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        assert_eq!(paged, all, "{filter}");
    }
    for wrong in ["limit=0", "limit=101", "action=nothing", "webhookId=%00", "cursor=x", "actor=cli"] {
        let answer = server.get(&format!("/v1/audit?{wrong}")).await;
        assert_eq!(
            (answer.status, answer.json()["error"]["code"].as_str().unwrap()),
            (400, "INVALID_PARAMETER"),
            "{wrong}"
        );
    }
    assert_eq!(server.post("/v1/audit", "{}").await.status, 405);
    server.stop().await;
}

async fn nobody_sees_what_another_tenant_did(database: Database) {
    let mut server = TestServer::start(&database).await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    let own = server.key.clone();
    for (organization, environment) in [("other", Environment::Test), ("acme", Environment::Live)] {
        server.key = server.new_key(Some(organization), KeyKind::Secret, environment).await;
        let seen = entries(&server, "").await;
        assert_eq!(seen.len(), 1, "its own key: {seen:?}");
        assert_eq!(entries(&server, &format!("&webhookId={id}")).await, Vec::<Value>::new());
    }
    server.key = own;
    assert_eq!(entries(&server, "").await.len(), 2);
    let publishable = server.new_key(Some("acme"), KeyKind::Publishable, Environment::Test).await;
    let mut client = AuditServiceClient::with_interceptor(server.channel(), Bearer(publishable));
    let refused = client.list_audit_entries(ListAuditEntriesRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let mut client = AuditServiceClient::with_interceptor(server.channel(), Bearer(server.key.clone()));
    let request = ListAuditEntriesRequest { action: Some(AuditAction::KeyCreated.into()), ..Default::default() };
    let answer = client.list_audit_entries(request).await.unwrap().into_inner();
    assert_eq!((answer.total, answer.entries.len()), (2, 2));
    server.stop().await;
}

async fn entries_can_only_be_added(database: Database) {
    let server = TestServer::start(&database).await;
    server.webhook("https://example.com/", &["content.ready"]).await;
    let before = entries(&server, "").await;
    let id = before[0]["id"].as_str().unwrap();
    let connection = database.open().await;
    let columns = "id, action, actor, resource_id, changed_fields, occurred_at_ms";
    let insert = format!("INTO audit ({columns}) VALUES ('{id}', 'key_created', 'me', 'x', '[]', 1)");
    let mut statements = vec![
        "UPDATE audit SET actor = 'me'".to_owned(),
        format!("UPDATE audit SET actor = 'me' WHERE id = '{id}'"),
        "DELETE FROM audit".to_owned(),
        format!("DELETE FROM audit WHERE id = '{id}'"),
        format!("INSERT {insert} ON CONFLICT (id) DO UPDATE SET actor = 'me'"),
    ];
    match sea_orm::ConnectionTrait::get_database_backend(&connection) {
        sea_orm::DbBackend::Postgres => statements.push("TRUNCATE audit".to_owned()),
        _ => statements.push(format!("REPLACE {insert}")),
    }
    for statement in statements {
        let refused = sea_orm::ConnectionTrait::execute_unprepared(&connection, &statement).await.unwrap_err();
        assert!(refused.to_string().contains("append-only"), "{statement}: {refused}");
    }
    assert_eq!(entries(&server, "").await, before);
    server.stop().await;
}

async fn the_command_line_lists_what_all_did(database: Database) {
    let server = TestServer::start(&database).await;
    let (id, _) = server.webhook("https://example.com/", &["content.ready"]).await;
    server.delete(&format!("/v1/webhooks/{id}")).await.data();
    let new = NewKey { organization: None, environment: Environment::Live, kind: KeyKind::Service, expires_at: None };
    let service = server.store.create_key(new).await.unwrap().info.id;
    server.stop().await;
    let directory = tempfile::tempdir().unwrap();
    let keys = format!("{}\n{MASTER_KEY}", *Vault::new_master_key());
    let command = async |arguments: &[&str]| {
        let mut command = binary(arguments, directory.path());
        command.args(["--log", "error", "--database-url", &database.url]).env("SHORTKIT_MASTER_KEY", &keys);
        run(command, "").await
    };
    for _ in 0..2 {
        let (code, _, notes) = command(&["keys", "rotate-master"]).await;
        assert_eq!(code, 0, "{notes}");
    }
    let list = async |arguments: &[&str]| {
        let (code, out, notes) = command(&[&["audit", "list"][..], arguments].concat()).await;
        assert_eq!(code, 0, "{notes}");
        (out, notes)
    };
    let json = |out: &str| -> Vec<Value> { out.lines().map(|line| serde_json::from_str(line).unwrap()).collect() };
    let all = json(&list(&["--json"]).await.0);
    let actions: Vec<&str> = all.iter().map(|entry| entry["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["master_key_rotated", "key_created", "webhook_deleted", "webhook_created", "key_created"]);
    let current = Vault::parse(&keys).unwrap().current().to_owned();
    assert_eq!(all[0]["resourceId"], current, "recorded once, since the second time there was nothing to do");
    assert_eq!((all[0].get("organization"), all[0].get("environment")), (None, None));
    assert_eq!((all[1].get("organization"), &all[1]["environment"]), (None, &json!("live")));

    let ids = |entries: &[Value]| -> BTreeSet<String> { entries.iter().map(|entry| entry["id"].to_string()).collect() };
    for (filter, places) in [
        (["--organization", "acme"], vec![2, 3, 4]),
        (["--environment", "live"], vec![1]),
        (["--action", "key_created"], vec![1, 4]),
        (["--actor", "cli"], vec![0, 1, 4]),
        (["--resource", service.as_str()], vec![1]),
        (["--webhook", id.as_str()], vec![2, 3]),
    ] {
        let wanted: Vec<Value> = places.into_iter().map(|place| all[place].clone()).collect();
        let found = json(&list(&[&filter[..], &["--json"]].concat()).await.0);
        assert_eq!(ids(&found), ids(&wanted), "{filter:?}");
    }
    let (first, notes) = list(&["--limit", "2"]).await;
    assert!(first.lines().count() == 3 && first.starts_with("ID "), "{first}");
    let after = notes.trim().rsplit(' ').next().unwrap();
    assert!(notes.contains("5 in all"), "{notes}");
    let (rest, notes) = list(&["--after", after, "--json"]).await;
    assert_eq!((json(&rest).as_slice(), notes.as_str()), (&all[2..], ""));
    assert_eq!(command(&["audit", "list", "--action", "nothing"]).await.0, 2);
    soon("an empty list", async { assert!(list(&["--actor", "nobody"]).await.1.contains("no such entry")) }).await;
}
