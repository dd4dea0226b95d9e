//! What users name as a source, and what only lies below it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod live;

use std::fs;

use common::corpus;
use live::{Mount, create, have, scratch, sha256};

/// Larger disks are hashed by `tests/corpus.rs`.
const LARGEST: u64 = 16 << 20;

#[test]
fn images_without_an_extension_are_mounted_where_they_are_named() {
    let Some(folder) = corpus::folder().filter(|_| live::can_mount()) else { return };
    let mut mounted = 0;
    for row in corpus::rows(&folder) {
        if row.expected != "opens" || row.virtual_size == 0 || row.virtual_size > LARGEST {
            continue;
        }
        let case = corpus::unpack(&folder, &row);
        let image = case.dir.path().join("no-extension");
        fs::rename(&case.image, &image).unwrap();
        let mount = Mount::new(&image, &["--ro"]);
        let flat = mount.flat("no-extension");
        assert_eq!(fs::metadata(&flat).unwrap().len(), row.virtual_size, "{}", row.id);
        assert_eq!(sha256(&flat), row.sha256, "{}", row.id);
        assert!(mount.unmount().success());
        mounted += 1;
    }
    assert!(mounted >= 5, "{mounted}");
}

#[test]
fn a_strangers_file_system_is_entered_only_where_it_is_named() {
    let tools = ["unshare", "setpriv", "squashfuse", "mksquashfs", "mountpoint"];
    if !live::can_mount() || !have(&tools) {
        return;
    }
    let scratch = scratch();
    fs::create_dir(scratch.path().join("images")).unwrap();
    create(&scratch.path().join("images/a.vhd"), "4M", &[]);
    let script = r#"
        set -eux
        chmod 755 "$T"; chmod 644 "$T/images/a.vhd"; mkdir "$T/flat"; mkdir -m 777 "$T/theirs"
        mksquashfs "$T/images" "$T/disk" -quiet >/dev/null
        echo user_allow_other > "$T/fuse.conf"; mount --bind "$T/fuse.conf" /etc/fuse.conf
        mknod "$T/fuse" c 10 229; chmod 666 "$T/fuse"; mount --bind "$T/fuse" /dev/fuse
        trap 'umount -il "$T/flat" "$T/theirs" 2>/dev/null || true' EXIT
        setpriv --reuid=65534 --regid=65534 --clear-groups squashfuse -o allow_other "$T/disk" "$T/theirs"
        # It may never answer: a folder above it does not lead in.
        "$FLATDISK" mount --ro "$T" "$T/flat"
        [ -f "$T/flat/images/a.vhd.img" ]; [ ! -e "$T/flat/theirs" ]
        "$FLATDISK" umount "$T/flat"
        # Named, it is what root wants.
        for source in "$T/theirs" "$T/theirs/a.vhd"; do
            "$FLATDISK" mount --ro "$source" "$T/flat"
            cmp "$T/flat/a.vhd.img" /dev/zero -n 4194304
            "$FLATDISK" umount "$T/flat"
        done
    "#;
    live::succeed_in_namespace(script, &[("T", &scratch.path())]);
}
