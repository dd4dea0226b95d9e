//! Many images, and huge ones.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Instant;

use live::{Mount, create, scratch};

const LIMIT: u64 = 100 << 20;

#[test]
fn ten_thousand_images_are_listed_without_opening_one() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    let first = folder.path().join("0.vhd");
    create(&first, "4M", &[]);
    for i in 1..10_000 {
        fs::copy(&first, folder.path().join(format!("{i}.vhd"))).unwrap();
    }
    let mount = Mount::new(folder.path(), &[]);
    let start = Instant::now();
    let names = fs::read_dir(mount.path()).unwrap().count();
    let listed = start.elapsed();
    assert_eq!(names, 10_000);
    assert_eq!(mount.open_files(folder.path()), Vec::<std::path::PathBuf>::new());
    let start = Instant::now();
    for entry in fs::read_dir(mount.path()).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().len(), 4 << 20);
    }
    println!(
        "names in {listed:?}, names with sizes in {:?}, {} KiB resident",
        start.elapsed(),
        mount.memory() >> 10
    );
    assert_eq!(mount.open_files(folder.path()), Vec::<std::path::PathBuf>::new());
    assert!(mount.memory() < LIMIT);
    assert!(mount.unmount().success());
}

#[test]
fn huge_disks_open_at_once_and_read_in_bounded_memory() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    let images = [("huge.vhdx", "64T"), ("huge.vhd", "2040G"), ("huge.vmdk", "2T")];
    for (image, size) in images {
        let options: &[&str] = if image == "huge.vhdx" { &["--block-size", "1M"] } else { &[] };
        create(&folder.path().join(image), size, options);
    }
    let mount = Mount::new(folder.path(), &[]);
    for (image, _) in images {
        let start = Instant::now();
        let flat = File::options().read(true).write(true).open(mount.flat(image)).unwrap();
        let mut sector = [1; 512];
        flat.read_exact_at(&mut sector, 0).unwrap();
        let opened = start.elapsed();
        let size = flat.metadata().unwrap().len();
        let mut random = fastrand::Rng::with_seed(1);
        let mut block = [1; 4096];
        for _ in 0..20_000 {
            let at = random.u64(0..size / 4096) * 4096;
            flat.read_exact_at(&mut block, at).unwrap();
            assert_eq!(block, [0; 4096]);
        }
        for _ in 0..20 {
            let at = random.u64(0..size / 4096) * 4096;
            flat.write_all_at(&[7; 4096], at).unwrap();
            flat.read_exact_at(&mut block, at).unwrap();
            assert_eq!(block, [7; 4096]);
        }
        flat.sync_all().unwrap();
        println!("{image}: first sector after {opened:?}, {} KiB resident", mount.memory() >> 10);
        assert!(mount.memory() < LIMIT, "{image}: {} bytes", mount.memory());
    }
    assert!(mount.unmount().success());
}
