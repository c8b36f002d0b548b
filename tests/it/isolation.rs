//! Nothing crosses an organisation or an environment, and no other key opens anything: every call of the descriptors,
//! over gRPC and over each of its REST routes, for every kind of stranger. A new RPC needs a row in `calls.rs`.

mod caller;
mod calls;

use std::collections::BTreeSet;

use http::{HeaderValue, Method};
use prost_reflect::{Kind, MethodDescriptor};
use serde_json::{Value, json};
use shortkit_webhooks::{
    clock,
    config::Config,
    store::{KeyKind, NewKey},
    webhook::Environment,
};

use self::{
    caller::{Answer, Api, Caller, Door, call, doors, fits, method, methods, open, over_grpc},
    calls::{CALLS, Call, Ids, PAGED, Paged, Reach},
};
use crate::support::{Database, Receiver, Reply, TestServer, config, on_both_databases, soon};

on_both_databases!(owners_can, strangers_cannot, other_keys_cannot, tokens_are_bound);

#[test]
fn every_call_has_its_rows() {
    let methods = methods();
    assert!(methods.len() >= 12, "the descriptors are not those of the services");
    let missing: Vec<&str> =
        methods.iter().map(|method| method.full_name()).filter(|name| rows(name).is_empty()).collect();
    assert!(missing.is_empty(), "no row in CALLS of tests/it/isolation/calls.rs for {missing:?}");
    for method in &methods {
        let example = ids("x", "y");
        let named: BTreeSet<String> = rows(method.full_name())
            .iter()
            .flat_map(|row| (row.request)(&example).as_object().unwrap().keys().cloned().collect::<Vec<_>>())
            .collect();
        for field in method.input().fields().filter(|field| field.kind() == Kind::String) {
            let name = field.name();
            let is_id = name == "id" || name.ends_with("_id");
            assert!(!is_id || named.contains(name), "no row of {} in CALLS says {name}", method.full_name());
            let is_token = matches!(name, "cursor" | "page_token" | "resume_token");
            let paged = PAGED.iter().any(|row| row.method == method.full_name() && row.takes == name);
            assert!(!is_token || paged, "no row of {} in PAGED of calls.rs takes {name}", method.full_name());
        }
    }
    for name in CALLS.iter().map(|row| row.method).chain(PAGED.iter().map(|row| row.method)) {
        method(name);
    }
}

fn rows(method: &str) -> Vec<&'static Call> {
    CALLS.iter().filter(|row| row.method == method).collect()
}

fn ids(webhook: &str, delivery: &str) -> Ids {
    Ids { webhook: webhook.to_owned(), delivery: delivery.to_owned() }
}

fn nobody() -> Ids {
    ids("whk_none", "del_none")
}

/// Every row with every way to call it.
fn every_call() -> impl Iterator<Item = (&'static Call, MethodDescriptor, Door)> {
    CALLS.iter().flat_map(|row| {
        let method = method(row.method);
        let request = (row.request)(&nobody());
        let doors = doors(&method).into_iter().filter(move |door| fits(door, &request));
        doors.map(move |door| (row, method.clone(), door)).collect::<Vec<_>>()
    })
}

/// Makes what a call may name, for the tenant of `caller`: a webhook, and a delivery of it that has failed.
async fn made(api: &Api<'_>, caller: &Caller, receiver: &Receiver, mark: &str) -> Ids {
    let create = method("shortkit.webhooks.v1.WebhookService.CreateWebhook");
    let request = json!({ "url": receiver.url(), "events": ["content.ready"], "description": mark });
    let (answer, reply) = over_grpc(api, caller, &create, &request).await;
    let reply = reply.unwrap_or_else(|| panic!("{}: {answer:?}", caller.name));
    let webhook = reply.get_field_by_name("webhook").unwrap();
    let webhook = webhook.as_message().unwrap().get_field_by_name("id").unwrap().as_str().unwrap().to_owned();
    let delivery = test_event(api, caller, &webhook).await;
    Ids { webhook, delivery }
}

/// Sends a test event; the id of its delivery, which fails.
async fn test_event(api: &Api<'_>, caller: &Caller, webhook: &str) -> String {
    let send = method("shortkit.webhooks.v1.WebhookService.SendTestEvent");
    let (answer, reply) = over_grpc(api, caller, &send, &json!({ "id": webhook })).await;
    let reply = reply.unwrap_or_else(|| panic!("{}: {answer:?}", caller.name));
    reply.get_field_by_name("delivery_id").unwrap().as_str().unwrap().to_owned()
}

async fn refusing_receiver() -> Receiver {
    Receiver::scripted(|_, _| Reply::status(500)).await
}

/// The tenant whose things the others are after.
const ACME: &str = "acme";

/// Those who may act for it in the environment `test`.
async fn owners(server: &TestServer) -> Vec<Caller> {
    let service = server.new_key(None, KeyKind::Service, Environment::Test).await;
    vec![
        Caller::with_key("its own key", &server.key),
        Caller::with_key("a service key that names it", &service).acting_for(ACME),
    ]
}

/// Those who have a good key, and may not see what is acme's in the environment `test`.
async fn strangers(server: &TestServer) -> Vec<Caller> {
    let key = async |organization, kind, environment| server.new_key(organization, kind, environment).await;
    let other = key(Some("other"), KeyKind::Secret, Environment::Test).await;
    let live = key(Some(ACME), KeyKind::Secret, Environment::Live).await;
    let service = key(None, KeyKind::Service, Environment::Test).await;
    let live_service = key(None, KeyKind::Service, Environment::Live).await;
    vec![
        Caller::with_key("a key of another organisation", &other),
        Caller::with_key("a key of another environment", &live),
        Caller::with_key("a service key that names another organisation", &service).acting_for("other"),
        Caller::with_key("a service key of another environment", &live_service).acting_for(ACME),
        Caller::with_key("a key of another organisation that names acme", &other).acting_for(ACME),
    ]
}

/// Without this, what the other tests see could be due to rows that nobody can call.
async fn owners_can(database: Database) {
    let server = TestServer::start(&database).await;
    let (api, receiver) = (Api::of(&server), refusing_receiver().await);
    for owner in owners(&server).await {
        for (row, method, door) in every_call() {
            let ids = made(&api, &owner, &receiver, "mine").await;
            let answer = call(&api, &owner, &method, &door, &(row.request)(&ids)).await;
            assert_eq!(answer.code, "", "{} as {} by {door:?}: {answer:?}", row.method, owner.name);
        }
    }
    server.stop().await;
}

/// What a tenant sees of itself, by every call that only reads.
async fn seen(api: &Api<'_>, caller: &Caller, ids: &Ids) -> Vec<(String, Answer)> {
    let mut all = Vec::new();
    for (row, method, door) in every_call() {
        if matches!(&door, Door::Rest { verb, .. } if *verb == Method::GET) && !method.is_server_streaming() {
            let request = (row.request)(ids);
            all.push((format!("{} by REST", row.method), call(api, caller, &method, &door, &request).await));
            all.push((format!("{} by gRPC", row.method), call(api, caller, &method, &Door::Grpc, &request).await));
        }
    }
    assert!(all.len() >= 8, "{all:?}");
    all
}

async fn strangers_cannot(database: Database) {
    let server = TestServer::start(&database).await;
    let (api, receiver, others) = (Api::of(&server), refusing_receiver().await, refusing_receiver().await);
    let mut strangers_and_theirs = Vec::new();
    for stranger in strangers(&server).await {
        let own = made(&api, &stranger, &others, "theirs").await;
        strangers_and_theirs.push((stranger, own));
    }
    let mut before = Vec::new();
    for (stranger, own) in &strangers_and_theirs {
        before.push(seen(&api, stranger, own).await);
    }
    let mark = clock::new_id("mark");
    let owner = owners(&server).await.remove(0);
    let (first, second) = (made(&api, &owner, &receiver, &mark).await, made(&api, &owner, &receiver, &mark).await);
    let untouched = seen(&api, &owner, &first).await;
    let received = receiver.received().len();
    for ((stranger, own), before) in strangers_and_theirs.iter().zip(before) {
        assert_eq!(seen(&api, stranger, own).await, before, "{} sees something new", stranger.name);
    }

    for (row, method, door) in every_call() {
        let what = format!("{} by {door:?}", row.method);
        // Within the tenant too: a delivery is found only under its own webhook.
        let mixed = ids(&first.webhook, &second.delivery);
        assert_none(&api, &owner, row, &method, &door, &mixed, &ids(&first.webhook, "del_none")).await;
        for (stranger, own) in &strangers_and_theirs {
            if row.reach == Reach::Tenant {
                let answer = call(&api, stranger, &method, &door, &(row.request)(own)).await;
                assert_eq!(answer.code, "", "{what} as {}", stranger.name);
                let leaks = [&mark, &first.webhook, &first.delivery].map(|canary| answer.text.contains(canary));
                assert_eq!(leaks, [false; 3], "{what} as {}: {}", stranger.name, answer.text);
                continue;
            }
            let none = nobody();
            for (webhook, delivery, webhook_none, delivery_none) in [
                (&first.webhook, &first.delivery, &none.webhook, &none.delivery),
                (&first.webhook, &own.delivery, &none.webhook, &own.delivery),
                (&own.webhook, &first.delivery, &own.webhook, &none.delivery),
            ] {
                let (asked, none) = (ids(webhook, delivery), ids(webhook_none, delivery_none));
                assert_none(&api, stranger, row, &method, &door, &asked, &none).await;
            }
        }
    }
    for (row, method, _) in every_call().filter(|(row, method, door)| {
        row.reach == Reach::Tenant && method.is_server_streaming() && matches!(door, Door::Grpc)
    }) {
        for (stranger, own) in &strangers_and_theirs {
            let mut stream = open(&api, stranger, &method, &(row.request)(own)).await.unwrap();
            test_event(&api, &owner, &second.webhook).await;
            test_event(&api, stranger, &own.webhook).await;
            // What the owner did comes before what the stranger did, if it comes.
            loop {
                let message = soon("a message", stream.message()).await.unwrap().unwrap();
                let message = String::from_utf8_lossy(&message);
                assert!(!message.contains(&second.webhook), "{} as {}: {message}", row.method, stranger.name);
                if message.contains(&own.webhook) {
                    break;
                }
            }
        }
    }
    assert_eq!(seen(&api, &owner, &first).await, untouched, "a stranger changed something");
    let tests = strangers_and_theirs.len();
    assert_eq!(receiver.received().len(), received + tests, "a stranger sent something");
    server.stop().await;
}

/// Asserts that what `asked` names is answered as what does not exist. A row that does not use what differs says nothing.
async fn assert_none(
    api: &Api<'_>,
    caller: &Caller,
    row: &Call,
    method: &MethodDescriptor,
    door: &Door,
    asked: &Ids,
    none: &Ids,
) {
    let (request, without) = ((row.request)(asked), (row.request)(none));
    if request == without {
        return;
    }
    let answer = call(api, caller, method, door, &request).await;
    let what = format!("{} as {} by {door:?} with {request}", row.method, caller.name);
    assert_eq!(answer.code, "NOT_FOUND", "{what}: {answer:?}");
    assert_eq!(answer, call(api, caller, method, door, &without).await, "{what}");
}

/// Those who have no good key: how they are refused, and the field at fault.
async fn refused_callers(server: &TestServer) -> Vec<(Caller, &'static str)> {
    let publishable = server.new_key(Some(ACME), KeyKind::Publishable, Environment::Test).await;
    let service = server.new_key(None, KeyKind::Service, Environment::Test).await;
    let new = |expires_at| NewKey {
        organization: Some(ACME.to_owned()),
        environment: Environment::Test,
        kind: KeyKind::Secret,
        expires_at,
    };
    let expired = server.store.create_key(new(Some(clock::now()))).await.unwrap().key;
    let revoked = server.store.create_key(new(None)).await.unwrap();
    assert!(server.store.revoke_key(&revoked.info.id).await.unwrap());
    let key = &server.key;
    let middle = key.len() / 2;
    let other = if key.as_bytes()[middle] == b'A' { "B" } else { "A" };
    let unknown = [&key[..middle], other, &key[middle + 1..]].concat();
    let mut callers = vec![
        (Caller { name: "nobody", ..Caller::default() }, "UNAUTHORIZED"),
        (Caller::with_key("a publishable key", &publishable), "FORBIDDEN"),
        (Caller::with_key("an expired key", &expired), "KEY_EXPIRED"),
        (Caller::with_key("a revoked key", &revoked.key), "KEY_REVOKED"),
        (Caller::with_key("an unknown key", &unknown), "UNAUTHORIZED"),
        (Caller::with_key("a service key for nobody", &service), "INVALID_PARAMETER"),
    ];
    for organization in ["", " ", "two words", "../acme", "acme,other", "%61cme"] {
        let caller = Caller::with_key("a service key for no organisation", &service).acting_for(organization);
        callers.push((caller, "INVALID_PARAMETER"));
    }
    let long = format!("Bearer {key}{}", "x".repeat(4096));
    for value in [
        "",
        "Bearer",
        "Bearer ",
        key.as_str(),
        &format!("Basic {key}"),
        &format!("Bearer {key} {key}"),
        &format!("Bearer, {key}"),
        &format!("Bearer {}", key.to_uppercase()),
        &format!("Bearer {}", &key[..key.len() - 1]),
        &long,
        "Bearer sk_test_' OR 1=1 --",
    ] {
        let authorization = Some(HeaderValue::try_from(value).unwrap());
        callers.push((Caller { name: "a malformed key", authorization, organization: None }, "UNAUTHORIZED"));
    }
    let bytes = Some(HeaderValue::from_bytes(b"Bearer \xff\xfe").unwrap());
    callers.push((Caller { name: "bytes for a key", authorization: bytes, organization: None }, "UNAUTHORIZED"));
    callers
}

async fn other_keys_cannot(database: Database) {
    let server = TestServer::start(&database).await;
    let (api, receiver) = (Api::of(&server), refusing_receiver().await);
    let owners = owners(&server).await;
    let first = made(&api, &owners[0], &receiver, "mine").await;
    // Before the first look: some of them have keys of the owner's, whose making and revoking the owner sees.
    let refused = refused_callers(&server).await;
    let untouched = seen(&api, &owners[0], &first).await;
    for (caller, code) in refused {
        assert_refused(&api, &caller, code, &first).await;
    }
    assert_eq!(seen(&api, &owners[0], &first).await, untouched);
    server.stop().await;

    // The operator stops serving their environment.
    let server = TestServer::with(Config { environments: vec![Environment::Live], ..config(&database) }).await;
    for owner in owners {
        assert_refused(&Api::of(&server), &owner, "ENVIRONMENT_MISMATCH", &first).await;
    }
    server.stop().await;
}

/// Every call is refused with this code, whatever it names.
async fn assert_refused(api: &Api<'_>, caller: &Caller, code: &str, named: &Ids) {
    for (row, method, door) in every_call() {
        let answer = call(api, caller, &method, &door, &(row.request)(named)).await;
        let what = format!("{} as {} ({:?}) by {door:?}", row.method, caller.name, caller.authorization);
        assert_eq!(answer.code, code, "{what}: {answer:?}");
        assert_eq!(answer, call(api, caller, &method, &door, &(row.request)(&nobody())).await, "{what}");
    }
}

/// A request with a token in it.
fn with_token(paged: &Paged, mut request: Value, token: &str) -> Value {
    request[paged.takes] = json!(token);
    request
}

/// The first token that a call gives out.
async fn token(api: &Api<'_>, caller: &Caller, paged: &Paged, ids: &Ids) -> String {
    let (method, request) = (method(paged.method), (paged.first)(ids));
    let message = if method.is_server_streaming() {
        let mut stream = open(api, caller, &method, &request).await.unwrap();
        test_event(api, caller, &ids.webhook).await;
        let bytes = soon("a message", stream.message()).await.unwrap().unwrap();
        prost_reflect::DynamicMessage::decode(method.output(), bytes).unwrap()
    } else {
        over_grpc(api, caller, &method, &request).await.1.unwrap()
    };
    let token = message.get_field_by_name(paged.gives).unwrap().as_str().unwrap().to_owned();
    assert!(!token.is_empty(), "{} gives no {}", paged.method, paged.gives);
    token
}

async fn tokens_are_bound(database: Database) {
    let server = TestServer::start(&database).await;
    let (api, receiver) = (Api::of(&server), refusing_receiver().await);
    let owner = owners(&server).await.remove(0);
    let own = made(&api, &owner, &receiver, "mine").await;
    let sibling = made(&api, &owner, &receiver, "mine").await;
    test_event(&api, &owner, &own.webhook).await;
    let mut elsewhere = Vec::new();
    for stranger in strangers(&server).await {
        let theirs = made(&api, &stranger, &receiver, "theirs").await;
        elsewhere.push((stranger, theirs));
    }
    let path = format!("/v1/webhooks/{}/deliveries/watch", own.webhook);
    for paged in PAGED {
        let token = token(&api, &owner, paged, &own).await;
        let first = (paged.first)(&own);
        let doors = doors(&method(paged.method));
        for door in &doors {
            let answer =
                call(&api, &owner, &method(paged.method), door, &with_token(paged, first.clone(), &token)).await;
            assert_eq!(answer.code, "", "{} {door:?}: {answer:?}", paged.method);
        }
        let changed = changed(&token);
        for (index, changed) in changed.iter().enumerate() {
            // One bit of each byte is enough to see that both doors are the same.
            let doors = if index % 7 == 0 { &doors[..] } else { &doors[..1] };
            assert_bound(&api, &owner, paged, doors, first.clone(), changed).await;
        }
        for other in (paged.other_filters)(&own).into_iter().chain([(paged.first)(&sibling)]) {
            if other != first {
                assert_bound(&api, &owner, paged, &doors, other, &token).await;
            }
        }
        for (stranger, theirs) in &elsewhere {
            assert_bound(&api, stranger, paged, &doors, (paged.first)(theirs), &token).await;
        }
        for other in PAGED.iter().filter(|other| other.method != paged.method) {
            let doors = self::doors(&method(other.method));
            assert_bound(&api, &owner, other, &doors, (other.first)(&own), &token).await;
        }
        // The other way to hand in a resume token; a byte that is no text is not as good as no token.
        for index in (0..token.len()).filter(|_| paged.takes == "resume_token") {
            let mut bytes = token.clone().into_bytes();
            bytes[index] ^= 0x80;
            let request = server.request(Method::GET, &path).header("last-event-id", bytes);
            let refused = server.send(request).await;
            assert_eq!((refused.status, &refused.json()["error"]["details"]["field"]), (400, &json!("resumeToken")));
        }
    }
    server.stop().await;
}

/// A token with each bit of each byte flipped, without its end, and with more than itself.
fn changed(token: &str) -> Vec<String> {
    let flipped = (0..token.len()).flat_map(|index| {
        (0..7).map(move |bit| {
            let mut bytes = token.to_owned().into_bytes();
            bytes[index] ^= 1 << bit;
            String::from_utf8(bytes).unwrap()
        })
    });
    let cut = (0..token.len()).map(|end| token[..end].to_owned());
    let longer = ["A", "=", " ", "\0", token].map(|more| format!("{token}{more}"));
    flipped.chain(cut).chain(longer).collect()
}

/// Asserts that a token is not taken, and that the answer names its field.
async fn assert_bound(api: &Api<'_>, caller: &Caller, paged: &Paged, doors: &[Door], request: Value, token: &str) {
    let method = method(paged.method);
    let request = with_token(paged, request, token);
    for door in doors.iter().filter(|door| fits(door, &request)) {
        let answer = call(api, caller, &method, door, &request).await;
        let what = format!("{} as {} by {door:?} with {request}", paged.method, caller.name);
        assert_eq!(answer.code, "INVALID_PARAMETER", "{what}: {answer:?}");
        // In JSON it is `resumeToken`.
        assert_eq!(answer.field.replace('_', "").to_lowercase(), paged.takes.replace('_', ""), "{what}: {answer:?}");
    }
}
