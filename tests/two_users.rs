//! Two users in a folder that root serves to everybody: through what bob puts there he gets no byte and
//! no id of what alice keeps to herself, and changes none of it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod live;

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use flatdisk::formats::{self, OpenOptions};
use flatdisk::storage::Access;
use flatdisk::storage::file::HostFs;
use live::{Mount, create, have, outcome};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

const ALICE: u32 = 61_001;
const BOB: u32 = 61_002;
const FORMATS: [&str; 3] = ["vhd", "vhdx", "vmdk"];
/// Where the texts are on each disk.
const AT: u64 = 4096;
const SECRET: &[u8] = b"what alice shows to nobody";
const OWN: &[u8] = b"what bob has anyway";

fn run_as(user: u32, script: &str, mount: &Path) -> Output {
    let mut command = Command::new("setpriv");
    let (uid, gid) = (format!("--reuid={user}"), format!("--regid={user}"));
    command.args([&uid, &gid, "--clear-groups", "--", "sh", "-c", script]);
    outcome(command.env("M", mount))
}

fn holds(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}

struct Shared {
    folder: tempfile::TempDir,
    /// What identifies alice's disks.
    ids: Vec<String>,
}

impl Shared {
    fn new() -> Self {
        let shared = Self { folder: live::scratch(), ids: Vec::new() };
        shared.mode(".", 0o777);
        shared
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.at(name), Permissions::from_mode(mode)).unwrap();
    }

    fn give(&self, name: &str, user: u32, mode: u32) {
        chown(self.at(name), Some(user), Some(user)).unwrap();
        self.mode(name, mode);
    }

    fn write(&self, name: &str, text: &[u8]) {
        let options = OpenOptions::new(Access::Write);
        let disk = formats::open(&HostFs::shared(), &self.at(name), &options).unwrap().disk;
        disk.write_at(AT, text).unwrap();
        disk.close().unwrap();
    }

    fn disk(&self, name: &str, text: &[u8]) {
        create(&self.at(name), "4M", &[]);
        self.write(name, text);
    }

    fn child(&self, name: &str, parent: &str) {
        let parent = self.at(parent);
        let mut command = live::flatdisk();
        command.args(["create", "-q", "--parent"]).arg(parent).arg(self.at(name));
        live::succeed(&mut command);
    }

    fn flat(&self, name: &str, text: &[u8]) {
        let mut bytes = vec![0; 1 << 20];
        bytes[AT as usize..][..text.len()].copy_from_slice(text);
        fs::write(self.at(name), bytes).unwrap();
    }

    fn descriptor(&self, name: &str, extent: &str) {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\n\
             createType=\"custom\"\nRW 2048 FLAT \"{extent}\" 0\n"
        );
        fs::write(self.at(name), text).unwrap();
    }

    /// Everything that may be a door.
    fn with_doors() -> Self {
        let mut shared = Self::new();
        fs::create_dir(shared.at("private")).unwrap();
        for format in FORMATS {
            let name = |stem: &str| format!("{stem}.{format}");
            let (alice, private) = (name("alice"), name("private/alice"));
            shared.disk(&alice, SECRET);
            let options = OpenOptions::new(Access::Peek);
            let image = formats::open(&HostFs::shared(), &shared.at(&alice), &options).unwrap();
            let id = image.identity.to_string();
            shared.ids.push(id.rsplit(' ').next().unwrap().to_owned());
            // A child of a disk that only has her disk's name.
            let elsewhere = live::scratch();
            let other = Self { folder: elsewhere, ids: Vec::new() };
            other.disk(&alice, OWN);
            other.child(&name("bob-wrong"), &alice);
            fs::copy(other.at(&name("bob-wrong")), shared.at(&name("bob-wrong"))).unwrap();

            shared.child(&name("bob-child"), &alice);
            shared.child(&name("bob-top"), &name("bob-child"));
            shared.child(&name("alice-open"), &alice);
            shared.child(&name("bob-over"), &name("alice-open"));
            fs::copy(shared.at(&alice), shared.at(&private)).unwrap();
            shared.disk(&name("bob-own"), OWN);
            shared.child(&name("bob-own-child"), &name("bob-own"));
            for name in ["bob-wrong", "bob-child", "bob-top", "bob-over", "bob-own-child"].map(name)
            {
                shared.give(&name, BOB, 0o644);
            }
            shared.give(&name("bob-own"), BOB, 0o600);
            shared.give(&alice, ALICE, 0o600);
            shared.give(&private, ALICE, 0o666);
            shared.give(&name("alice-open"), ALICE, 0o644);
            fs::hard_link(shared.at(&alice), shared.at(&name("bob-hard"))).unwrap();
            for (link, target) in [("bob-link", &alice), ("bob-in", &private)] {
                let link = shared.at(&name(link));
                symlink(target, &link).unwrap();
                lchown(&link, Some(BOB), Some(BOB)).unwrap();
            }
        }
        for (flat, user, mode) in
            [("alice-flat", ALICE, 0o600), ("private/flat", ALICE, 0o666), ("bob-flat", BOB, 0o600)]
        {
            shared.flat(flat, if user == ALICE { SECRET } else { OWN });
            shared.give(flat, user, mode);
        }
        for (name, extent, user) in [
            ("bob-extent.vmdk", "alice-flat", BOB),
            ("bob-extent-in.vmdk", "private/flat", BOB),
            ("alice-extent.vmdk", "alice-flat", ALICE),
            ("bob-own-extent.vmdk", "bob-flat", BOB),
        ] {
            shared.descriptor(name, extent);
            shared.give(name, user, 0o666);
        }
        shared.give("private", ALICE, 0o700);
        shared
    }

    /// The bytes of all of alice's files.
    fn hers(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let folders = [self.at("."), self.at("private")];
        let files = folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap());
        let files = files.map(|entry| entry.unwrap().path());
        let hers = |path: &PathBuf| {
            let meta = fs::symlink_metadata(path).unwrap();
            meta.is_file() && meta.uid() == ALICE
        };
        files.filter(hers).map(|path| (path.clone(), fs::read(path).unwrap())).collect()
    }
}

/// Reads what there is and tries to change it.
const TRY_ALL: &str = r#"
    for f in "$M"/$NAMES "$M"/$PRIVATE; do
        echo "== $f"; head -c 70000 "$f"; getfattr -d -m - "$f"
        printf 'bob was here' | dd of="$f" conv=notrunc bs=1 seek=5000 status=none
    done 2>&1
    true
"#;

#[test]
fn nobody_gets_at_files_of_others_through_what_images_name() {
    if !live::can_mount() || !have(&["setpriv"]) {
        return;
    }
    let shared = Shared::with_doors();
    let before = shared.hers();
    assert!(before.len() > 10);
    for options in ["ro", "rw", "rw,allow_other", "rw,uid=61002,gid=61002"] {
        let mount = Mount::new(shared.folder.path(), &["-o", options]);
        fs::set_permissions(mount.path(), Permissions::from_mode(0o755)).ok();
        let (shown_to_bob, writable) = (options.contains("uid="), !options.contains("ro"));
        // Root may give bob what is hers: then what bears her name is his to read.
        let names = if shown_to_bob { "bob-[!h]*" } else { "*" };
        let private = if shown_to_bob { "none" } else { "private/*" };
        let script = format!("NAMES='{names}'; PRIVATE='{private}'; {TRY_ALL}");
        let got = run_as(BOB, &script, mount.path());
        let text = String::from_utf8_lossy(&got.stdout).into_owned();
        assert!(!holds(&got.stdout, SECRET), "{options}: a secret\n{text}");
        for part in text.split("== ") {
            // These state the id by themselves.
            let stated = ["bob-child", "bob-top", "bob-over"];
            let stated =
                stated.iter().any(|name| part.lines().next().unwrap_or_default().contains(name));
            let told = shared.ids.iter().any(|id| part.contains(id.as_str()));
            assert!(!told || stated, "{options}: an id: {part}");
        }
        for format in FORMATS {
            for door in ["bob-wrong", "bob-child", "bob-top", "bob-over"] {
                let name = format!("{door}.{format}");
                assert!(!mount.flat(&name).exists(), "{options}: {name} opens");
                assert!(text.contains(&format!("{name}.error.txt")), "{options}: {name}\n{text}");
            }
            for link in ["bob-link", "bob-in"] {
                assert!(!mount.flat(&format!("{link}.{format}")).exists(), "{options}: {link}");
            }
        }
        for door in ["bob-extent.vmdk", "bob-extent-in.vmdk"] {
            assert!(!mount.flat(door).exists(), "{options}: {door} opens");
        }
        own_images_work(&mount, options, shown_to_bob, writable);
        assert!(mount.unmount().success());
    }
    for (path, bytes) in shared.hers() {
        assert!(before[&path] == bytes, "{} is changed", path.display());
    }
}

/// What everybody has of his own, and root of all.
fn own_images_work(mount: &Mount, options: &str, shown_to_bob: bool, writable: bool) {
    let reads = |user: u32, name: &str, text: &[u8]| {
        let got = run_as(user, &format!("head -c 70000 \"$M/{name}.img\""), mount.path());
        assert!(holds(&got.stdout, text), "{options}: {user} {name}: {:?}", got.status);
    };
    let mut own = vec!["bob-own-extent.vmdk".to_owned()];
    own.extend(FORMATS.map(|format| format!("bob-own-child.{format}")));
    for name in &own {
        reads(BOB, name, OWN);
        reads(0, name, OWN);
        let mode = fs::metadata(mount.flat(name)).unwrap().mode() & 0o777;
        let expected = if writable { 0o600 } else { 0o400 };
        assert_eq!(mode, expected, "{options}: {name} stands on a private file");
        let write = format!("printf x | dd of=\"$M/{name}.img\" conv=notrunc,fsync status=none");
        assert_eq!(run_as(BOB, &write, mount.path()).status.success(), writable, "{name}");
    }
    for format in FORMATS {
        for name in ["alice", "alice-open", "private/alice", "bob-hard"] {
            let name = format!("{name}.{format}");
            reads(0, &name, SECRET);
            if !shown_to_bob {
                reads(ALICE, &name, SECRET);
            }
        }
    }
    if !shown_to_bob {
        reads(ALICE, "alice-extent.vmdk", SECRET);
    }
}

/// How long the racer goes on at most until somebody got through.
const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn a_folder_swapped_for_another_under_a_racer_gives_nothing_away() {
    if !live::can_mount() || !have(&["setpriv"]) {
        return;
    }
    let shared = Shared::new();
    for (folder, user, text, mode) in [("door", BOB, OWN, 0o755), ("hers", ALICE, SECRET, 0o700)] {
        fs::create_dir(shared.at(folder)).unwrap();
        shared.flat(&format!("{folder}/x"), text);
        shared.give(&format!("{folder}/x"), user, 0o644);
        for format in FORMATS {
            let name = format!("{folder}/p.{format}");
            if user == BOB {
                shared.disk(&name, text);
                shared.child(&format!("race.{format}"), &name);
            } else {
                // The same disk by its id.
                fs::copy(shared.at(&format!("door/p.{format}")), shared.at(&name)).unwrap();
                overwrite(&shared.at(&name), OWN, text);
            }
            shared.give(&name, user, 0o644);
        }
        shared.give(folder, user, mode);
    }
    shared.descriptor("race-extent.vmdk", "door/x");
    symlink("hers", shared.at("way")).unwrap();
    let mut doors = vec!["race-extent.vmdk".to_owned()];
    doors.extend(FORMATS.map(|format| format!("race.{format}")));
    for door in &doors {
        shared.give(door, BOB, 0o644);
    }
    let mount = Mount::new(shared.folder.path(), &[]);
    fs::set_permissions(mount.path(), Permissions::from_mode(0o755)).ok();
    let time = Duration::from_secs(common::number("FLATDISK_RACE_SECONDS", 2));
    let stop = AtomicBool::new(false);
    let (mut harmless, mut refused, mut through) = (0, 0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for other in ["hers", "way"] {
                    for _ in 0..2 {
                        let flags = RenameFlags::RENAME_EXCHANGE;
                        let (door, other) = (shared.at("door"), shared.at(other));
                        renameat2(AT_FDCWD, &door, AT_FDCWD, &other, flags).unwrap();
                    }
                }
            }
        });
        let begun = Instant::now();
        // On a busy machine it takes longer until the mount has got through between two swaps.
        while begun.elapsed() < time || through == 0 && begun.elapsed() < PATIENCE {
            for name in doors.iter().cycle().take(400) {
                let options = OpenOptions::new(Access::Peek);
                let image = formats::open(&HostFs::shared(), &shared.at(name), &options);
                let mut bytes = [0; 40];
                match image.and_then(|image| image.disk.read_at(AT, &mut bytes)) {
                    Ok(()) if bytes.starts_with(OWN) => harmless += 1,
                    Ok(()) => panic!("{name}: {}", String::from_utf8_lossy(&bytes)),
                    Err(_) => refused += 1,
                }
            }
            let script = "for i in 1 2 3 4 5; do head -c 70000 \"$M\"/race*; done 2>/dev/null";
            let got = run_as(BOB, script, mount.path()).stdout;
            assert!(!holds(&got, SECRET), "a secret");
            through += usize::from(holds(&got, OWN));
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{harmless} times harmless, {refused} times refused; {through} rounds by the mount");
    assert!(harmless > 0 && refused > 0 && through > 0);
    assert!(mount.unmount().success());
}

/// Puts one text in another's place.
fn overwrite(path: &Path, from: &[u8], to: &[u8]) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to);
    fs::write(path, bytes).unwrap();
}

#[test]
fn an_image_that_names_a_flat_file_of_a_flatdisk_is_refused_unopened() {
    if !live::can_mount() || !have(&["unshare", "timeout"]) {
        return;
    }
    let (images, scratch) = (live::scratch(), live::scratch());
    create(&images.path().join("a.vhd"), "4M", &[]);
    let script = r#"
        set -eux
        trap 'kill -CONT "${pid:-}" || true; umount -il "$T/mnt" "$I/other" "$I/own" || true' EXIT
        mkdir "$I/own" "$I/other" "$I/plain" "$T/mnt" "$T/images"
        mount -t tmpfs none "$I/plain"
        cp "$I/a.vhd" "$I/plain/b.vhd"; cp "$I/a.vhd" "$T/images/a.vhd"
        name() { printf '# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=%s\n%screateType="custom"\nRW 8192 FLAT "%s" 0\n' "$1" "$2" "$3"; }
        name ffffffff '' own/a.vhd.img >"$I/self.vmdk"
        name ffffffff '' other/a.vhd.img >"$I/peer.vmdk"
        truncate -s 4M "$I/x"
        name 00000002 'parentFileNameHint="own/a.vhd.img"
' x >"$I/parent.vmdk"
        "$FLATDISK" mount "$T/images" "$I/other"
        pid=$("$FLATDISK" status --json "$I/other" | sed -n 's/.*"pid": \([0-9]*\).*/\1/p')
        kill -STOP "$pid"

        # The daemon that serves `own` would wait for itself, or for one that never answers.
        timeout 20 "$FLATDISK" mount "$I" "$I/own"
        for name in self peer parent; do
            timeout 20 cat "$I/own/$name.vmdk.error.txt" >/dev/null
        done
        timeout 20 ls -lR "$I/own" >"$T/list"
        if grep -q other "$T/list"; then exit 9; fi
        # Other mounts are entered.
        grep -q b.vhd.img "$T/list"
        timeout 20 cmp -n 1000 "$I/own/a.vhd.img" "$I/own/plain/b.vhd.img"
        "$FLATDISK" umount "$I/own"
        kill -CONT "$pid"
        "$FLATDISK" umount "$I/other"
        umount "$I/plain"
    "#;
    live::succeed_in_namespace(script, &[("I", &images.path()), ("T", &scratch.path())]);
}
