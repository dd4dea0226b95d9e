//! The documents say what is so: every test that they name exists, and every file that they link to.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

fn documents() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        ["README.md", "CONTRIBUTING.md", "SECURITY.md"].map(PathBuf::from).into();
    for folder in ["docs", "findings"] {
        for entry in fs::read_dir(folder).unwrap() {
            found.push(entry.unwrap().path());
        }
    }
    found.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    found
}

/// What stands between `before` and the next of `after`, everywhere in `text`.
fn between<'a>(text: &'a str, before: &str, after: &[char]) -> Vec<&'a str> {
    text.split(before).skip(1).filter_map(|rest| rest.split(after).next()).collect()
}

#[test]
fn every_test_that_a_document_names_exists() {
    let mut named = 0;
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for name in between(&text, "`tests/", &['`']) {
            let (file, function) = name.split_once("::").unwrap_or((name, ""));
            let source = fs::read_to_string(Path::new("tests").join(file));
            let source =
                source.unwrap_or_else(|e| panic!("{}: tests/{file}: {e}", document.display()));
            let found = function.is_empty() || source.contains(&format!("fn {function}("));
            assert!(found, "{}: tests/{file} has no {function}", document.display());
            named += 1;
        }
    }
    assert!(named > 50, "only {named} tests are named");
}

#[test]
fn every_file_that_a_document_links_to_exists() {
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for link in between(&text, "](", &[')', '#']) {
            let local = !link.is_empty() && !link.contains("://");
            let target = document.parent().unwrap().join(link);
            assert!(!local || target.exists(), "{} links to {link}", document.display());
        }
    }
}

#[test]
fn every_source_file_that_the_format_tables_name_exists() {
    let text = fs::read_to_string("docs/formats.md").unwrap();
    let mut folder = "";
    for line in text.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            folder = between(heading, "`", &['`']).first().copied().unwrap();
        }
        let Some(files) = line.strip_prefix('|').and_then(|row| row.rsplit('|').nth(1)) else {
            continue;
        };
        for (index, file) in files.split('`').enumerate() {
            let path = Path::new(folder).join(file);
            assert!(index % 2 == 0 || path.exists(), "{} does not exist", path.display());
        }
    }
}
