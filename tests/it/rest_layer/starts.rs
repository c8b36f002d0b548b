//! Annotations that cannot be served fail the start, and say where.

use shortkit_webhooks::rest::{Limits, Transcode};

/// What the start says of a service with these methods.
fn start(methods: &str) -> Result<(), String> {
    let proto = format!(
        r#"syntax = "proto3";
        package bad.v1;
        import "google/api/annotations.proto";
        import "google/protobuf/timestamp.proto";
        import "shortkit/rest/v1/options.proto";
        message Call {{
          string id = 1;
          repeated string many = 2;
          map<string, string> map = 3;
          Call inner = 4;
          google.protobuf.Timestamp at = 5;
        }}
        service BadService {{ {methods} }}"#
    );
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("bad.proto"), proto).unwrap();
    let mut compiler = protox::Compiler::new([directory.path(), "proto".as_ref()]).unwrap();
    compiler.include_imports(true).open_files(["bad.proto"]).unwrap();
    let descriptors = compiler.encode_file_descriptor_set();
    Transcode::new(&descriptors, Limits::default()).map(drop).map_err(|error| error.to_string())
}

fn unary(rule: &str) -> String {
    format!("rpc Do(Call) returns (Call) {{ option (google.api.http) = {{ {rule} }}; }}")
}

#[test]
fn a_wrong_annotation_fails_the_start() {
    assert_eq!(start(&unary(r#"get: "/v1/{id}""#)), Ok(()));
    for (rule, part) in [
        (r#"get: "/v1/{many}""#, "many"),
        (r#"get: "/v1/{map}""#, "map"),
        (r#"get: "/v1/{inner}""#, "inner"),
        (r#"get: "/v1/{at}""#, "at"),
        (r#"get: "/v1/{nope}""#, "nope"),
        (r#"get: "/v1/{id=**}/x""#, "** stands last"),
        (r#"get: "v1""#, "starts with /"),
        (r#"get: """#, "names no path"),
        (r#"post: "/v1" body: "nope""#, "nope"),
        (r#"post: "/v1" body: "many""#, "many"),
        (r#"get: "/v1" response_body: "nope""#, "nope"),
        (r#"get: "/v1/{id}" additional_bindings { get: "/v1/{id}" }"#, "its route is that of"),
    ] {
        let error = start(&unary(rule)).unwrap_err();
        assert!(error.contains("BadService.Do") && error.contains(part), "{rule}: {error}");
    }
    let twins = r#"rpc A(Call) returns (Call) { option (google.api.http) = { get: "/v1/{id}" }; }
        rpc B(Call) returns (Call) { option (google.api.http) = { get: "/v1/{inner.id}" }; }"#;
    assert!(start(twins).unwrap_err().contains("BadService.B"));
    let upload = r#"rpc Do(stream Call) returns (Call) { option (google.api.http) = { post: "/v1" body: "*" }; }"#;
    assert!(start(upload).unwrap_err().contains("client stream"));
    let status = unary(r#"get: "/v1""#).replace("};", "}; option (shortkit.rest.v1.http_status) = 404;");
    assert!(start(&status).unwrap_err().contains("404"));
}
