//! Flat extents that the kernel reads and writes by itself: the same promises as without.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use live::{Mount, MountedFs, create, flatdisk, outcome, scratch, sha256, wait_until};
use nix::errno::Errno;

const SIZE: u64 = 8 << 20;

fn writer(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// Makes `a.vmdk`, a flat one, that looks as if it had not been touched for a while.
fn create_flat(folder: &Path) {
    create(&folder.join("a.vmdk"), "8M", &["--subformat", "monolithicFlat"]);
    let age = ["-d", "1 hour ago"];
    for file in ["a.vmdk", "a-flat.vmdk"] {
        live::run("touch", &[&age[0], &age[1], &folder.join(file)]);
    }
}

/// Runs `test` on a mount of a folder with a flat `a.vmdk`, with and without passthrough.
fn both_ways(options: &str, test: impl Fn(Mount, &Path)) {
    if !live::can_mount() {
        return;
    }
    for passthrough in ["passthrough", "nopassthrough"] {
        let folder = scratch();
        create_flat(folder.path());
        let mount = Mount::new(folder.path(), &["-o", &format!("{passthrough}{options}")]);
        test(mount, folder.path());
    }
}

fn content_id(folder: &Path) -> String {
    let text = fs::read_to_string(folder.join("a.vmdk")).unwrap();
    text.lines().find(|line| line.starts_with("CID=")).unwrap().to_owned()
}

#[test]
fn a_flat_extent_reads_the_same_with_and_without_passthrough() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    create(&folder.path().join("a.vmdk"), "8M", &["--subformat", "monolithicFlat"]);
    create(&folder.path().join("a.vhd"), "8M", &["--subformat", "fixed"]);
    let mount = Mount::new(folder.path(), &[]);
    let mut data = vec![0; SIZE as usize];
    fastrand::Rng::with_seed(3).fill(&mut data);
    for image in ["a.vmdk", "a.vhd"] {
        writer(&mount.flat(image)).write_all_at(&data, 0).unwrap();
    }
    assert!(mount.unmount().success());
    for option in ["passthrough", "nopassthrough"] {
        let mount = Mount::new(folder.path(), &["-o", &format!("ro,{option}")]);
        for image in ["a.vmdk", "a.vhd"] {
            let (first, second) = (mount.flat(image), mount.flat(image));
            let held = File::open(&first).unwrap();
            // To the end and not a byte further, though a fixed VHD's file is longer.
            assert!(fs::read(&second).unwrap() == data, "{image}, {option}");
            let mut past = [0; 16];
            assert_eq!(held.read_at(&mut past, SIZE).unwrap(), 0, "{image}, {option}");
            drop(held);
            assert!(fs::read(&second).unwrap() == data, "{image}, {option}");
        }
        wait_until("images are closed", || mount.open_files(folder.path()).is_empty());
        assert!(mount.unmount().success());
    }
}

#[test]
fn opening_for_writing_alone_changes_nothing() {
    both_ways("", |mount, folder| {
        let before = (sha256(&folder.join("a.vmdk")), sha256(&folder.join("a-flat.vmdk")));
        let file = writer(&mount.flat("a.vmdk"));
        file.sync_all().unwrap();
        drop(file);
        assert!(mount.unmount().success());
        let after = (sha256(&folder.join("a.vmdk")), sha256(&folder.join("a-flat.vmdk")));
        assert!(before == after);
    });
}

#[test]
fn what_fsync_confirmed_is_in_the_extent_and_the_content_id_is_new() {
    both_ways("", |mount, folder| {
        let old = content_id(folder);
        let reader = File::open(mount.flat("a.vmdk")).unwrap();
        let file = writer(&mount.flat("a.vmdk"));
        file.write_all_at(&[7; 10_000], 100_000).unwrap();
        let mut seen = [0; 10_000];
        reader.read_exact_at(&mut seen, 100_000).unwrap();
        assert!(seen == [7; 10_000]);
        file.sync_data().unwrap();
        mount.kill();
        assert_ne!(content_id(folder), old);
        let extent = fs::read(folder.join("a-flat.vmdk")).unwrap();
        assert!(extent[100_000..110_000] == [7; 10_000]);
        assert_eq!(extent.len() as u64, SIZE);
    });
}

/// An overlay of `lower` whose own layer is a new folder `name` in `memory`.
fn overlay(memory: &Path, name: &str, lower: &Path) -> MountedFs {
    let [upper, work] = ["upper", "work"].map(|part| memory.join(name).join(part));
    fs::create_dir_all(&upper).unwrap();
    fs::create_dir_all(&work).unwrap();
    let options = [("lowerdir", lower), ("upperdir", &upper), ("workdir", &work)]
        .map(|(option, path)| format!("{option}={}", path.display()));
    MountedFs::new(Path::new("none"), &["-t", "overlay", "-o", &options.join(",")])
}

#[test]
fn what_the_kernel_writes_is_noticed_after_it_refused_another_file() {
    if !live::can_mount() {
        return;
    }
    if !fs::read_to_string("/proc/filesystems").unwrap().contains("\toverlay\n") {
        live::skip("the kernel has no overlayfs, or has not loaded it");
        return;
    }
    let memory = MountedFs::new(Path::new("none"), &["-t", "tmpfs"]);
    let folder = |name: &str| {
        let path = memory.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let (plain, lower) = (folder("plain"), folder("lower"));
    let once = overlay(memory.path(), "once", &lower);
    let twice = overlay(memory.path(), "twice", once.path());
    // One file system too deep for passthrough.
    let deep = twice.path().join("deep");
    fs::create_dir(&deep).unwrap();
    create_flat(&plain);
    create_flat(&deep);
    let log = memory.path().join("log");
    let refused = || fs::read_to_string(&log).unwrap().contains("no passthrough");
    let mount = Mount::start(
        flatdisk()
            .args(["mount", "-f"])
            .args([&plain, &deep])
            .env("FLATDISK_LOG", "flatdisk=debug")
            .stderr(File::create(&log).unwrap()),
    );
    let [accepted, other] =
        ["plain", "deep"].map(|name| mount.path().join(name).join("a.vmdk.img"));
    let reader = File::open(&accepted).unwrap();
    assert!(!refused());
    let held = File::open(&other).unwrap();
    if !refused() {
        live::skip("the kernel passes nothing through");
        return;
    }
    for (folder, flat) in [(&plain, accepted), (&deep, other)] {
        let old = content_id(folder);
        let file = writer(&flat);
        file.write_all_at(&[7; 10_000], 100_000).unwrap();
        file.sync_data().unwrap();
        assert_ne!(content_id(folder), old, "{}", flat.display());
        let extent = fs::read(folder.join("a-flat.vmdk")).unwrap();
        assert!(extent[100_000..110_000] == [7; 10_000]);
    }
    drop((reader, held));
    assert!(mount.unmount().success());
}

#[test]
fn a_second_writing_session_after_an_idle_one_is_noticed_too() {
    both_ways("", |mount, folder| {
        let old = content_id(folder);
        drop(writer(&mount.flat("a.vmdk")));
        assert_eq!(content_id(folder), old);
        let file = writer(&mount.flat("a.vmdk"));
        file.write_all_at(&[1; 512], 0).unwrap();
        drop(file);
        wait_until("the content id is new", || content_id(folder) != old);
        assert!(mount.unmount().success());
    });
}

#[test]
fn the_content_id_follows_an_unsynced_write_within_five_seconds() {
    both_ways("", |mount, folder| {
        let old = content_id(folder);
        let file = writer(&mount.flat("a.vmdk"));
        file.write_all_at(&[1; 512], 0).unwrap();
        wait_until("the content id is new", || content_id(folder) != old);
        drop(file);
        assert!(mount.unmount().success());
    });
}

#[test]
fn writing_past_the_end_is_an_error_and_leaves_the_size() {
    both_ways("", |mount, folder| {
        let file = writer(&mount.flat("a.vmdk"));
        file.write_all_at(&[1; 512], SIZE - 512).unwrap();
        // Without passthrough the write itself fails, with it the fsync.
        let past = file.write_all_at(&[2; 4096], SIZE).and_then(|()| file.sync_data());
        assert_eq!(past.unwrap_err().raw_os_error(), Some(Errno::ENOSPC as i32));
        assert_eq!(fs::metadata(folder.join("a-flat.vmdk")).unwrap().len(), SIZE);
        file.sync_data().unwrap();
        let past = file.write_all_at(&[2; 4096], SIZE);
        let closed = nix::unistd::close(file);
        assert_eq!(past.is_err() as u8 + closed.is_err() as u8, 1, "{past:?}, {closed:?}");
        assert_eq!(fs::metadata(folder.join("a-flat.vmdk")).unwrap().len(), SIZE);
        assert!(mount.unmount().success());
        let check = outcome(flatdisk().arg("check").arg(folder.join("a.vmdk")));
        assert_eq!(check.status.code(), Some(0), "{check:?}");
    });
}

#[test]
fn punched_holes_are_seen_by_readers_at_once() {
    use nix::fcntl::{FallocateFlags, fallocate};
    both_ways("", |mount, folder| {
        let file = writer(&mount.flat("a.vmdk"));
        file.write_all_at(&vec![5; 1 << 20], 0).unwrap();
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, hole, 4096, 8192).unwrap();
        let mut seen = vec![9; 16384];
        file.read_exact_at(&mut seen, 0).unwrap();
        assert!(seen[..4096].iter().all(|&b| b == 5) && seen[12288..].iter().all(|&b| b == 5));
        assert!(seen[4096..12288].iter().all(|&b| b == 0));
        drop(file);
        assert!(mount.unmount().success());
        assert_eq!(fs::read(folder.join("a-flat.vmdk")).unwrap()[..16384], seen[..]);
    });
}

#[test]
fn throw_away_writing_to_a_flat_extent_leaves_it_alone() {
    both_ways(",nonpersistent", |mount, folder| {
        let before = sha256(&folder.join("a-flat.vmdk"));
        let file = writer(&mount.flat("a.vmdk"));
        file.write_all_at(&[5; 4096], 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        assert!(mount.unmount().success());
        assert_eq!(sha256(&folder.join("a-flat.vmdk")), before);
    });
}

/// Makes a file system of its own for images: what `mkfs.ext4` is told, and by which program it is mounted.
fn on_ext4(options: &[&str], mount: &[&str], test: impl FnOnce(&Path)) {
    if !live::can_mount() || !live::have(&["mkfs.ext4", mount[0]]) {
        return;
    }
    let folder = scratch();
    let (device, point) = (folder.path().join("device"), folder.path().join("point"));
    fs::create_dir(&point).unwrap();
    File::create(&device).unwrap().set_len(64 << 20).unwrap();
    live::succeed(
        std::process::Command::new("mkfs.ext4").args(["-q", "-F"]).args(options).arg(&device),
    );
    let _mounting = live::mounting();
    live::succeed(std::process::Command::new(mount[0]).args(&mount[1..]).arg(&device).arg(&point));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&point)));
    wait_until("the images' file system is not in use", || {
        outcome(std::process::Command::new("umount").arg(&point)).status.success()
    });
    result.unwrap_or_else(|failure| std::panic::resume_unwind(failure));
}

/// What the kernel writes within the second of the last change would not show.
#[test]
fn where_the_host_keeps_whole_seconds_fsync_and_content_id_are_as_everywhere() {
    on_ext4(&["-I", "128"], &["mount", "-o", "loop"], |folder| {
        create(&folder.join("a.vmdk"), "8M", &["--subformat", "monolithicFlat"]);
        let mount = Mount::new(folder, &[]);
        let old = content_id(folder);
        let file = writer(&mount.flat("a.vmdk"));
        file.write_all_at(&[7; 4096], 0).unwrap();
        file.sync_all().unwrap();
        assert_ne!(content_id(folder), old);
        drop(file);
        assert!(mount.unmount().success());
    });
}

/// The kernel's cache and the listing must not be what they were a moment before.
#[test]
fn where_the_host_keeps_whole_seconds_changes_show() {
    on_ext4(&["-I", "128"], &["mount", "-o", "loop"], |folder| {
        create(&folder.join("a.vhd"), "8M", &["--subformat", "fixed"]);
        let mount = Mount::new(folder, &[]);
        let host = writer(&folder.join("a.vhd"));
        for round in 1..20 {
            host.write_all_at(&[round; 4096], 0).unwrap();
            let mut found = [0; 4096];
            File::open(mount.flat("a.vhd")).unwrap().read_exact_at(&mut found, 0).unwrap();
            assert!(found == [round; 4096], "round {round}: {}", found[0]);
            // While it is open, programs that mind no locks are not reckoned with.
            wait_until("the image is closed", || mount.open_files(folder).is_empty());
        }
        drop(host);
        for round in 0..5 {
            let name = format!("new{round}.vhd");
            fs::copy(folder.join("a.vhd"), folder.join(&name)).unwrap();
            fs::metadata(mount.flat(&name)).unwrap();
        }
        assert!(mount.unmount().success());
    });
}

#[test]
fn on_a_fuse_file_system_direct_io_is_not_passed_through() {
    on_ext4(&[], &["fuse2fs", "-o", "fakeroot"], |folder| {
        use std::os::unix::fs::OpenOptionsExt;
        create(&folder.join("a.vmdk"), "8M", &["--subformat", "monolithicFlat"]);
        let mount = Mount::new(folder, &[]);
        let direct = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(mount.flat("a.vmdk"))
            .unwrap();
        #[repr(align(4096))]
        struct Page([u8; 4096]);
        direct.write_all_at(&Page([5; 4096]).0, 4096).unwrap();
        direct.sync_all().unwrap();
        let mut page = Page([0; 4096]);
        direct.read_exact_at(&mut page.0, 4096).unwrap();
        assert!(page.0 == [5; 4096]);
        drop(direct);
        assert!(mount.unmount().success());
    });
}
