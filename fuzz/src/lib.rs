//! What the fuzz targets run. The kept corpus goes through the same code in the tests: `tests/it/fuzz_corpus.rs`.

pub mod entry;

/// Where the project is.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
