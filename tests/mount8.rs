//! `mount`, `umount` and fstab lines with the helpers in `/sbin`.
//!
//! The helpers are put into a copy of `/usr/sbin` that only a private mount namespace sees, so the
//! machine stays as it is.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use live::{create, have, scratch};

/// Runs a shell script in a mount namespace whose `/usr/sbin` also holds flatdisk's helpers. In it
/// `$IMAGES` is a folder with `a.vhdx`, `$POINT` a mount point, `$T` a scratch folder.
fn script(body: &str) {
    if !live::can_mount() || !have(&["unshare", "mount"]) {
        return;
    }
    let (images, point, scratch) = (scratch(), scratch(), scratch());
    create(&images.path().join("a.vhdx"), "8M", &["--block-size", "1M"]);
    let prologue = r#"
        set -eu
        mkdir "$T/real" "$T/sbin"
        mount --bind /usr/sbin "$T/real"
        cp -as "$T/real/." "$T/sbin"
        for name in mount.flatdisk mount.fuse.flatdisk umount.flatdisk umount.fuse.flatdisk; do
            ln -sf "$FLATDISK" "$T/sbin/$name"
        done
        mount --bind "$T/sbin" /usr/sbin
        [ /sbin -ef /usr/sbin ] || mount --bind "$T/sbin" /sbin
        live() { mountpoint -q "$POINT"; }
        trap 'live && umount -il "$POINT" || true' EXIT
        closed() { # no process has an image open
            for fd in /proc/[0-9]*/fd/*; do
                case "$(readlink "$fd" 2>/dev/null)" in "$IMAGES"/a.*) echo "open: $fd"; return 1;; esac
            done
        }
    "#;
    let output = live::in_namespace(
        &format!("{prologue}\n{body}"),
        &[("IMAGES", &images.path()), ("POINT", &point.path()), ("T", &scratch.path())],
    );
    assert!(
        output.status.success(),
        "{}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn mount_by_type_and_umount_that_waits() {
    script(
        r#"
        for type in fuse.flatdisk flatdisk; do
            mount -t $type "$IMAGES" "$POINT" -o ro
            live
            [ "$(stat -c %s "$POINT/a.vhdx.img")" = 8388608 ]
            if dd if=/dev/zero of="$POINT/a.vhdx.img" count=1 conv=notrunc 2>/dev/null; then echo "wrote to a read-only mount"; exit 8; fi
            findmnt -n -o FSTYPE "$POINT" | grep -qx fuse.flatdisk
            findmnt -n -o SOURCE "$POINT" | grep -qxF "$IMAGES"
            umount "$POINT"
            if live; then echo "still mounted"; exit 7; fi
        done
        "#,
    );
}

#[test]
fn umount_returns_when_the_image_is_closed_and_complete() {
    script(
        r#"
        mount -t fuse.flatdisk "$IMAGES" "$POINT"
        dd if=/dev/urandom of="$T/data" bs=64k count=80 2>/dev/null
        dd if="$T/data" of="$POINT/a.vhdx.img" bs=64k conv=notrunc 2>/dev/null
        umount "$POINT"
        closed
        before=$(sha256sum < "$IMAGES/a.vhdx")
        "$FLATDISK" check "$IMAGES/a.vhdx" >/dev/null
        mount -t flatdisk "$IMAGES" "$POINT" -o ro
        cmp -n 5242880 "$T/data" "$POINT/a.vhdx.img"
        umount "$POINT"
        [ "$before" = "$(sha256sum < "$IMAGES/a.vhdx")" ]
        "#,
    );
}

#[test]
fn fstab_lines_work() {
    script(
        r#"
        {
            echo "$IMAGES $POINT fuse.flatdisk ro,allow_other,nofail,x-gvfs-show 0 0"
            echo "$IMAGES $POINT flatdisk rw,noauto,nofail,_netdev,user,x-systemd.automount 0 0"
        } > "$T/fstab"
        sed -n 1p "$T/fstab" > "$T/one"; sed -n 2p "$T/fstab" > "$T/two"
        mount -T "$T/one" "$POINT"
        ls "$POINT" | grep -qx a.vhdx.img
        umount "$POINT"
        mount -T "$T/two" "$POINT"
        dd if=/dev/zero of="$POINT/a.vhdx.img" bs=512 count=1 conv=notrunc,fsync 2>/dev/null
        umount "$POINT"
        closed
        "#,
    );
}

#[test]
fn the_image_itself_can_be_the_source_and_errors_keep_their_status() {
    script(
        r#"
        mount -t fuse.flatdisk "$IMAGES/a.vhdx" "$POINT"
        [ "$(ls "$POINT")" = a.vhdx.img ]
        if mount -t fuse.flatdisk "$IMAGES" "$POINT" -o remount,ro 2>"$T/err"; then exit 9; fi
        umount "$POINT"
        status=0; mount -t fuse.flatdisk "$IMAGES/absent" "$POINT" 2>"$T/err" || status=$?
        [ $status = 32 ]; grep -q absent "$T/err"
        status=0; mount -t fuse.flatdisk "$IMAGES" "$POINT" -o nonsense 2>"$T/err" || status=$?
        [ $status = 1 ]; grep -q nonsense "$T/err"
        mount -s -t flatdisk "$IMAGES" "$POINT" -o nonsense
        umount "$POINT"
        mount -f -t flatdisk "$IMAGES" "$POINT"
        if live; then echo "still mounted"; exit 7; fi
        "#,
    );
}
