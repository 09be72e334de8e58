//! Writes the checked-in code again: `cargo gen`, after a change of the schema.

use std::fs;
use std::io;
use std::path::Path;

fn main() -> io::Result<()> {
    let directory = Path::new(schema_generator::PROTO).join("src/generated");
    let scratch = std::env::temp_dir().join(format!("iommu-gen-{}", std::process::id()));
    fs::create_dir_all(&scratch)?;
    let generated = schema_generator::generate(&scratch)?;
    fs::remove_dir_all(&scratch)?;
    fs::create_dir_all(&directory)?;
    for file in generated {
        fs::write(directory.join(file.name), file.content)?;
    }
    Ok(())
}
