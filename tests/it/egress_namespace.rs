//! The proof that nothing inside is ever dialled: the real service in a network namespace of its own, where every address
//! in the world is this machine, somebody listens on all of them, and the name server lies.

mod service;
mod world;

use std::{net::IpAddr, process::Command};

use futures_util::future::join_all;
use serde_json::{Value, json};

use self::{
    service::Service,
    world::{ALLOWED, HALF_DEAD, INSIDE, PORTS, PUBLIC_V4, PUBLIC_V6, UNREACHABLE, World},
};

/// Set for the process that runs inside the namespace.
const MARK: &str = "SHORTKIT_TEST_NAMESPACE";
/// More look-ups than a pool of threads would bear.
const SILENT: usize = 600;

/// Ways into a new namespace: as root, as an ordinary user, and as one who may become root.
const WAYS: [&[&str]; 3] = [
    &["unshare", "--net", "--mount"],
    &["unshare", "--map-root-user", "--net", "--mount"],
    &["sudo", "--non-interactive", "--preserve-env", "unshare", "--net", "--mount"],
];

#[tokio::test]
async fn nothing_inside_is_ever_dialled() {
    if std::env::var_os(MARK).is_some() {
        return inside().await;
    }
    let works = |way: &&[&str]| {
        let tried = Command::new(way[0]).args(&way[1..]).args(["ip", "link", "set", "lo", "up"]).output();
        tried.is_ok_and(|output| output.status.success())
    };
    let way = WAYS.into_iter().find(works).expect(
        "a network namespace can be made; in a container that takes --privileged, or --cap-add SYS_ADMIN,NET_ADMIN \
         and no seccomp profile",
    );
    let this = std::env::current_exe().unwrap();
    let output = Command::new(way[0])
        .args(&way[1..])
        .arg(this)
        .args(["--exact", "egress_namespace::nothing_inside_is_ever_dialled", "--nocapture"])
        .env(MARK, "1")
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

async fn inside() {
    let world = World::new().await;
    every_address_answers(&world).await;
    let literals = without_the_door(&world).await;
    let service = Service::start(world.directory.path(), ALLOWED).await;

    the_allowed_are_reached(&world, &service).await;
    a_dead_address_hides_no_live_one(&service).await;
    let refused = refused_at_creation(&world, &service).await;
    let turning = names_that_turn(&world, &service).await;
    let mixed = mixed_answers(&world, &service).await;
    let redirected = redirects(&service).await;
    for id in &literals {
        assert_eq!(service.test(id).await["lastError"], "Blocked address", "{id}");
    }

    // All of it once more the usual way.
    let ids = [literals.as_slice(), &turning, &mixed, &redirected].concat();
    let mut watch = service.watch("content.ready").await;
    let published = service.publish("content.ready").await;
    assert!(published >= ids.len(), "{published}");
    watch.ended(published).await;
    for (ids, error) in
        [(&literals, "Blocked address"), (&turning, "Blocked address"), (&redirected, "Redirects are not followed")]
    {
        for id in ids {
            assert_eq!(service.newest(id).await["lastError"], error, "{id}");
        }
    }
    for id in &mixed {
        assert_eq!(service.newest(id).await["status"], "success", "{id}");
    }

    a_silent_name_server_delays_nobody_else(&world, &service).await;
    endless_answers_take_little_memory(&service).await;
    let heard = world.heard().await;
    let wrong: Vec<_> = heard.iter().filter(|(address, _)| !world::may_be_dialled(*address)).collect();
    assert!(wrong.is_empty(), "{refused} were refused, and yet: {wrong:?}");
    assert!(heard.len() > 100, "the others were reached");
    service.stop().await;
}

/// That nobody is heard later would mean nothing if nobody could be.
async fn every_address_answers(world: &World) {
    for address in INSIDE {
        for port in PORTS {
            let address: IpAddr = address.parse().unwrap();
            tokio::net::TcpStream::connect((address, port)).await.unwrap_or_else(|error| panic!("{address}: {error}"));
        }
    }
    for address in UNREACHABLE {
        let address: IpAddr = address.parse().unwrap();
        tokio::net::TcpStream::connect((address, PORTS[0])).await.expect_err("the system itself refuses it");
    }
    assert_eq!(world.heard().await.len(), INSIDE.len() * PORTS.len());
}

/// What the service does when everything is allowed: it dials each address. The webhooks that it leaves.
async fn without_the_door(world: &World) -> Vec<String> {
    let service = Service::start(world.directory.path(), "0.0.0.0/0,::/0").await;
    let mut ids = Vec::new();
    for address in INSIDE {
        for url in world::urls(address) {
            let id = service.register(&url, "content.ready").await;
            service.test(&id).await;
            ids.push(id);
        }
    }
    let heard = world.heard().await;
    let hit = heard.iter().filter(|(address, _)| !world::may_be_dialled(*address)).count();
    assert!(hit >= ids.len(), "{hit} of {}", ids.len());
    for address in UNREACHABLE {
        ids.push(service.register(&world::urls(address)[0], "content.ready").await);
    }
    service.stop().await;
    ids
}

async fn the_allowed_are_reached(world: &World, service: &Service) {
    for (url, address) in [
        (format!("http://{PUBLIC_V4}/"), PUBLIC_V4),
        (format!("http://[{PUBLIC_V6}]:9000/"), PUBLIC_V6),
        ("http://10.77.0.1:9000/".to_owned(), "10.77.0.1"),
        ("http://public.example:9000/".to_owned(), PUBLIC_V4),
    ] {
        let id = service.register(&url, "content.ready").await;
        world.heard().await;
        assert_eq!(service.test(&id).await["status"], "success", "{url}");
        let heard = world.heard().await;
        assert_eq!(heard.iter().map(|(address, _)| address.to_string()).collect::<Vec<_>>(), [address], "{url}");
    }
}

/// Of a name's addresses each has its share of the time for connecting, in whichever order they come.
async fn a_dead_address_hides_no_live_one(service: &Service) {
    let names = (0..4).map(|index| async move {
        let id = service.register(&format!("http://half-dead-{index}.example:{HALF_DEAD}/"), "export.ready").await;
        assert_eq!(service.test(&id).await["status"], "success");
        service.delete(&id).await;
    });
    join_all(names).await;
}

/// How many URLs were refused.
async fn refused_at_creation(world: &World, service: &Service) -> usize {
    let mut urls: Vec<String> = INSIDE.iter().chain(&UNREACHABLE).flat_map(|address| world::urls(address)).collect();
    urls.extend((0..INSIDE.len()).map(|index| format!("https://inside-{index}.example/")));
    world.turn(true);
    urls.extend((0..INSIDE.len()).map(|index| format!("https://mixed-{index}.example/")));
    urls.extend(
        [
            "http://127.1:9000/",
            "http://2130706433:9000/",
            "http://0x7f000001:9000/",
            "http://0177.0.0.1:9000/",
            "http://①②⑦.0.0.1:9000/",
            "http://127。0。0。1:9000/",
            "http://127.0.0.1.:9000/",
            "http:\\\\127.0.0.1:9000\\",
            "http://[::ffff:7f00:1]:9000/",
            "http://localhost:9000/",
            "http://LOCALHOST.:9000/",
            "http://a.localhost:9000/",
            "http://169.254.169.25\t4:9000/",
            "http://169.254.\r\n169.254:9000/",
            "http://alias.example:9000/",
        ]
        .map(str::to_owned),
    );
    let spare = service.register("http://public.example/", "export.ready").await;
    for url in &urls {
        let (status, answer) = service.create(url, "content.ready").await;
        assert_eq!((status, &answer["error"]["details"]["reason"]), (400, &json!("blocked_address")), "{url}");
        let (status, answer) = service.patch(&spare, &json!({ "url": url })).await;
        assert_eq!((status, &answer["error"]["details"]["reason"]), (400, &json!("blocked_address")), "{url}");
    }
    service.delete(&spare).await;
    world.turn(false);
    urls.len()
}

/// Names that are public when their webhook is registered, and inside ever after.
async fn names_that_turn(world: &World, service: &Service) -> Vec<String> {
    world.turn(false);
    let mut names: Vec<String> = (0..INSIDE.len()).map(|index| format!("turning-{index}.example")).collect();
    names.push("alias.example".to_owned());
    let mut ids = Vec::new();
    for name in &names {
        ids.push(service.register(&format!("http://{name}:9000/"), "content.ready").await);
        assert_eq!(service.test(&ids[ids.len() - 1]).await["status"], "success", "{name}");
    }
    world.turn(true);
    for id in &ids {
        assert_eq!(service.test(id).await["lastError"], "Blocked address", "{id}");
    }
    // One that turns with every look-up is reached or blocked, and both happen.
    let id = service.register("http://alternating.example:9000/", "export.ready").await;
    let mut tests = Vec::new();
    for _ in 0..20 {
        tests.push(service.test(&id).await);
    }
    service.delete(&id).await;
    assert!(
        tests.iter().all(|test| test["status"] == "success" || test["lastError"] == "Blocked address"),
        "{tests:?}"
    );
    assert!(tests.iter().any(|test| test["status"] == "success"));
    assert!(tests.iter().any(|test| test["status"] == "failed"));
    ids
}

/// Names with good and bad addresses: the good ones are dialled.
async fn mixed_answers(world: &World, service: &Service) -> Vec<String> {
    world.turn(false);
    let mut ids = Vec::new();
    for index in 0..INSIDE.len() {
        ids.push(service.register(&format!("http://mixed-{index}.example:9000/"), "content.ready").await);
    }
    world.turn(true);
    for id in &ids {
        assert_eq!(service.test(id).await["status"], "success", "{id}");
    }
    ids
}

/// An allowed receiver that sends on to an address that is not.
async fn redirects(service: &Service) -> Vec<String> {
    let mut ids = Vec::new();
    for status in [301, 302, 303, 307, 308] {
        let id = service.register(&format!("http://{PUBLIC_V4}:9000/redirect/{status}"), "content.ready").await;
        let test = service.test(&id).await;
        assert_eq!((&test["lastError"], &test["statusCode"]), (&json!("Redirects are not followed"), &json!(status)));
        ids.push(id);
    }
    ids
}

/// Look-ups that hang cost no thread, end in time, and leave others alone.
async fn a_silent_name_server_delays_nobody_else(world: &World, service: &Service) {
    world.turn(false);
    let urls: Vec<String> = (0..SILENT).map(|index| format!("https://silent-{index}.example/")).collect();
    for urls in urls.chunks(50) {
        join_all(urls.iter().map(|url| service.register(url, "export.ready"))).await;
    }
    let other = service.register("http://public.example:9000/", "content.errored").await;
    world.turn(true);
    let threads = service.status("Threads");
    let mut watch = service.watch("export.ready").await;
    assert_eq!(service.publish("export.ready").await, SILENT);
    world.queries_for("silent", SILENT).await;
    // It would not be, had its look-up to wait for one of these.
    assert_eq!(service.test(&other).await["status"], "success");
    assert!(service.status("Threads") < threads + 20, "{threads}, then {}", service.status("Threads"));
    for change in watch.ended(SILENT).await {
        let error = change.last_error();
        assert!(error == "DNS lookup failed" || error == "Connection timeout", "{error}");
        // Milliseconds: what connecting may take, and something for a machine that is busy.
        assert!(change.response_time() < 10_000, "{change:?}");
    }
    service.delete(&other).await;
}

/// A hundred receivers that never stop talking.
async fn endless_answers_take_little_memory(service: &Service) {
    for index in 0..100 {
        service.register(&format!("http://{PUBLIC_V4}:9000/endless?{index}"), "content.errored").await;
    }
    let mut watch = service.watch("content.errored").await;
    let before = service.status("VmRSS");
    assert_eq!(service.publish("content.errored").await, 100);
    watch.ended(100).await;
    let grown = service.status("VmHWM").saturating_sub(before);
    assert!(grown < 50 * 1024, "{grown} KiB");
    let newest = service.newest_of("content.errored").await;
    let longest = newest.pointer("/attemptLog/0/response").and_then(Value::as_str).unwrap();
    assert_eq!(longest.len(), 16 * 1024);
}
