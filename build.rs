//! Compiles `proto/` into tonic services and the descriptor set that REST and reflection read. Needs no `protoc`.

use std::{env, fs, path::PathBuf};

use protox::prost::Message;

const ROOT: &str = "proto";
const FILES: [&str; 3] = [
    "proto/shortkit/webhooks/v1/webhook_service.proto",
    "proto/shortkit/webhooks/v1/delivery_service.proto",
    "proto/shortkit/webhooks/v1/audit_service.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={ROOT}");
    let mut compiler = protox::Compiler::new([ROOT])?;
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;

    // Encoded by protox: the typed set of prost-types would lose the extension options that REST is built from.
    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(&descriptors, compiler.encode_file_descriptor_set())?;

    tonic_prost_build::configure().codec_path("crate::grpc::Protobuf").compile_fds(
        protox::prost_reflect::prost_types::FileDescriptorSet::decode(
            compiler.encode_file_descriptor_set().as_slice(),
        )?,
    )?;
    Ok(())
}
