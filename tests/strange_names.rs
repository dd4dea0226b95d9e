//! Images and mount points whose names are no text, or would act on a terminal.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use live::{flatdisk, outcome, scratch};

/// A byte that begins no character, a line's end, and what colours a terminal in two ways.
const NAME: &[u8] = b"a\xff b\n\x1b[31m\xc2\x9b31m";

fn named(dir: &Path, suffix: &str) -> PathBuf {
    dir.join(OsStr::from_bytes(&[NAME, suffix.as_bytes()].concat()))
}

/// Whatever was printed must be lines of plain text.
fn plain(output: &Output) -> String {
    for bytes in [&output.stdout, &output.stderr] {
        let text = std::str::from_utf8(bytes).unwrap();
        let acts = text.chars().find(|c| c.is_control() && *c != '\n');
        assert_eq!(acts, None, "{text:?}");
        assert!(!text.contains("\n\\u{1b}"), "{text:?}");
    }
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn hex(path: &Path) -> String {
    path.as_os_str().as_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn every_command_takes_and_shows_any_name() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    let image = named(dir.path(), ".vhd");
    let other = named(dir.path(), "2.vhdx");
    let point = named(dir.path(), "-mount");
    fs::create_dir(&point).unwrap();
    let good = |arguments: &[&dyn AsRef<OsStr>]| {
        let output = outcome(flatdisk().args(arguments.iter().map(|a| a.as_ref())));
        assert!(output.status.success(), "{output:?}");
        plain(&output)
    };
    good(&[&"create", &"--size", &"8M", &image]);
    good(&[&"create", &"--json", &"--size", &"8M", &other]);
    good(&[&"info", &image]);
    assert!(good(&[&"info", &"--json", &image]).contains(&hex(&image)));
    good(&[&"check", &image]);
    good(&[&"map", &"--json", &image]);

    good(&[&"mount", &image, &point]);
    let flat = named(&point, ".vhd.img");
    let open = File::open(&flat).unwrap();
    let shown = good(&[&"status", &point]);
    assert!(shown.contains("\\n") && shown.contains("1 reading"), "{shown}");
    let json: serde_json::Value =
        serde_json::from_str(&good(&[&"status", &"--json", &point])).unwrap();
    let mount = &json["mounts"][0];
    assert_eq!(mount["mountpoint"]["hex"], hex(&point));
    assert_eq!(mount["images"][0]["image"]["hex"], hex(&image));
    good(&[&"open", &other, &point]);
    let second = named(&point, "2.vhdx.img");
    assert_eq!(fs::metadata(&second).unwrap().len(), 8 << 20);
    good(&[&"close", &second]);
    good(&[&"sync", &point]);
    drop(open);
    live::wait_until("the mount is not in use", || {
        let output = outcome(flatdisk().arg("umount").arg(&point));
        plain(&output);
        output.status.success()
    });

    // What fails says so as plainly.
    for command in ["info", "check", "detach", "sync", "umount"] {
        let output = outcome(flatdisk().arg(command).arg(named(dir.path(), "-absent")));
        assert!(!output.status.success(), "{output:?}");
        plain(&output);
    }
}

#[test]
fn an_image_of_any_name_is_attached_and_detached() {
    if !live::can_mount() || !Path::new("/dev/loop-control").exists() {
        return;
    }
    let dir = scratch();
    let image = named(dir.path(), ".vhdx");
    live::create(&image, "8M", &[]);
    let attach = outcome(flatdisk().arg("attach").arg(&image));
    assert!(attach.status.success(), "{attach:?}");
    let list = outcome(flatdisk().args(["attach", "--list"]));
    let json = outcome(flatdisk().args(["attach", "--list", "--json"]));
    let detach = outcome(flatdisk().arg("detach").arg(&image));
    assert!(detach.status.success(), "{detach:?}");
    assert!(plain(&list).contains("31m"), "{list:?}");
    assert!(plain(&json).contains(&hex(&image)), "{json:?}");
}

/// Such a child could not be opened.
#[test]
fn a_child_is_not_made_of_a_parent_whose_name_it_cannot_hold() {
    let dir = scratch();
    // A VMDK cannot even have such a name.
    for format in ["vhd", "vhdx"] {
        let parent = dir.path().join(format!("new\nline.{format}"));
        let child = dir.path().join(format!("child.{format}"));
        live::create(&parent, "8M", &[]);
        let output = outcome(flatdisk().arg("create").arg("--parent").args([&parent, &child]));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert_eq!(std::str::from_utf8(&output.stderr).unwrap().lines().count(), 1, "{output:?}");
        assert!(!child.exists());
    }
}
