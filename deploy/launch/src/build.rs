//! Asks cargo for the binaries.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use cargo_metadata::Message;

/// Where the freshly built binaries are.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// `iommu-server`.
    pub server: PathBuf,
    /// `dma-engine`.
    pub dma_engine: PathBuf,
    /// `rogue`.
    pub rogue: PathBuf,
    /// `iommuctl`.
    pub iommuctl: PathBuf,
    /// The program that asked, when it was built [beside](binaries_beside) the others. It may have been built anew just now, so this is
    /// what to start for further processes of it, not the file that is running.
    pub caller: Option<PathBuf>,
}

/// Packages whose binary is wanted; each has one of the same name.
const PACKAGES: [&str; 4] = ["iommu-server", "dma-engine", "rogue", "iommuctl"];

/// Builds the binaries in the profile of the running program and says where they are. Blocks; cargo's progress goes to standard error.
pub fn binaries() -> anyhow::Result<Binaries> {
    build(None)
}

/// As [`binaries`], built together with the package of the caller, whose binary has the same name: cargo then gives all of them the same
/// features of their dependencies, and what was compiled for the caller is not compiled again.
pub fn binaries_beside(caller: &str) -> anyhow::Result<Binaries> {
    build(Some(caller))
}

fn build(caller: Option<&str>) -> anyhow::Result<Binaries> {
    let profile = own_profile()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    // What cargo tells a test or `cargo run` of its own package is not for the next cargo: a build script that reads one of these (ring's does)
    // would run again, and everything above it be compiled again, each time that the two take turns.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(is_of_a_package) {
            command.env_remove(name);
        }
    }
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.args([
        "build",
        "--quiet",
        "--bins",
        "--message-format=json-render-diagnostics",
        "--profile",
        &profile,
    ]);
    for package in caller.into_iter().chain(PACKAGES) {
        command.args(["--package", package]);
    }
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("run cargo to build the binaries; is cargo on the PATH?")?;
    if !output.status.success() {
        bail!("cargo could not build the binaries ({}); its messages stand above", output.status);
    }
    let mut built = Vec::new();
    for message in Message::parse_stream(output.stdout.as_slice()) {
        if let Message::CompilerArtifact(artifact) = message.context("read cargo's messages")? {
            built.extend(artifact.executable.map(|path| (artifact.target.name, path.into_std_path_buf())));
        }
    }
    let find = |name: &str| {
        built
            .iter()
            .find(|(target, _)| target == name)
            .map(|(_, path)| path.clone())
            .with_context(|| format!("cargo built no binary {name}"))
    };
    Ok(Binaries {
        server: find("iommu-server")?,
        dma_engine: find("dma-engine")?,
        rogue: find("rogue")?,
        iommuctl: find("iommuctl")?,
        caller: caller.map(find).transpose()?,
    })
}

/// Whether cargo sets this variable for the package that it runs something of.
fn is_of_a_package(variable: &str) -> bool {
    let prefixes = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_"];
    prefixes.iter().any(|prefix| variable.starts_with(prefix))
}

/// The profile that this program was built in, from the directory that cargo put it into.
fn own_profile() -> anyhow::Result<String> {
    let own = std::env::current_exe().context("find this program's own path")?;
    let mut directory = own.parent();
    if directory.and_then(|d| d.file_name()).is_some_and(|name| name == "deps") {
        directory = directory.and_then(|d| d.parent());
    }
    let name = directory.and_then(|d| d.file_name()).and_then(|name| name.to_str());
    let name = name.with_context(|| format!("{} is not in a cargo target directory", own.display()))?;
    Ok(if name == "debug" { "dev".to_owned() } else { name.to_owned() })
}
