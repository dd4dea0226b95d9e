//! Users other than root, and a daemon without privileges.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use live::{create, have, scratch};

/// Runs a shell script in a mount namespace of its own, with `$FLATDISK`, a scratch folder `$T` and
/// a folder `$IMAGES` with `a.vhdx`.
fn script(body: &str) {
    let (images, scratch) = (scratch(), scratch());
    create(&images.path().join("a.vhdx"), "8M", &["--block-size", "1M"]);
    let prologue = r#"
        set -eu
        PATH="$PATH:/usr/sbin:/sbin"
        mkdir "$T/mnt"; chmod 755 "$T" "$IMAGES"
        live() { mountpoint -q "$T/mnt"; }
        refused() { if "$@" >"$T/out" 2>"$T/err"; then echo "succeeds: $*" >&2; exit 9; fi; }
        closed() { # waits until no process has the image open
            for i in $(seq 1000); do
                ls -l /proc/[0-9]*/fd 2>/dev/null | grep -qF "$IMAGES/" || return 0
            done
            echo "the image is still open" >&2; exit 8
        }
        trap 'umount -il "$T/mnt" 2>/dev/null || true' EXIT
    "#;
    live::succeed_in_namespace(
        &format!("{prologue}\nset -x\n{body}"),
        &[("IMAGES", &images.path()), ("T", &scratch.path())],
    );
}

#[test]
fn an_ordinary_user_mounts_reads_writes_and_unmounts() {
    let tools = ["setpriv", "fusermount3", "unshare", "useradd", "mountpoint"];
    if !live::can_mount() || !have(&tools) {
        return;
    }
    script(
        r#"
        # A user whom only this namespace knows, and /dev/fuse for everybody, as on most machines.
        mkdir "$T/etc"; mount -t tmpfs none "$T/etc"; mkdir "$T/etc/upper" "$T/etc/work"
        mount -t overlay none -o "lowerdir=/etc,upperdir=$T/etc/upper,workdir=$T/etc/work" /etc
        useradd -M -N -d "$T" -s /bin/sh flatdisk-user
        useradd -M -N -d "$T" -s /bin/sh flatdisk-other
        mknod "$T/fuse" c 10 229; chmod 666 "$T/fuse"; mount --bind "$T/fuse" /dev/fuse
        cp "$FLATDISK" "$T/flatdisk"
        user() { as flatdisk-user "$@"; }
        other() { as flatdisk-other "$@"; }
        as() { who=$1; shift; setpriv --reuid="$who" --regid=nogroup --init-groups -- "$@"; }
        chown -R flatdisk-user:root "$IMAGES" "$T/mnt"
        echo > /etc/fuse.conf
        flat=$T/mnt/a.vhdx.img
        head -c 3000000 /dev/urandom > "$T/data"; chmod 644 "$T/data"

        # Written, and undone by fusermount3 as any FUSE mount.
        user "$T/flatdisk" mount "$IMAGES" "$T/mnt"
        [ "$(user stat -c %U "$flat")" = flatdisk-user ]
        user dd if="$T/data" of="$flat" bs=64k conv=notrunc,fsync 2>/dev/null
        refused cat "$flat"
        refused other ls "$T/mnt"
        user fusermount3 -u "$T/mnt"
        closed
        "$FLATDISK" check "$IMAGES/a.vhdx" >/dev/null

        # Read again, opened and closed by name, undone by flatdisk.
        user "$T/flatdisk" mount "$IMAGES/a.vhdx" "$T/mnt"
        user cmp -n 3000000 "$T/data" "$flat"
        user ln -s "$IMAGES/a.vhdx" "$T/mnt/again.img"
        user cmp -n 3000000 "$T/data" "$T/mnt/again.img"
        user "$T/flatdisk" status | grep -qF "$T/mnt"
        refused other "$T/flatdisk" umount "$T/mnt"
        user "$T/flatdisk" umount "$T/mnt"
        refused live
        closed

        # Others only where the administrator allows it, and then as the permission bits say.
        refused user "$T/flatdisk" mount -o allow_other "$IMAGES" "$T/mnt"
        grep -q user_allow_other "$T/err"; [ "$(grep -c ^flatdisk: "$T/err")" = 1 ]
        echo user_allow_other > /etc/fuse.conf
        user "$T/flatdisk" mount -o allow_other,umask=027 "$IMAGES" "$T/mnt"
        [ "$(user stat -c %a "$flat")" = 640 ]
        refused other cat "$flat"
        cmp -n 3000000 "$T/data" "$flat"
        refused other ln -s "$IMAGES/a.vhdx" "$T/mnt/not-yours.img"
        user "$T/flatdisk" umount "$T/mnt"
        user "$T/flatdisk" mount -o allow_other,uid=flatdisk-other,gid=nogroup,fmask=337 "$IMAGES" "$T/mnt"
        [ "$(stat -c %U:%G:%a "$flat")" = flatdisk-other:nogroup:440 ]
        other cmp -n 3000000 "$T/data" "$flat"
        refused other dd if=/dev/zero of="$flat" count=1 conv=notrunc
        "$FLATDISK" umount "$T/mnt"
        closed

        # Loop devices are root's; who is not root learns what to do.
        refused user "$T/flatdisk" attach "$IMAGES/a.vhdx"
        grep -q udisksctl "$T/err"; [ "$(grep -c ^flatdisk: "$T/err")" = 1 ]
        "#,
    );
}

#[test]
fn a_mount_made_by_somebody_else_is_served_without_privileges() {
    if !live::can_mount() || !have(&["mount.fuse3", "unshare", "mountpoint"]) {
        return;
    }
    script(
        r#"
        mkdir "$T/bin"; ln -s "$FLATDISK" "$T/bin/flatdisk"; PATH="$T/bin:$PATH"
        hand() { mount.fuse3 "$IMAGES" "$T/mnt" -t fuse.flatdisk -o "drop_privileges$1"; }
        flat=$T/mnt/a.vhdx.img

        hand ,default_permissions,allow_other
        pid=$("$FLATDISK" status --json "$T/mnt" | sed -n 's/.*"pid": \([0-9]*\).*/\1/p')
        grep -q '^CapEff:[[:space:]]*0000000000000000$' "/proc/$pid/status"
        head -c 3000000 /dev/urandom > "$T/data"
        dd if="$T/data" of="$flat" bs=64k conv=notrunc,fsync 2>/dev/null
        "$FLATDISK" umount "$T/mnt"
        refused live
        closed
        "$FLATDISK" check "$IMAGES/a.vhdx" >/dev/null

        hand ,ro
        cmp -n 3000000 "$T/data" "$flat"
        refused dd if=/dev/zero of="$flat" count=1 conv=notrunc
        umount "$T/mnt"
        closed

        # Nobody would check permissions.
        refused hand ,allow_other
        grep -q default_permissions "$T/err"
        umount -il "$T/mnt"

        # What is no open /dev/fuse is not taken for one.
        refused "$FLATDISK" mount "$IMAGES" /dev/fd/7 7</dev/null
        grep -q 'not an open /dev/fuse' "$T/err"
        refused "$FLATDISK" mount "$IMAGES" /dev/fd/77
        "#,
    );
}
