//! Writes the checked-in code again: `cargo gen`, after a change of the schema.

#[path = "generator/mod.rs"]
mod generator;

use std::fs;
use std::io;
use std::path::Path;

fn main() -> io::Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/generated");
    let scratch = std::env::temp_dir().join(format!("iommu-gen-{}", std::process::id()));
    fs::create_dir_all(&scratch)?;
    let generated = generator::generate(&scratch)?;
    fs::remove_dir_all(&scratch)?;
    fs::create_dir_all(&directory)?;
    for file in generated {
        fs::write(directory.join(file.name), file.content)?;
    }
    Ok(())
}
