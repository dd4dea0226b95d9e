//! Flat files of a live mount, as people use them first.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::path::Path;

use live::{Mount, can_mount, create, flatdisk, outcome, scratch, succeed};
use serde_json::Value;

fn json(arguments: &[&str], path: &Path) -> Value {
    let printed = succeed(flatdisk().args(arguments).arg("--json").arg(path));
    serde_json::from_str(&printed).unwrap()
}

#[test]
fn a_flat_file_stands_for_its_image() {
    if !can_mount() {
        return;
    }
    let (images, elsewhere) = (scratch(), scratch());
    let folder = images.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    let (base, child) = (folder.join("base.vhdx"), folder.join("child.avhdx"));
    create(&base, "8M", &[]);
    let mount = Mount::new(images.path(), &[]);
    let flat = |name: &str| mount.path().join(format!("folder/{name}.img"));
    let of = |path: &Path| path.to_str().unwrap().to_owned();
    let made = succeed(
        flatdisk().args(["create", "--json", "--parent"]).arg(flat("base.vhdx")).arg(&child),
    );
    assert_eq!(serde_json::from_str::<Value>(&made).unwrap()["parent"], of(&base));
    assert_eq!(json(&["info"], &flat("base.vhdx"))["images"][0]["filename"], of(&base));
    assert_eq!(json(&["check"], &flat("child.avhdx")), json(&["check"], &child));
    let link = elsewhere.path().join("link");
    std::os::unix::fs::symlink(flat("child.avhdx"), &link).unwrap();
    assert_eq!(json(&["map"], &link), json(&["map"], &child));
    let since = flat("base.vhdx");
    assert_eq!(json(&["map", "--since", since.to_str().unwrap()], &child), Value::Array(vec![]));
    // What only looks like a flat file is no image.
    std::fs::write(images.path().join("text.vhdx"), "text").unwrap();
    let text = outcome(flatdisk().arg("info").arg(mount.path().join("text.vhdx.error.txt")));
    assert_eq!(text.status.code(), Some(1));
    assert!(mount.unmount().success());
}
