//! What each kind of key opens; that nothing crosses a tenant is shown for every call in `isolation.rs`.

use http::Method;
use shortkit_webhooks::{
    clock,
    config::Config,
    store::{KeyKind, NewKey},
    webhook::Environment,
};

use crate::support::{Database, TestServer, config, on_both_databases};

on_both_databases!(keys_open_what_they_may, other_environments_are_refused, a_tenant_has_as_many_webhooks_as_it_may);

async fn code(server: &TestServer, key: &str, organization: Option<&str>) -> (u16, String) {
    let mut request = server.anonymous(Method::GET, "/v1/webhooks");
    if !key.is_empty() {
        request = request.bearer_auth(key);
    }
    if let Some(organization) = organization {
        request = request.header("x-shortkit-organization", organization);
    }
    let answer = server.send(request).await;
    (answer.status, answer.json()["error"]["code"].as_str().unwrap_or_default().to_owned())
}

async fn keys_open_what_they_may(database: Database) {
    let server = TestServer::start(&database).await;
    let publishable = server.new_key(Some("acme"), KeyKind::Publishable, Environment::Test).await;
    let service = server.new_key(None, KeyKind::Service, Environment::Test).await;
    let key = |expires_at| NewKey {
        organization: Some("acme".to_owned()),
        environment: Environment::Test,
        kind: KeyKind::Secret,
        expires_at,
    };
    let expired = server.store.create_key(key(Some(clock::now()))).await.unwrap().key;
    let revoked = server.store.create_key(key(None)).await.unwrap();
    assert!(server.store.revoke_key(&revoked.info.id).await.unwrap());
    assert!(!server.store.revoke_key("key_none").await.unwrap());
    let mut forged = server.key.clone();
    forged.pop();

    let refused = |status, code: &str| (status, code.to_owned());
    assert_eq!(code(&server, "", None).await, refused(401, "UNAUTHORIZED"));
    assert_eq!(code(&server, &forged, None).await, refused(401, "UNAUTHORIZED"));
    assert_eq!(code(&server, &expired, None).await, refused(401, "KEY_EXPIRED"));
    assert_eq!(code(&server, &revoked.key, None).await, refused(401, "KEY_REVOKED"));
    assert_eq!(code(&server, &publishable, None).await, refused(403, "FORBIDDEN"));
    assert_eq!(code(&server, &service, None).await, refused(400, "INVALID_PARAMETER"));
    assert_eq!(code(&server, &service, Some("no spaces")).await, refused(400, "INVALID_PARAMETER"));
    assert_eq!(code(&server, &service, Some("acme")).await, refused(200, ""));
    assert_eq!(code(&server, &server.key, None).await, refused(200, ""));
    server.stop().await;
}

async fn other_environments_are_refused(database: Database) {
    let config = Config { environments: vec![Environment::Live], ..config(&database) };
    let server = TestServer::with(config).await;
    assert_eq!(code(&server, &server.key, None).await, (403, "ENVIRONMENT_MISMATCH".to_owned()));
    let live = server.new_key(Some("acme"), KeyKind::Secret, Environment::Live).await;
    assert_eq!(code(&server, &live, None).await.0, 200);
    server.stop().await;
}

async fn a_tenant_has_as_many_webhooks_as_it_may(database: Database) {
    let server = TestServer::with(Config { max_webhooks: 2, ..config(&database) }).await;
    let create =
        async || server.post("/v1/webhooks", r#"{"url":"http://127.0.0.1:9000/","events":["content.ready"]}"#).await;
    let id = create().await.data()["id"].as_str().unwrap().to_owned();
    assert_eq!(create().await.status, 201);
    let refused = create().await;
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (409, Some("CONFLICT")));
    assert!(refused.text.contains("2 webhooks, as many as it may"), "{}", refused.text);
    let live = server.new_key(Some("acme"), KeyKind::Secret, Environment::Live).await;
    let elsewhere = server.anonymous(Method::GET, "/v1/webhooks").bearer_auth(live);
    assert_eq!(server.send(elsewhere).await.json()["meta"]["total"], 0, "each environment has its own");
    server.delete(&format!("/v1/webhooks/{id}")).await;
    assert_eq!(create().await.status, 201);
    server.stop().await;
}
