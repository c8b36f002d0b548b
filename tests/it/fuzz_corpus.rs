//! What the fuzzer found worth keeping, through the same code as `fuzz/run`.

#[path = "../../fuzz/src/entry/mod.rs"]
#[expect(unreachable_pub, reason = "the fuzz targets use it")]
mod entry;

use std::{fs, path::Path};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

#[test]
fn the_corpus_holds() {
    for (target, run) in entry::TARGETS {
        let files: Vec<_> = fs::read_dir(Path::new(ROOT).join("fuzz/corpus").join(target)).unwrap().collect();
        assert!(files.len() >= 10, "{target}: {} files", files.len());
        for file in files {
            run(&fs::read(file.unwrap().path()).unwrap());
        }
    }
}
