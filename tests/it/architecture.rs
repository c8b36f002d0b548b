//! The arrows of docs/architecture.md: what may use what.

use std::{collections::BTreeSet, fs, path::Path};

/// Each module of the crate, and what of the crate it may use.
const ARROWS: [(&str, &[&str]); 23] = [
    ("webhook", &[]),
    ("failpoint", &[]),
    ("clock", &["webhook"]),
    ("telemetry", &["clock"]),
    ("health", &[]),
    ("internal", &["health", "listen", "store"]),
    ("rest", &[]),
    ("cors", &[]),
    ("deadline", &[]),
    ("listen", &["clock"]),
    ("egress", &["clock"]),
    ("vault", &["clock"]),
    ("config", &["listen", "vault", "webhook"]),
    ("feed", &["webhook"]),
    ("store", &["feed", "vault", "webhook", "clock", "failpoint", "telemetry"]),
    ("dispatch", &["store", "feed", "webhook", "egress", "clock", "failpoint", "telemetry"]),
    ("auth", &["grpc", "listen", "store", "webhook", "clock"]),
    ("idempotency", &["auth", "grpc", "store"]),
    ("rate_limit", &["auth", "grpc", "store", "webhook", "clock"]),
    ("grpc", &["auth", "store", "feed", "webhook", "egress", "clock"]),
    ("gateway", &["clock", "cors", "grpc", "health", "listen", "rest"]),
    (
        "server",
        &[
            "auth",
            "clock",
            "config",
            "deadline",
            "dispatch",
            "egress",
            "gateway",
            "grpc",
            "health",
            "idempotency",
            "internal",
            "listen",
            "rate_limit",
            "rest",
            "store",
            "telemetry",
            "vault",
        ],
    ),
    ("cli", &["clock", "config", "grpc", "server", "store", "telemetry", "vault", "webhook"]),
];

fn sources(path: &Path, found: &mut Vec<String>) {
    if !path.exists() {
        return;
    }
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            sources(&entry.unwrap().path(), found);
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        found.push(fs::read_to_string(path).unwrap());
    }
}

/// The modules that `use crate::…` and `crate::…` name in a source.
fn used(source: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for part in source.split("crate::").skip(1) {
        let word = |text: &str| -> String {
            text.chars().take_while(|char| char.is_ascii_lowercase() || *char == '_').collect()
        };
        match part.strip_prefix('{') {
            None => drop(names.insert(word(part))),
            Some(list) => {
                let mut depth = 0;
                let mut start = true;
                for (index, char) in list.char_indices() {
                    match char {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => start = true,
                        char if depth == 0 && start && char.is_ascii_lowercase() => {
                            names.insert(word(&list[index..]));
                            start = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    names
}

#[test]
fn no_arrow_goes_back() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let modules: BTreeSet<&str> = ARROWS.iter().map(|(module, _)| *module).collect();
    for entry in fs::read_dir(&root).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap().replace(".rs", "");
        assert!(modules.contains(name.as_str()) || name == "lib" || name == "main", "{name} has no arrows");
    }
    for (module, allowed) in ARROWS {
        let mut found = Vec::new();
        sources(&root.join(module), &mut found);
        sources(&root.join(format!("{module}.rs")), &mut found);
        for other in found.iter().flat_map(|source| used(source)) {
            let fine = other == module || allowed.contains(&other.as_str()) || !modules.contains(other.as_str());
            assert!(fine, "{module} uses {other}");
        }
    }
}

#[test]
fn only_the_store_knows_the_database_and_only_grpc_the_generated_types() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (module, _) in ARROWS {
        let mut found = Vec::new();
        sources(&root.join(module), &mut found);
        sources(&root.join(format!("{module}.rs")), &mut found);
        let source = found.concat();
        assert_eq!(source.contains("sea_orm::"), module == "store", "{module}");
        // The command line is a client of the service, and the server mounts it.
        let generated = matches!(module, "grpc" | "cli" | "server");
        assert!(generated || !source.contains("proto::"), "{module}");
        assert!(matches!(module, "egress") || !source.contains("reqwest::"), "{module}");
    }
}

#[test]
fn the_states_are_those_of_the_schema_and_of_the_diagram() {
    use shortkit_webhooks::webhook::DeliveryStatus;
    let read = |path: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    let words = [DeliveryStatus::Pending, DeliveryStatus::Success, DeliveryStatus::Failed].map(DeliveryStatus::as_str);
    let check = format!("deliveries_status_known CHECK (status IN ('{}'))", words.join("', '"));
    assert!(read("migrations/m0001_initial.rs").contains(&check), "{check}");
    let docs = read("docs/architecture.md");
    let (_, diagram) = docs.split_once("## The states of a delivery").unwrap();
    let diagram = diagram.split("```").nth(1).unwrap();
    assert!(words.iter().all(|word| diagram.contains(word)));
}

#[test]
fn the_tests_that_the_promises_name_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (document, least) in [("SECURITY.md", 20), ("docs/threats.md", 40)] {
        let text = fs::read_to_string(root.join(document)).unwrap();
        let rows = text.lines().filter(|line| line.starts_with("| "));
        let names: Vec<&str> = rows.flat_map(|row| row.split('`').filter(|text| text.contains("::"))).collect();
        assert!(names.len() > least, "{document}: {names:?}");
        for name in names {
            let (module, test) = name.rsplit_once("::").unwrap();
            let module = module.replace("::", "/");
            let sources = [format!("tests/it/{module}.rs"), format!("src/{module}.rs")];
            let sources =
                sources.iter().filter_map(|path| fs::read_to_string(root.join(path)).ok()).collect::<String>();
            assert!(sources.contains(&format!("fn {test}(")), "{document} names {name}, which is no test");
        }
    }
}
