//! Which layer may name which: the picture in the crate's documentation, kept true.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// For each top-level module what it may name. `error`, `codec`, `names` and `progress` stand beside
/// all of them.
const ALLOWED: [(&str, &[&str]); 12] = [
    ("error", &[]),
    ("names", &[]),
    ("progress", &[]),
    ("codec", &["storage"]),
    ("storage", &[]),
    ("disk", &["storage"]),
    ("formats", &["storage", "disk"]),
    ("volumes", &["storage", "disk"]),
    ("copy", &["storage", "disk", "formats"]),
    ("fuse", &["storage", "disk", "formats", "volumes"]),
    ("cli", &["storage", "disk", "formats", "volumes", "copy", "fuse"]),
    ("main", &["cli"]),
];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The modules that lines of code name as `crate::module`, braces included, comments excluded.
fn named(text: &str) -> Vec<String> {
    let code: String = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n");
    let mut names = Vec::new();
    for after in code.split("crate::").skip(1) {
        match after.strip_prefix('{') {
            Some(list) => {
                let list = list.split(';').next().unwrap_or_default();
                let mut depth = 0;
                let mut name = String::new();
                for c in list.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' | ',' if depth == 0 => names.push(std::mem::take(&mut name)),
                        '}' => depth -= 1,
                        c if depth == 0 => name.push(c),
                        _ => {}
                    }
                }
            }
            None => names.push(after.to_owned()),
        }
    }
    let first = |name: String| {
        let end = name.trim().find(|c: char| !c.is_alphanumeric() && c != '_');
        name.trim()[..end.unwrap_or(name.trim().len())].to_owned()
    };
    names.into_iter().map(first).filter(|name| !name.is_empty()).collect()
}

#[test]
fn names_in_braces_and_paths_are_found_and_comments_are_not() {
    let text = "use crate::{disk::Disk, error::{Error, Result}};\n// crate::cli\nlet x = crate::fuse::y();";
    assert_eq!(named(text), ["disk", "error", "fuse"]);
}

#[test]
fn layers_name_only_what_lies_below_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 15);
    let mut wrong = Vec::new();
    for file in files {
        let relative = file.strip_prefix(&root).unwrap();
        let layer = relative.components().next().unwrap().as_os_str().to_str().unwrap();
        let layer = layer.strip_suffix(".rs").unwrap_or(layer);
        if layer == "lib" {
            continue;
        }
        let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == layer) else {
            wrong.push(format!("{}: `{layer}` is not in the picture", relative.display()));
            continue;
        };
        let text = fs::read_to_string(&file).unwrap();
        for name in named(&text) {
            // Names that begin with a capital are re-exports of `error`.
            let beside = ["error", "codec", "names", "progress", layer].contains(&&*name);
            if !beside && !name.starts_with(char::is_uppercase) && !allowed.contains(&&*name) {
                wrong.push(format!("{}: `{layer}` names `{name}`", relative.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn formats_do_not_name_each_other() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/formats");
    let formats = ["vhd", "vhdx", "vmdk"];
    let mut wrong = Vec::new();
    for format in formats {
        let mut files = Vec::new();
        sources(&root.join(format), &mut files);
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for other in formats.iter().filter(|other| **other != format) {
                let names = |line: &str| {
                    let line = line.split("//").next().unwrap_or_default();
                    line.contains(&format!("formats::{other}::"))
                        || line.contains(&format!("super::{other}::"))
                };
                if text.lines().any(names) {
                    wrong.push(format!("{} names {other}", file.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The directories of modules below `dir`, itself included.
fn rooms(dir: &Path, found: &mut Vec<PathBuf>) {
    if dir.join("mod.rs").is_file() {
        found.push(dir.to_owned());
    }
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rooms(&path, found);
        }
    }
}

#[test]
fn the_first_page_of_a_module_names_its_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut all = Vec::new();
    rooms(&root, &mut all);
    assert!(all.len() > 15);
    let mut wrong = Vec::new();
    for room in all {
        let text = fs::read_to_string(room.join("mod.rs")).unwrap();
        let page: String = text.lines().filter(|line| line.starts_with("//!")).collect();
        for entry in fs::read_dir(&room).unwrap() {
            let path = entry.unwrap().path();
            let is_module = path.is_dir() && path.join("mod.rs").is_file()
                || path.extension().is_some_and(|extension| extension == "rs");
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            if is_module && name != "mod" && !page.contains(&format!("`{name}`")) {
                wrong.push(format!("{}: does not name `{name}`", room.join("mod.rs").display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
