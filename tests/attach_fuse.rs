//! `attach --fuse`: file systems mounted by programs, for users who are not root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use live::{Mount, create, flatdisk, have, names, outcome, scratch, succeed, wait_until};

/// A folder with `a.vhdx`: ext4 in partition 1, another file system or nothing in partition 2.
fn images(second: &[&str]) -> tempfile::TempDir {
    let folder = scratch();
    create(&folder.path().join("a.vhdx"), "64M", &["--block-size", "1M"]);
    let mount = Mount::new(folder.path(), &["--partitions"]);
    let mut sfdisk = Command::new("sfdisk");
    sfdisk.args(["-q", "--no-reread", "--no-tell-kernel"]).arg(mount.flat("a.vhdx"));
    let mut child = sfdisk.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"label: gpt\nsize=20M\nsize=20M\n").unwrap();
    assert!(child.wait().unwrap().success());
    let part = |number: u32| mount.flat(&format!("a.vhdx.p{number}"));
    wait_until("the partitions show", || part(2).exists());
    succeed(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(part(1)));
    if let [program, options @ ..] = second {
        succeed(Command::new(program).args(options).arg(part(2)));
    }
    assert!(mount.unmount().success());
    folder
}

fn list(place: &Path) -> String {
    succeed(flatdisk().arg("ls").arg(place))
}

#[test]
fn a_user_without_privileges_mounts_what_is_in_an_image() {
    let tools = [
        "setpriv",
        "fusermount3",
        "unshare",
        "fuse2fs",
        "sfdisk",
        "mkfs.ext4",
        "mkfs.ntfs",
        "ntfscp",
    ];
    if !live::can_mount() || !have(&tools) {
        return;
    }
    let images = images(&["mkfs.ntfs", "-q", "-f", "-F"]);
    let scratch = scratch();
    let file = scratch.path().join("file");
    fs::write(&file, "from NTFS").unwrap();
    let mount = Mount::new(images.path(), &["--partitions"]);
    let part = mount.flat("a.vhdx.p2");
    wait_until("the partition shows", || part.exists());
    succeed(Command::new("ntfscp").arg("-qf").arg(&part).arg(&file).arg("hello.txt"));
    assert!(mount.unmount().success());
    let script = r#"
        set -eux
        mknod "$T/fuse" c 10 229; chmod 666 "$T/fuse"; mount --bind "$T/fuse" /dev/fuse
        chmod 755 "$T" "$IMAGES"; chown -R 65534 "$IMAGES"
        mkdir -m 777 "$T/mnt" "$T/flat" "$T/run"; cp "$FLATDISK" "$T/flatdisk"
        user() { setpriv --reuid=65534 --regid=65534 --clear-groups -- env XDG_RUNTIME_DIR="$T/run" "$@"; }
        refused() { if "$@" >"$T/out" 2>"$T/err"; then echo "succeeds: $*" >&2; exit 9; fi; }
        live() { grep -qF " $1 " /proc/self/mountinfo; }
        trap 'user "$T/flatdisk" detach --all || true; umount -il "$T/mnt" "$T/flat" 2>/dev/null || true' EXIT

        # Of several file systems one is chosen, and what is written is in the image after detach.
        refused user "$T/flatdisk" attach --fuse --mount "$T/mnt" "$IMAGES/a.vhdx"
        grep -q 'several partitions' "$T/err"; [ "$(grep -c ^flatdisk: "$T/err")" = 1 ]
        refused live "$T/mnt"
        [ "$(user "$T/flatdisk" attach --fuse --mount "$T/mnt" --partition 1 "$IMAGES/a.vhdx")" = "$T/mnt" ]
        live "$T/mnt"
        echo hello | user tee "$T/mnt/file" >/dev/null
        user "$T/flatdisk" attach --list | grep -q "^fuse2fs: $IMAGES/a.vhdx, mounted on $T/mnt"
        refused user "$T/flatdisk" attach --fuse --mount "$T/mnt" --partition 1 "$IMAGES/a.vhdx"
        user "$T/flatdisk" detach "$T/mnt"
        refused live "$T/mnt"
        [ "$(user "$T/flatdisk" cat "$IMAGES/a.vhdx:1/file")" = hello ]
        [ -z "$(ls "$T/run/flatdisk/attached")" ]

        # One command takes a file out; and so do programs over the files of partitions.
        [ "$(user "$T/flatdisk" cat "$IMAGES/a.vhdx:2/hello.txt")" = "from NTFS" ]
        user "$T/flatdisk" cp "$IMAGES/a.vhdx:2/hello.txt" "$T/run/copy"
        [ "$(cat "$T/run/copy")" = "from NTFS" ]
        user "$T/flatdisk" mount --partitions "$IMAGES" "$T/flat"
        stat "$T/flat/a.vhdx.p1.img" 2>"$T/err" && exit 8
        user stat "$T/flat/a.vhdx.p1.img"
        user fuse2fs "$T/flat/a.vhdx.p1.img" "$T/mnt"
        [ "$(user cat "$T/mnt/file")" = hello ]
        user fusermount3 -u "$T/mnt"
        for try in $(seq 100); do user "$T/flatdisk" umount "$T/flat" && break; sleep 0.1; done
        refused live "$T/flat"

        # Read-only, and all at once undone; what nobody attached stays until umount --all.
        user "$T/flatdisk" attach -r --json --fuse --mount "$T/mnt" --partition 1 "$IMAGES/a.vhdx" >"$T/json"
        grep -q '"program": "fuse2fs"' "$T/json"; grep -q '"read_only": true' "$T/json"
        refused user touch "$T/mnt/new"
        user cat "$T/mnt/file"
        user "$T/flatdisk" mount --ro "$IMAGES" "$T/flat"
        user "$T/flatdisk" detach --all
        refused live "$T/mnt"
        live "$T/flat"
        user "$T/flatdisk" umount --all
        refused live "$T/flat"

        # What somebody unmounted by hand is said, and cleaned up.
        user "$T/flatdisk" attach --fuse --mount "$T/mnt" --partition 1 "$IMAGES/a.vhdx"
        user fusermount3 -u "$T/mnt"
        user "$T/flatdisk" attach --list | grep -q 'unmounted'
        user "$T/flatdisk" detach "$IMAGES/a.vhdx"
        [ -z "$(ls "$T/run/flatdisk/attached")" ]
    "#;
    live::succeed_in_namespace(script, &[("IMAGES", &images.path()), ("T", &scratch.path())]);
}

#[test]
fn a_missing_program_names_its_package() {
    if !live::can_mount() || !have(&["sfdisk", "mkfs.ext4"]) {
        return;
    }
    let _mounting = live::mounting();
    let images = images(&[]);
    let (image, dir) = (images.path().join("a.vhdx"), scratch());
    let empty = scratch();
    let attach = |partition: &str| {
        let mut attach = flatdisk();
        attach.env("PATH", empty.path()).args(["attach", "--fuse", "--partition", partition]);
        let output = outcome(attach.arg("--mount").arg(dir.path()).arg(&image));
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let said = attach("1");
    assert!(said.contains("fuse2fs is not installed (it is in the package fuse2fs)"), "{said}");
    let said = attach("2");
    assert!(said.contains("no file system is recognised"), "{said}");
    let said = attach("3");
    assert!(said.contains("no partition 3"), "{said}");
    assert!(names(dir.path()).is_empty());
    let listed = succeed(flatdisk().args(["attach", "--list"]));
    assert!(!listed.contains(image.to_str().unwrap()), "{listed}");
}

#[test]
fn root_mounts_by_programs_too() {
    let tools = ["sfdisk", "mkfs.ext4", "mkfs.ntfs", "ntfs-3g"];
    if !live::can_mount() || !have(&tools) {
        return;
    }
    let _mounting = live::mounting();
    let images = images(&["mkfs.ntfs", "-q", "-f", "-F"]);
    let (image, dir) = (images.path().join("a.vhdx"), scratch());
    let mut attach = flatdisk();
    attach.args(["attach", "--fuse", "--partition", "2", "--mount"]).arg(dir.path()).arg(&image);
    succeed(&mut attach);
    fs::write(dir.path().join("hello"), "world").unwrap();
    succeed(flatdisk().arg("detach").arg(&image));
    assert!(names(dir.path()).is_empty());
    let listed = list(Path::new(&format!("{}:2/", image.display())));
    assert!(listed.contains("hello"), "{listed}");
}
