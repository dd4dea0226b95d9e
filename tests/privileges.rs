//! Who may do what: other users to a mount, and the daemon to the machine.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use live::{Mount, create, flatdisk, have, outcome, scratch};

/// A user who is neither root nor the one who mounts.
const STRANGER: u32 = 65534;

const DAC_OVERRIDE: u64 = 1 << 1;
const DAC_READ_SEARCH: u64 = 1 << 2;
const SYS_ADMIN: u64 = 1 << 21;
/// Setting ids: available, and in effect only for the moment that takes.
const IDS: u64 = 1 << 6 | 1 << 7;

/// Runs a shell command as the stranger.
fn stranger(script: &str) -> Output {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--", "sh", "-c", script]);
    outcome(command.env("LC_ALL", "C"))
}

/// A command of the stranger must fail with `why`.
fn refused(script: &str, why: &str) {
    let output = stranger(script);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains(why), "{script}: {output:?}");
}

fn allowed(script: &str) {
    let output = stranger(script);
    assert!(output.status.success(), "{script}: {output:?}");
}

/// A folder that everybody can look into, with an image of the given mode.
fn folder(mode: u32) -> (tempfile::TempDir, PathBuf) {
    let folder = scratch();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let image = folder.path().join("a.vhd");
    create(&image, "8M", &[]);
    fs::set_permissions(&image, Permissions::from_mode(mode)).unwrap();
    (folder, image)
}

/// The numbers behind `name` in the status of all of a process's threads. One that ends while it is
/// looked at has none.
fn thread_status(pid: u32, name: &str) -> Vec<u64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let value = |thread: fs::DirEntry| {
        let status = fs::read_to_string(thread.path().join("status")).ok()?;
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":"));
        Some(u64::from_str_radix(value.unwrap().trim(), 16).unwrap())
    };
    threads.filter_map(|thread| value(thread.ok()?)).collect()
}

#[test]
fn roots_daemon_keeps_the_capabilities_it_needs_and_no_others() {
    if !live::can_mount() {
        return;
    }
    let (folder, _) = folder(0o644);
    for (option, needed) in [
        ("rw", SYS_ADMIN | DAC_READ_SEARCH | DAC_OVERRIDE),
        ("nonpersistent", SYS_ADMIN | DAC_READ_SEARCH | DAC_OVERRIDE),
        ("ro", SYS_ADMIN | DAC_READ_SEARCH),
    ] {
        let mount = Mount::new(folder.path(), &["-o", option]);
        // Those of the kernel's requests, of flushing, signals and control, and the first one.
        live::wait_until("the threads run", || thread_status(mount.pid(), "CapEff").len() >= 8);
        for (set, expected) in [
            ("CapEff", needed),
            ("CapPrm", needed | IDS),
            ("CapBnd", needed | IDS),
            ("CapInh", 0),
            ("CapAmb", 0),
            ("NoNewPrivs", 1),
        ] {
            let found = thread_status(mount.pid(), set);
            assert!(found.iter().all(|set| *set == expected), "{option}, {set}: {found:x?}");
        }
        assert!(mount.unmount().success());
    }
}

#[test]
fn with_few_capabilities_images_of_any_user_are_served() {
    if !live::can_mount() {
        return;
    }
    let (folder, image) = folder(0o600);
    fs::set_permissions(folder.path(), Permissions::from_mode(0o700)).unwrap();
    for path in [folder.path(), &image] {
        chown(path, Some(STRANGER), Some(STRANGER)).unwrap();
    }
    let mount = Mount::new(folder.path(), &[]);
    let flat = File::options().read(true).write(true).open(mount.flat("a.vhd")).unwrap();
    flat.write_all_at(b"by root", 4096).unwrap();
    flat.sync_all().unwrap();
    drop(flat);
    assert!(mount.unmount().success());

    // The kernel reads a flat extent by itself, which root alone can ask it to.
    create(&folder.path().join("flat.vmdk"), "8M", &["--subformat", "monolithicFlat"]);
    let log = folder.path().join("log");
    let mount = Mount::start(
        flatdisk()
            .args(["mount", "-f", "-o", "ro"])
            .arg(folder.path())
            .env("FLATDISK_LOG", "flatdisk=debug")
            .stderr(File::create(&log).unwrap()),
    );
    let mut read = [0; 7];
    File::open(mount.flat("a.vhd")).unwrap().read_exact_at(&mut read, 4096).unwrap();
    assert_eq!(&read, b"by root");
    File::open(mount.flat("flat.vmdk")).unwrap().read_exact_at(&mut read, 4096).unwrap();
    assert!(mount.unmount().success());
    let log = fs::read_to_string(log).unwrap();
    assert!(!log.contains("no passthrough") && !log.contains("giving up"), "{log}");
}

#[test]
fn an_automatic_unmount_works_with_few_capabilities() {
    if !live::can_mount() || !have(&["fusermount3"]) {
        return;
    }
    let (folder, _) = folder(0o644);
    let mut mount = Mount::new(folder.path(), &["-o", "auto_unmount"]);
    mount.kill_daemon();
    live::wait_until("the helper unmounts", || !live::is_mounted(mount.path()));
}

#[test]
fn permission_bits_hold_where_all_users_may_look_in() {
    if !live::can_mount() || !have(&["setpriv"]) {
        return;
    }
    for options in [&[][..], &["-o", "allow_other"]] {
        let (folder, image) = folder(0o600);
        let mount = Mount::new(folder.path(), options);
        fs::set_permissions(mount.path(), Permissions::from_mode(0o755)).ok();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line =
            table.lines().find(|line| line.contains(mount.path().to_str().unwrap())).unwrap();
        assert!(line.contains("default_permissions") && line.contains("allow_other"), "{line}");
        let flat = mount.flat("a.vhd");
        let flat = flat.to_str().unwrap();
        let read = format!("head -c 1 '{flat}' > /dev/null");
        let write = format!("printf x | dd of='{flat}' conv=notrunc status=none");
        let set = |mode| {
            fs::set_permissions(&image, Permissions::from_mode(mode)).unwrap();
            live::wait_until("the mode shows", || {
                fs::metadata(flat).unwrap().permissions().mode() & 0o777 == mode
            });
        };
        refused(&read, "Permission denied");
        refused(&write, "Permission denied");
        set(0o644);
        allowed(&read);
        refused(&write, "Permission denied");
        set(0o646);
        allowed(&write);
        assert!(mount.unmount().success());
    }
}

#[test]
fn strangers_neither_open_nor_close_images() {
    if !live::can_mount() || !have(&["setpriv"]) {
        return;
    }
    let (folder, image) = folder(0o666);
    // Also where the stranger owns everything, as far as the kernel can tell.
    for options in [&[][..], &["-o", "uid=65534,gid=65534"]] {
        let mount = Mount::new(&image, options);
        let point = mount.path().display();
        let why = if options.is_empty() { "Permission denied" } else { "Operation not permitted" };
        let extra = folder.path().join("extra.vhd");
        create(&extra, "8M", &[]);
        fs::set_permissions(&extra, Permissions::from_mode(0o666)).unwrap();
        refused(&format!("ln -s '{}' '{point}/b.img'", extra.display()), why);
        refused(&format!("rm -f '{point}/a.vhd.img'"), why);
        assert!(mount.flat("a.vhd").exists() && !mount.path().join("b.img").exists());
        // Root may.
        symlink(&extra, mount.path().join("b.img")).unwrap();
        fs::remove_file(mount.path().join("b.img")).unwrap();
        assert!(mount.unmount().success());
        fs::remove_file(extra).unwrap();
    }
}

#[test]
fn the_control_socket_is_the_owners() {
    if !live::can_mount() {
        return;
    }
    let (folder, _) = folder(0o644);
    let mount = Mount::new(folder.path(), &[]);
    let entry = flatdisk::fuse::mounts::mounted_at(mount.path()).unwrap().unwrap();
    let dir = Path::new("/run/flatdisk");
    let socket = dir.join(format!("{}.sock", entry.device.replace(':', "-")));
    live::wait_until("the socket is there", || socket.exists());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    live::wait_until("the socket is private", || (mode(dir), mode(&socket)) == (0o700, 0o600));
    assert!(mount.unmount().success());
    assert!(!socket.exists());
}

/// What the stranger's copy of this program does: asks a daemon for its status.
#[test]
fn call_for_a_stranger() {
    let Some(socket) = std::env::var_os("CALL_SOCKET") else { return };
    let mut stream = UnixStream::connect(socket).unwrap();
    let _ = stream.write_all(b"\"status\"\n");
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    println!("answer: {answer}");
}

#[test]
fn the_daemon_asks_the_kernel_who_is_calling() {
    if !live::can_mount() || !have(&["setpriv", "unshare"]) {
        return;
    }
    let (folder, _) = folder(0o644);
    let (point, scratch) = (scratch(), scratch());
    // With a directory of sockets that somebody opened to everybody.
    let script = r#"
        set -eu
        mount -t tmpfs none /run
        cp "$SELF" "$T/call"; chmod 755 "$T" "$T/call"
        "$FLATDISK" mount "$FROM" "$TO"
        trap 'umount -il "$TO" 2>/dev/null || true' EXIT
        chmod 755 /run/flatdisk; chmod 666 /run/flatdisk/*.sock
        export CALL_SOCKET="$(echo /run/flatdisk/*.sock)"
        "$T/call" --exact call_for_a_stranger --nocapture > "$T/root"
        setpriv --reuid=65534 --regid=65534 --clear-groups -- \
            "$T/call" --exact call_for_a_stranger --nocapture > "$T/stranger"
        chmod 700 /run/flatdisk
        "$FLATDISK" umount "$TO"
    "#;
    let program = std::env::current_exe().unwrap();
    let environment: [(&str, &dyn AsRef<OsStr>); 4] = [
        ("SELF", &program),
        ("FROM", &folder.path()),
        ("TO", &point.path()),
        ("T", &scratch.path()),
    ];
    live::succeed_in_namespace(script, &environment);
    let answer = |name| fs::read_to_string(scratch.path().join(name)).unwrap();
    assert!(answer("root").contains("\"pid\":"), "{}", answer("root"));
    assert!(answer("stranger").contains("only the daemon's user"), "{}", answer("stranger"));
    assert!(!answer("stranger").contains("\"pid\":"));
}
