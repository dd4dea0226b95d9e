//! The `fsx` exerciser on flat files: reads, writes, mappings and holes checked byte by byte.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs;
use std::process::Command;

use live::{Mount, create, have, scratch, succeed};

const IMAGES: [(&str, &[&str]); 9] = [
    ("fixed.vhd", &["--subformat", "fixed"]),
    ("dynamic.vhd", &["--block-size", "512K"]),
    ("dynamic.vhdx", &["--block-size", "1M"]),
    ("fixed.vhdx", &["--subformat", "fixed"]),
    ("sector4k.vhdx", &["--sector-size", "4096"]),
    ("sparse.vmdk", &[]),
    ("flat.vmdk", &["--subformat", "monolithicFlat"]),
    ("split.vmdk", &["--subformat", "twoGbMaxExtentSparse"]),
    ("splitflat.vmdk", &["--subformat", "twoGbMaxExtentFlat"]),
];

/// Operations per image; at least the 100,000 that a release is held to.
fn operations() -> String {
    std::env::var("FLATDISK_FSX_OPS").unwrap_or_else(|_| "100000".to_owned())
}

#[test]
fn every_format_passes_fsx() {
    if !live::can_mount() || !have(&["fsx"]) {
        return;
    }
    let folder = scratch();
    for (image, options) in IMAGES {
        create(&folder.path().join(image), "8M", options);
    }
    let config = folder.path().join("fsx.toml");
    // A disk has a fixed size: no truncation, no append, no allocation past the end.
    fs::write(
        &config,
        "flen = 8388608\nnosizechecks = true\nblockmode = true\n\
         [opsize]\nalign = 1\nmax = 65536\n\
         [weights]\ntruncate = 0\nposix_fallocate = 0\ninvalidate = 1\nfsync = 0.5\n\
         fdatasync = 0.5\npunch_hole = 3\nmapread = 5\nmapwrite = 5\nread = 10\nwrite = 10\n\
         sendfile = 0\ncopy_file_range = 0\n",
    )
    .unwrap();
    let mount = Mount::new(folder.path(), &[]);
    // Two at a time, which also mixes images in one daemon.
    let next = std::sync::atomic::AtomicUsize::new(0);
    let work = || {
        while let Some((image, _)) =
            IMAGES.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
        {
            println!("fsx on {image}, seed 1, {} operations", operations());
            succeed(
                Command::new("fsx")
                    .args(["-q", "-N", &operations(), "-S", "1", "-f"])
                    .arg(&config)
                    .arg("-P")
                    .arg(folder.path())
                    .arg(mount.flat(image)),
            );
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
    assert!(mount.unmount().success());
    for (image, _) in IMAGES {
        succeed(live::flatdisk().arg("check").arg(folder.path().join(image)));
    }
}
