//! The checked-in code is what the schema gives, and the schema explains itself: everything in it has a comment, and names
//! follow the rules.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto};

/// Field numbers of descriptor.proto, of which the paths of source locations are made.
mod path {
    pub(crate) const FILE_MESSAGE: i32 = 4;
    pub(crate) const FILE_ENUM: i32 = 5;
    pub(crate) const FILE_SERVICE: i32 = 6;
    pub(crate) const MESSAGE_FIELD: i32 = 2;
    pub(crate) const MESSAGE_NESTED: i32 = 3;
    pub(crate) const MESSAGE_ENUM: i32 = 4;
    pub(crate) const ENUM_VALUE: i32 = 2;
    pub(crate) const SERVICE_METHOD: i32 = 2;
}

/// Every path that must have a comment, with the name of what stands there.
fn documented(file: &FileDescriptorProto) -> Vec<(Vec<i32>, String)> {
    let mut all = Vec::new();
    for (index, message) in (0..).zip(&file.message_type) {
        of_message(vec![path::FILE_MESSAGE, index], message, "", &mut all);
    }
    for (index, enumeration) in (0..).zip(&file.enum_type) {
        of_enum(vec![path::FILE_ENUM, index], enumeration, &mut all);
    }
    for (index, service) in (0..).zip(&file.service) {
        all.push((vec![path::FILE_SERVICE, index], service.name().to_owned()));
        for (method_index, method) in (0..).zip(&service.method) {
            let at = vec![path::FILE_SERVICE, index, path::SERVICE_METHOD, method_index];
            all.push((at, format!("{}.{}", service.name(), method.name())));
        }
    }
    all
}

fn of_message(at: Vec<i32>, message: &DescriptorProto, outer: &str, all: &mut Vec<(Vec<i32>, String)>) {
    // The entries of a map are made by the compiler.
    if message.options.as_ref().is_some_and(|options| options.map_entry()) {
        return;
    }
    let name = format!("{outer}{}", message.name());
    for (index, field) in (0..).zip(&message.field) {
        let field_at = [&*at, &[path::MESSAGE_FIELD, index]].concat();
        all.push((field_at, format!("{name}.{}", field.name())));
    }
    for (index, nested) in (0..).zip(&message.nested_type) {
        of_message([&*at, &[path::MESSAGE_NESTED, index]].concat(), nested, &format!("{name}."), all);
    }
    for (index, enumeration) in (0..).zip(&message.enum_type) {
        of_enum([&*at, &[path::MESSAGE_ENUM, index]].concat(), enumeration, all);
    }
    all.push((at, name));
}

fn of_enum(at: Vec<i32>, enumeration: &EnumDescriptorProto, all: &mut Vec<(Vec<i32>, String)>) {
    for (index, value) in (0..).zip(&enumeration.value) {
        all.push(([&*at, &[path::ENUM_VALUE, index]].concat(), value.name().to_owned()));
    }
    all.push((at, enumeration.name().to_owned()));
}

#[test]
fn everything_in_the_schema_has_a_comment() {
    let descriptors = schema_generator::compile().expect("the schema compiles");
    let mut bare = Vec::new();
    let mut count = 0;
    for file in descriptors.file.iter().filter(|file| file.package() == "iommu.v1") {
        let source = file.source_code_info.as_ref().expect("compiled with source positions");
        let commented: HashSet<&[i32]> = source
            .location
            .iter()
            .filter(|location| !location.leading_comments().trim().is_empty())
            .map(|location| &*location.path)
            .collect();
        for (at, name) in documented(file) {
            count += 1;
            if !commented.contains(&*at) {
                bare.push(format!("{}: {name}", file.name()));
            }
        }
    }
    assert!(bare.is_empty(), "without a comment:\n{}", bare.join("\n"));
    assert!(count > 400, "the walk over the schema reached only {count} names");
}

#[test]
fn names_follow_the_rules() {
    let descriptors = schema_generator::compile().expect("the schema compiles");
    for file in descriptors.file.iter().filter(|file| file.package() == "iommu.v1") {
        for enumeration in &file.enum_type {
            let zero = enumeration.value.first().expect("an enum has a value");
            assert!(zero.number() == 0 && zero.name().ends_with("_UNSPECIFIED"), "{}", enumeration.name());
        }
        for method in file.service.iter().flat_map(|service| &service.method) {
            // The stream of a device is an envelope each way, and a bare machine's MMIO is the driver's.
            if method.name() == "Attach" {
                continue;
            }
            assert!(method.input_type().ends_with("Request"), "{}", method.name());
            assert!(method.output_type().ends_with("Response"), "{}", method.name());
        }
    }
}

#[test]
fn the_checked_in_code_is_fresh() {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("generated");
    fs::create_dir_all(&scratch).expect("cargo's scratch directory is writable");
    for file in schema_generator::generate(&scratch).expect("the schema compiles") {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/generated").join(file.name);
        let checked_in = fs::read(&path).expect("generated files are checked in");
        assert!(
            checked_in == file.content,
            "{} is stale: the schema has changed since; run `cargo gen` and commit what it writes",
            file.name
        );
    }
}
