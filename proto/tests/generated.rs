//! The checked-in code is what the schema gives.

#[path = "../examples/generator/mod.rs"]
mod generator;

use std::fs;
use std::path::Path;

#[test]
fn the_checked_in_code_is_fresh() {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("generated");
    fs::create_dir_all(&scratch).expect("cargo's scratch directory is writable");
    for file in generator::generate(&scratch).expect("the schema compiles") {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/generated").join(file.name);
        let checked_in = fs::read(&path).expect("generated files are checked in");
        assert!(
            checked_in == file.content,
            "{} is stale: the schema has changed since; run `cargo gen` and commit what it writes",
            file.name
        );
    }
}
