//! The rules of the house, as tests over the tree itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};

fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .other_options(vec!["--offline".to_owned()])
        .no_deps()
        .exec()
        .expect("cargo metadata describes the workspace")
}

fn floor(package: &Package) -> u64 {
    package.metadata["iommu"]["floor"]
        .as_u64()
        .unwrap_or_else(|| panic!("{} names no floor: add [package.metadata.iommu] floor = N", package.name))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Every file below `directory` that is ours: no build output, no version control.
fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).expect("the tree is readable") {
        let path = entry.expect("the tree is readable").path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if matches!(name, "target" | ".git") {
            continue;
        }
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

fn sources() -> Vec<(PathBuf, String)> {
    let mut all = Vec::new();
    files(&root(), &mut all);
    all.retain(|path| path.extension().is_some_and(|e| e == "rs"));
    all.retain(|path| !path.components().any(|c| c.as_os_str() == "generated"));
    assert!(all.len() > 50, "the walk found the tree");
    all.into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).expect("sources are UTF-8");
            (path, text)
        })
        .collect()
}

#[test]
fn a_crate_depends_only_on_strictly_lower_floors() {
    let metadata = metadata();
    let floors: BTreeMap<&str, u64> = metadata.packages.iter().map(|p| (p.name.as_str(), floor(p))).collect();
    assert!(floors.len() >= 16, "all members are seen");
    for package in &metadata.packages {
        for dependency in &package.dependencies {
            let Some(&below) = floors.get(dependency.name.as_str()) else { continue };
            assert!(
                below < floors[package.name.as_str()],
                "{} (floor {}) depends on {} (floor {below})",
                package.name,
                floors[package.name.as_str()],
                dependency.name,
            );
        }
    }
}

#[test]
fn the_floors_below_the_service_have_no_runtime_and_no_wire() {
    for package in metadata().packages.iter().filter(|p| {
        matches!(
            p.name.as_str(),
            "iommu-types" | "mapped-atomics" | "iommu-pki" | "iommu-hardware" | "iommu-kernel"
        )
    }) {
        for dependency in package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal) {
            let name = dependency.name.as_str();
            assert!(
                !["tokio", "tonic", "prost", "tracing", "iommu-proto"].contains(&name),
                "{} depends on {name}",
                package.name
            );
        }
    }
}

#[test]
fn agents_and_the_sdk_see_neither_hardware_nor_kernel() {
    for package in &metadata().packages {
        if !["device-runtime", "guest-sdk", "dma-engine", "rogue", "iommuctl"]
            .contains(&package.name.as_str())
        {
            continue;
        }
        for dependency in &package.dependencies {
            let name = dependency.name.as_str();
            assert!(
                !["iommu-hardware", "iommu-kernel", "iommu-server"].contains(&name),
                "{} depends on {name}: what it knows of the server is the wire",
                package.name
            );
        }
    }
}

#[test]
fn versions_stand_in_the_workspace_table_only() {
    for package in &metadata().packages {
        let text = std::fs::read_to_string(&package.manifest_path).expect("manifests are readable");
        for line in text.lines() {
            let pinned = line.contains("version = \"")
                || line.split_once(" = \"").is_some_and(|(_, v)| {
                    v.starts_with(|c: char| c.is_ascii_digit() || c == '^' || c == '=')
                });
            assert!(!pinned, "{} pins a version: {line}", package.name);
        }
        assert!(
            text.contains("[lints]\nworkspace = true") || package.name.as_str() == "mapped-atomics",
            "{} does not take the workspace's lints",
            package.name
        );
    }
}

#[test]
fn one_copy_of_each_wire_and_runtime_crate() {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).expect("the lock file is checked in");
    for name in ["tonic", "prost", "tower", "hyper", "tokio", "h2", "rustls", "axum"] {
        let copies = lock.matches(&format!("name = \"{name}\"\n")).count();
        assert!(copies <= 1, "{copies} versions of {name} in the lock file");
    }
}

#[test]
fn unsafe_code_is_in_one_crate_only() {
    for (path, text) in sources() {
        if path.components().any(|c| c.as_os_str() == "mapped-atomics") || path.ends_with("house.rs") {
            continue;
        }
        let found = text.lines().find(|l| !l.trim_start().starts_with("//") && l.contains("unsafe {"));
        assert!(found.is_none(), "{}: {found:?}", path.display());
    }
}

#[test]
fn nothing_bears_a_banned_name() {
    const BANNED: [&str; 9] =
        ["Manager", "Handler", "Helper", "Util", "Utils", "Common", "Misc", "Info", "Data"];
    for (path, text) in sources() {
        let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default().to_lowercase();
        assert!(!BANNED.iter().any(|b| stem == b.to_lowercase()), "{} bears a banned name", path.display());
        for line in text.lines() {
            let words: Vec<&str> = line.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
            for pair in words.windows(2).filter(|pair| matches!(pair[0], "struct" | "enum" | "trait")) {
                assert!(
                    !BANNED.iter().any(|b| pair[1].ends_with(b)),
                    "{}: {} bears a banned name",
                    path.display(),
                    pair[1]
                );
            }
        }
    }
}

#[test]
fn every_source_file_says_what_it_is() {
    for (path, text) in sources() {
        assert!(text.starts_with("//!"), "{} does not open with what it is", path.display());
    }
}

#[test]
fn no_file_outgrows_its_purpose() {
    /// Production lines a file may have; see STYLE in CONTRIBUTING.md. The style asks for 400; this is the wall behind it.
    const PRODUCTION_LINES_MAX: usize = 600;
    for (path, text) in sources() {
        let is_test = |c: std::path::Component<'_>| {
            ["tests", "tests.rs", "benches"].iter().any(|name| c.as_os_str() == *name)
        };
        if path.components().any(is_test) {
            continue;
        }
        let lines = text.lines().take_while(|line| !line.contains("#[cfg(test)]")).count();
        assert!(lines <= PRODUCTION_LINES_MAX, "{} has {lines} production lines", path.display());
    }
}

#[test]
fn nothing_unfinished_is_left_behind() {
    let marks = ["TODO", "FIXME", "XXX", "todo!(", "unimplemented!(", "#[ignore"];
    for (path, text) in sources() {
        if path.ends_with("house.rs") {
            continue;
        }
        for mark in marks {
            assert!(!text.contains(mark), "{} has a {mark}", path.display());
        }
    }
}

#[test]
fn i1_to_i10_are_each_held_by_a_test_that_names_them() {
    let sources = sources();
    let architecture =
        std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md is there");
    for invariant in 1..=10 {
        let prefix = format!("fn i{invariant}_");
        assert!(
            sources.iter().any(|(path, text)| !path.ends_with("house.rs") && text.contains(&prefix)),
            "no test is named {prefix}..."
        );
        assert!(
            architecture.contains(&format!("**I{invariant}**")),
            "ARCHITECTURE.md does not print I{invariant}"
        );
    }
    // Every test that the table names exists.
    let named: Vec<&str> = architecture
        .split('`')
        .filter(|word| {
            word.len() > 3 && word.starts_with('i') && word[1..2].chars().all(|c| c.is_ascii_digit())
        })
        .filter(|word| word.contains('_'))
        .collect();
    assert!(named.len() >= 8, "ARCHITECTURE.md names the tests that hold the invariants");
    for name in named {
        assert!(
            sources.iter().any(|(_, text)| text.contains(&format!("fn {name}("))),
            "ARCHITECTURE.md names the test {name}, which does not exist"
        );
    }
}

#[test]
fn links_in_the_documents_lead_somewhere() {
    let mut all = Vec::new();
    files(&root(), &mut all);
    let mut checked = 0;
    for path in all.iter().filter(|path| path.extension().is_some_and(|e| e == "md")) {
        let text = std::fs::read_to_string(path).expect("documents are UTF-8");
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if target.contains("://") || target.starts_with('#') {
                continue;
            }
            let file = target.split('#').next().unwrap_or_default();
            let full = path.parent().expect("files have a parent").join(file);
            assert!(full.exists(), "{} links to {target}, which is not there", path.display());
            checked += 1;
        }
    }
    assert!(checked > 10, "links were found");
}
