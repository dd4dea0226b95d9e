//! Signals and limits of the process: each costs the call that runs into it, and no image.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use live::{Mount, create, outcome, run, scratch, succeed};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// `flatdisk` under a limit of the shell.
fn limited(limit: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit {limit}; exec \"$0\" \"$@\"")]);
    command.arg(env!("CARGO_BIN_EXE_flatdisk")).args(arguments);
    command
}

fn writer(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn says(output: &std::process::Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_file_size_limit_fails_creation_and_leaves_no_file() {
    let dir = scratch();
    for (name, subformat) in [
        ("a.vhd", "fixed"),
        ("a.vhdx", "fixed"),
        ("a.vmdk", "monolithicFlat"),
        ("b.vhdx", "dynamic"),
    ] {
        let path = dir.path().join(name);
        // 256 KiB, in blocks of 512 bytes.
        let arguments = ["create", "--size", "8M", "--subformat", subformat];
        let output = outcome(limited("-f 512", &arguments).arg(&path));
        assert_eq!(output.status.code(), Some(1), "{name}: {output:?}");
        assert_eq!(says(&output).lines().count(), 1, "{}", says(&output));
        assert!(says(&output).contains("file too large"), "{}", says(&output));
        assert_eq!(live::names(dir.path()), Vec::<String>::new());
    }
}

#[test]
fn a_file_size_limit_reaches_the_writer_of_that_image_alone() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    create(&dir.path().join("grows.vhdx"), "1G", &[]);
    create(&dir.path().join("fits.vhd"), "8M", &["--subformat", "fixed"]);
    // 32 MiB.
    let mut daemon = limited("-f 65536", &["mount", "-f", "-o", "nopassthrough"]);
    let mount = Mount::start(daemon.arg(dir.path()));
    let grows = writer(&mount.flat("grows.vhdx"));
    let fits = writer(&mount.flat("fits.vhd"));
    let block = vec![7; 1 << 20];
    let written = (0..64).take_while(|n| grows.write_all_at(&block, n << 24).is_ok()).count();
    assert!((1..64).contains(&written), "{written}");
    let refused = grows.write_all_at(&block, 63 << 24).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EFBIG));
    // Neither the other image nor what was written before is the worse for it.
    fits.write_all_at(&block, 0).unwrap();
    fits.sync_all().unwrap();
    grows.sync_all().unwrap();
    let mut found = vec![0; 1 << 20];
    grows.read_exact_at(&mut found, 0).unwrap();
    assert!(found == block);
    drop((grows, fits));
    assert!(mount.unmount().success());
    run(env!("CARGO_BIN_EXE_flatdisk"), &[&"check", &dir.path().join("grows.vhdx")]);
}

#[test]
fn signals_without_a_meaning_do_not_end_the_daemon() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    create(&dir.path().join("a.vhd"), "8M", &[]);
    let mount = Mount::new(dir.path(), &[]);
    let file = writer(&mount.flat("a.vhd"));
    file.write_all_at(b"x", 0).unwrap();
    for signal in [
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGALRM,
        Signal::SIGVTALRM,
        Signal::SIGPROF,
        Signal::SIGIO,
        Signal::SIGPIPE,
        Signal::SIGXFSZ,
    ] {
        kill(Pid::from_raw(mount.pid() as i32), signal).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    assert!(mount.unmount().success());
}

#[test]
fn with_few_descriptors_many_images_are_looked_at_and_one_too_many_fails_alone() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    let path = |number: u32| dir.path().join(format!("{number}.vhd"));
    create(&path(0), "8M", &[]);
    for number in 1..300 {
        fs::copy(path(0), path(number)).unwrap();
    }
    let mount = Mount::start(limited("-n 64", &["mount", "-f"]).arg(dir.path()));
    for number in 0..300 {
        let flat = mount.flat(&format!("{number}.vhd"));
        assert_eq!(fs::metadata(&flat).unwrap().len(), 8 << 20, "{number}");
    }
    let open = |number: u32| File::open(mount.flat(&format!("{number}.vhd")));
    let (mut files, mut refusal) = (Vec::new(), None);
    for number in 0..64 {
        match open(number) {
            Ok(file) => files.push(file),
            Err(e) => refusal = Some(e),
        }
    }
    assert_eq!(refusal.unwrap().raw_os_error(), Some(libc::EMFILE));
    assert!(files.len() > 20, "{}", files.len());
    // Those that opened work, and what they let go of others can have.
    let mut sector = [1; 512];
    files.iter().for_each(|file| file.read_exact_at(&mut sector, 0).unwrap());
    files.clear();
    live::wait_until("the images are closed", || open(63).is_ok());
    assert!(mount.unmount().success());
}

#[test]
fn the_lower_limit_of_descriptors_is_raised_to_the_higher_one() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    create(&dir.path().join("a.vhd"), "8M", &[]);
    let mount = Mount::start(limited("-S -n 64", &["mount", "-f"]).arg(dir.path()));
    let limits = fs::read_to_string(format!("/proc/{}/limits", mount.pid())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let numbers: Vec<_> =
        line.split_whitespace().filter(|word| word.parse::<u64>().is_ok()).collect();
    assert_eq!(numbers[0], numbers[1], "{line}");
}

/// Nobody reads what the program prints any more.
#[test]
fn closed_standard_streams_are_no_panic() {
    let dir = scratch();
    let image = dir.path().join("a.vhd");
    create(&image, "8M", &[]);
    let script = "\"$0\" info \"$1\" >/dev/full; test $? = 1 && \
                  \"$0\" info \"$1/x\" 2>/dev/full; test $? = 1";
    let mut shell = Command::new("sh");
    shell.args(["-c", script, env!("CARGO_BIN_EXE_flatdisk")]).arg(&image);
    let said = succeed(&mut shell);
    assert!(!said.contains("panicked"), "{said}");
}

/// A descriptor that is cheap to make takes many times its size in memory once it was looked at.
#[test]
fn what_is_remembered_of_images_has_a_budget() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    let extents = "RW 1 ZERO\n".repeat(4_000);
    let descriptor = format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
         createType=\"custom\"\n{extents}ddb.adapterType = \"ide\"\n"
    );
    let path = |number: u32| dir.path().join(format!("{number}.vmdk"));
    fs::write(path(0), descriptor).unwrap();
    for number in 1..150 {
        fs::hard_link(path(0), path(number)).unwrap();
    }
    let mount = Mount::new(dir.path(), &[]);
    for number in 0..150 {
        let flat = mount.flat(&format!("{number}.vmdk"));
        assert_eq!(fs::metadata(&flat).unwrap().len(), 4_000 * 512, "{number}");
    }
    assert!(mount.memory() < 256 << 20, "{} MiB", mount.memory() >> 20);
    assert!(mount.unmount().success());
}

#[test]
fn without_threads_to_be_had_a_mount_fails_or_works() {
    let tools = ["setpriv", "prlimit", "unshare", "fusermount3"];
    if !live::can_mount() || !live::have(&tools) {
        return;
    }
    let (images, scratch) = (scratch(), scratch());
    create(&images.path().join("a.vhdx"), "8M", &["--block-size", "1M"]);
    // Root has no such limit; this user has no processes but ours.
    let script = r#"
        set -eu
        mknod "$T/fuse" c 10 229; chmod 666 "$T/fuse"; mount --bind "$T/fuse" /dev/fuse
        chmod 755 "$T" "$IMAGES"; chown -R games "$IMAGES"
        mkdir -m 777 "$T/mnt" "$T/run"; cp "$FLATDISK" "$T/flatdisk"
        user() { setpriv --reuid=games --regid=games --clear-groups -- env XDG_RUNTIME_DIR="$T/run" "$@"; }
        trap 'umount -il "$T/mnt" 2>/dev/null || true' EXIT
        failed=0; worked=0
        for limit in 2 4 6 7 8 9 10 12 16 24; do
            echo "limit $limit"
            if user prlimit --nproc=$limit "$T/flatdisk" mount -o threads=4 "$IMAGES" "$T/mnt" 2>"$T/err"; then
                worked=$((worked + 1))
                user dd if=/dev/urandom of="$T/mnt/a.vhdx.img" bs=64k count=8 conv=notrunc,fsync status=none
                user "$T/flatdisk" status "$T/mnt" | grep -qF "$T/mnt"
                user "$T/flatdisk" sync "$T/mnt"
                user "$T/flatdisk" umount "$T/mnt"
            else
                failed=$((failed + 1))
                cat "$T/err"; [ "$(wc -l < "$T/err")" = 1 ]; grep -q '^flatdisk: .*starting' "$T/err"
            fi
            if grep -qF " $T/mnt " /proc/self/mountinfo; then echo "still mounted"; exit 1; fi
        done
        [ $failed -gt 0 ]; [ $worked -gt 0 ]
        "$FLATDISK" check "$IMAGES/a.vhdx"
    "#;
    live::succeed_in_namespace(script, &[("IMAGES", &images.path()), ("T", &scratch.path())]);
}
