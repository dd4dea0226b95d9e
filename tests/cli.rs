//! The command line's habits: where output goes, what mistakes are told.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use live::{create, flatdisk, outcome, scratch, succeed};

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn version_and_help_are_results() {
    let version = succeed(flatdisk().arg("--version"));
    assert_eq!(version.lines().next(), Some(concat!("flatdisk ", env!("CARGO_PKG_VERSION"))));
    for command in [&[][..], &["mount"], &["check"]] {
        let short = succeed(flatdisk().args(command).arg("-h"));
        let long = succeed(flatdisk().args(command).arg("--help"));
        assert!(!short.contains("Exit status:"), "{short}");
        assert!(long.contains("Examples:") && long.contains("Exit status:"), "{long}");
    }
    let nothing = outcome(&mut flatdisk());
    assert_eq!((nothing.status.code(), nothing.stdout.len()), (Some(1), 0));
}

#[test]
fn colours_come_only_when_wanted() {
    let help = |name: &str, value: &str| {
        outcome(flatdisk().arg("--help").env_remove("NO_COLOR").env(name, value)).stdout
    };
    assert!(!help("LANG", "C").contains(&0x1b));
    assert!(help("CLICOLOR_FORCE", "1").contains(&0x1b));
    let both = outcome(flatdisk().arg("--help").env("NO_COLOR", "1").env("CLICOLOR", "1"));
    assert!(!both.stdout.contains(&0x1b));
}

#[test]
fn json_is_asked_for_in_either_spelling() {
    let dir = scratch();
    let image = dir.path().join("a.vhdx");
    let child = dir.path().join("c.vhdx");
    let created = |spelling: &str, options: &[&Path]| {
        let mut command = flatdisk();
        command.args(["create", spelling]).args(options);
        serde_json::from_str::<serde_json::Value>(&succeed(&mut command)).unwrap()
    };
    let made = created("--json", &["--size=10MB".as_ref(), &image]);
    assert_eq!(made["virtual_size"], 10 << 20);
    let made = created("--output=json", &["--parent".as_ref(), &image, &child]);
    assert_eq!(made["parent"].as_str(), image.to_str());
    for command in [&["info"][..], &["info", "--chain"], &["check"], &["map"]] {
        let answer = |spelling| succeed(flatdisk().args(command).arg(spelling).arg(&child));
        assert_eq!(answer("--json"), answer("--output=json"));
        serde_json::from_str::<serde_json::Value>(&answer("-J")).unwrap();
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error_and_a_full_disk_is_one() {
    let dir = scratch();
    let image = dir.path().join("a.vhd");
    create(&image, "1G", &[]);
    for arguments in [&["completions", "bash"][..], &["map", image.to_str().unwrap()]] {
        let mut child = flatdisk()
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = flatdisk().args(arguments).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("no space left on device"), "{}", stderr(&output));
    }
}

#[test]
fn common_mistakes_are_told_in_one_line() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    create(path("a.vhd").as_ref(), "1M", &[]);
    std::fs::write(path("text"), "no image").unwrap();
    std::fs::write(path("empty.vhd"), "").unwrap();
    let (image, text, empty, absent, folder) =
        (path("a.vhd"), path("text"), path("empty.vhd"), path("absent.vhd"), path(""));
    let told = |arguments: &[&str], status: i32, what: &str| {
        let output = outcome(flatdisk().args(arguments));
        let said = stderr(&output);
        assert!(said.contains(what), "{arguments:?}: {said}");
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty() && said.lines().count() == 1, "{arguments:?}: {said}");
        assert!(said.starts_with("flatdisk: "), "{arguments:?}: {said}");
    };
    for command in ["info", "check", "map"] {
        told(&[command, &absent], 1, "no such file or directory");
        told(&[command, &folder], 1, "this is a directory, not an image");
        told(&[command, &text], 1, "not a VHD, VHDX or VMDK image");
    }
    told(&["info", &empty], 1, "the file is empty");
    told(&["create", "--size=1M", &image], 1, "file exists");
    told(&["create", "--size=1M", &path("x")], 1, "use --format");
    told(&["create", "--size=1000", &path("x.vhd")], 1, "not a multiple of 512");
    told(&["create", "--size=1M", &path("no/x.vhd")], 1, "no such file or directory");
    told(&["sync", &folder], 1, "not in a mount of flatdisk");
    told(&["umount", &folder], 32, "not mounted");
    told(&["commit", &image], 1, "no parent");
    told(&["install-helpers", "--prefix=usr"], 1, "must be an absolute path");
    if live::can_mount() {
        told(&["mount", &absent, &folder], 32, "no such file or directory");
        told(&["mount", &image, &absent], 32, "create the directory first");
        told(&["mount", &folder, &image], 32, "the mount point comes last");
        told(&["mount", &text, &folder], 32, "not a VHD, VHDX or VMDK image");
        told(&["mount", "-o", "nonsense", &image, &folder], 1, "unknown mount option `nonsense`");
    }
    // The parser's own, with its advice.
    let output = outcome(Command::new(env!("CARGO_BIN_EXE_flatdisk")).arg("inof"));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("'info'"), "{}", stderr(&output));
}
