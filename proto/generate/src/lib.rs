//! From the schema to the checked-in code, without protoc: protox compiles, tonic-prost-build writes.
//!
//! Two programs share it: `cargo gen`, which writes the files, and iommu-proto's test `schema`, which compares them in memory and so
//! never touches the tree. It is a crate of its own, so that it runs while iommu-proto does not compile for want of new code.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use prost::Message as _;
use prost_types::FileDescriptorSet;

/// The directory of iommu-proto, which holds the schema.
pub const PROTO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// One checked-in file.
#[derive(Debug)]
pub struct Generated {
    /// Its name in `src/generated`.
    pub name: &'static str,
    /// What it must hold.
    pub content: Vec<u8>,
}

/// The schema's files, in the order of their names.
pub fn schema_files() -> io::Result<Vec<PathBuf>> {
    let directory = Path::new(PROTO).join("iommu/v1");
    let mut files = fs::read_dir(directory)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "proto"));
    files.sort();
    Ok(files)
}

/// The schema compiled, comments included.
pub fn compile() -> io::Result<FileDescriptorSet> {
    let mut compiler = protox::Compiler::new([PROTO]).map_err(io::Error::other)?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(schema_files()?).map_err(io::Error::other)?;
    Ok(compiler.file_descriptor_set())
}

/// What `src/generated` must hold. `scratch` is an empty directory for the code writer.
pub fn generate(scratch: &Path) -> io::Result<Vec<Generated>> {
    let mut descriptors = compile()?;
    tonic_prost_build::configure()
        .out_dir(scratch)
        // Payloads stay slices of the received frame instead of being copied out of it.
        .bytes(".iommu.v1")
        .codec_path("crate::codec::WireCodec")
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors.clone())?;
    let code = fs::read(scratch.join("iommu.v1.rs"))?;
    // Reflection has no use for comments and positions.
    for file in &mut descriptors.file {
        file.source_code_info = None;
    }
    Ok(vec![
        Generated { name: "iommu.v1.rs", content: code },
        Generated { name: "descriptor.bin", content: descriptors.encode_to_vec() },
    ])
}
