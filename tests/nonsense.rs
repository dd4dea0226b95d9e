//! Nonsense as input: one line saying what is wrong, the right exit status, nothing left behind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs;
use std::path::Path;
use std::process::Command;

use live::{create, flatdisk, is_mounted, outcome, scratch};

/// Runs a command that must fail with `status` and one line on standard error, and returns the line.
fn refused(command: &mut Command, status: i32) -> String {
    let output = outcome(command);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{command:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{command:?}: {text}");
    assert!(text.starts_with("flatdisk: "), "{text}");
    text
}

fn mount(source: &Path, point: &Path) -> Command {
    let mut command = flatdisk();
    command.arg("mount").arg(source).arg(point);
    command
}

/// Files that are no images, each with a word its error must contain.
fn bad_files(folder: &Path) -> Vec<(std::path::PathBuf, &'static str)> {
    let good = folder.join("good.vhdx");
    create(&good, "8M", &[]);
    let header = fs::read(&good).unwrap()[..100_000].to_vec();
    fs::remove_file(&good).unwrap();
    let cases: [(&str, &[u8], &str); 5] = [
        ("empty.vhd", b"", "empty"),
        ("text.vmdk", b"just some words\n", "not a"),
        ("short.vhdx", &header, "past the end"),
        ("zeroes.vhd", &[0; 4096], "not a"),
        ("line.vmdk", b"# Disk DescriptorFile\nversion=1\n", ""),
    ];
    cases
        .into_iter()
        .map(|(name, bytes, word)| {
            let path = folder.join(name);
            fs::write(&path, bytes).unwrap();
            (path, word)
        })
        .collect()
}

#[test]
fn files_that_are_no_images_are_refused_with_their_name() {
    let folder = scratch();
    for (path, word) in bad_files(folder.path()) {
        let line = refused(flatdisk().arg("info").arg(&path), 1);
        assert!(line.contains(path.to_str().unwrap()) && line.contains(word), "{line}");
    }
    let line = refused(flatdisk().arg("info").arg(folder.path()), 1);
    assert!(line.contains("directory"), "{line}");
    let line = refused(flatdisk().arg("info").arg(folder.path().join("absent.vhd")), 1);
    assert!(line.contains("no such file"), "{line}");
    refused(flatdisk().args(["create", "--size", "1000"]).arg(folder.path().join("x.vhd")), 1);
    refused(flatdisk().args(["create", "--size", "1M"]).arg(folder.path().join("x.raw")), 1);
    assert!(!folder.path().join("x.vhd").exists());
}

#[test]
fn an_existing_file_is_never_overwritten_by_create() {
    let folder = scratch();
    for name in ["a.vhd", "a.vhdx", "a.vmdk"] {
        let path = folder.path().join(name);
        fs::write(&path, "precious").unwrap();
        let line = refused(flatdisk().args(["create", "--size", "8M"]).arg(&path), 1);
        assert!(line.contains("exists"), "{line}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}

#[test]
fn mounting_what_cannot_be_mounted_fails_with_status_32() {
    if !live::can_mount() {
        return;
    }
    let (folder, point) = (scratch(), scratch());
    for (path, _) in bad_files(folder.path()) {
        let line = refused(&mut mount(&path, point.path()), 32);
        assert!(line.contains(path.to_str().unwrap()), "{line}");
        assert!(!is_mounted(point.path()));
    }
    let absent = folder.path().join("absent");
    assert!(refused(&mut mount(&absent, point.path()), 32).contains("absent"));
    let good = folder.path().join("good.vhd");
    create(&good, "8M", &[]);
    assert!(refused(&mut mount(&good, &absent), 32).contains("absent"));
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(refused(&mut mount(&good, &file), 32).contains("file"));
    refused(flatdisk().args(["mount", "-o", "no_such_option"]).arg(&good).arg(point.path()), 1);
    assert!(!is_mounted(point.path()));
    let twice = folder.path().join("sub");
    fs::create_dir(&twice).unwrap();
    fs::copy(&good, twice.join("good.vhd")).unwrap();
    let line = refused(
        flatdisk().arg("mount").arg(&good).arg(twice.join("good.vhd")).arg(point.path()),
        32,
    );
    assert!(line.contains("good.vhd") && line.contains("sub/good.vhd"), "{line}");
}

#[test]
fn a_mount_point_in_use_is_refused_and_stays_as_it_is() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    create(&folder.path().join("a.vhd"), "8M", &[]);
    let mounted = live::Mount::new(folder.path(), &[]);
    refused(&mut mount(folder.path(), mounted.path()), 32);
    assert!(mounted.flat("a.vhd").exists());
    assert!(mounted.unmount().success());
}

#[test]
fn an_image_that_cannot_be_opened_shows_as_a_text_that_says_why() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    let bad = bad_files(folder.path());
    create(&folder.path().join("good.vhd"), "8M", &[]);
    let mounted = live::Mount::new(folder.path(), &[]);
    let mut names: Vec<_> = fs::read_dir(mounted.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "empty.vhd.error.txt",
            "good.vhd.img",
            "line.vmdk.error.txt",
            "short.vhdx.error.txt",
            "text.vmdk.error.txt",
            "zeroes.vhd.error.txt"
        ]
    );
    for (path, word) in bad {
        let name = path.file_name().unwrap().to_str().unwrap();
        let text = fs::read_to_string(mounted.path().join(format!("{name}.error.txt"))).unwrap();
        assert!(text.contains(name) && text.contains(word), "{text}");
        assert!(!mounted.flat(name).exists());
    }
    assert!(mounted.unmount().success());
}

#[test]
fn without_dev_fuse_the_error_says_so() {
    if !live::can_mount() || !live::have(&["unshare"]) {
        return;
    }
    let folder = scratch();
    let point = scratch();
    create(&folder.path().join("a.vhd"), "8M", &[]);
    // A mount namespace of its own, in which something else covers /dev.
    let script = r#"mount -t tmpfs none /dev && exec "$FLATDISK" mount "$FROM" "$TO" 2>&1"#;
    let output = live::in_namespace(script, &[("FROM", &folder.path()), ("TO", &point.path())]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(32), "{text}");
    assert!(text.contains("/dev/fuse") && text.lines().count() == 1, "{text}");
}
