//! `mount`, `umount` and fstab lines on a machine on which flatdisk is installed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use live::have;
use live::installed::script;

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

#[test]
fn every_option_of_mount_is_taken_ignored_or_refused() {
    script(
        r#"
        shows() { # OPTIONS WHAT: so mounted, flags, owner:group:mode of directory and file have WHAT
            mount -t fuse.flatdisk "$IMAGES" "$POINT" -o "$1"
            seen=",$(findmnt -n -o OPTIONS "$POINT"),"
            seen="$seen$(stat -c dir:%u:%g:%a "$POINT"),$(stat -c file:%u:%g:%a "$POINT/a.vhdx.img"),"
            umount "$POINT"
            case "$seen" in *",$2,"*) ;; *) echo "$1: no $2 in $seen"; exit 6;; esac
        }
        refused() { # OPTIONS WHY
            status=0; mount -t fuse.flatdisk "$IMAGES" "$POINT" -o "$1" 2>"$T/err" || status=$?
            [ $status = 1 ] || { echo "$1: status $status"; exit 6; }
            grep -q "$2" "$T/err" || { cat "$T/err"; exit 6; }
            if live; then echo "$1: mounted"; exit 6; fi
        }
        chmod 755 "$IMAGES"; chmod 644 "$IMAGES/a.vhdx"
        shows ro ro
        shows ro file:0:0:444
        shows rw rw
        shows rw default_permissions
        shows rw allow_other
        for word in allow_other allow_root default_permissions _netdev nofail user users owner group \
            auto_unmount max_read=131072 subtype=other comment=x x-gvfs-show X-mount.mkdir relatime; do
            shows $word allow_other
        done
        for word in nosuid nodev noexec noatime sync dirsync; do
            shows $word $word
            shows ro,$word,nosuid ro
        done
        shows noexec,exec,noatime,atime,sync,async relatime
        shows uid=3,gid=4 file:3:4:644
        shows uid=daemon dir:1:0:755
        shows umask=027 file:0:0:640
        shows umask=027 dir:0:0:750
        shows fmask=077 file:0:0:600
        shows dmask=077 dir:0:0:700
        refused remount "unmount it and mount it again"
        refused remount,ro "unmount it and mount it again"
        refused nonsense nonsense
        refused ro,nonsense=1 nonsense
        refused umask=8 umask
        refused uid=nobody-of-this-name uid
        "#,
    );
}

#[test]
fn mount_tables_show_the_source() {
    script(
        r#"
        odd="$IMAGES/a,b\\c d"
        mkdir "$odd"
        mount -t fuse.flatdisk "$odd" "$POINT"
        [ "$(findmnt -n -o SOURCE "$POINT")" = "$odd" ]
        [ "$(df --output=source "$POINT" | tail -n 1)" = "$odd" ]
        [ "$(df --output=size "$POINT" | tail -n 1)" = "$(df --output=size "$IMAGES" | tail -n 1)" ]
        umount "$odd" 2>/dev/null && { echo "unmounted by its source"; exit 6; }
        umount "$POINT"
        mount -t fuse.flatdisk "$IMAGES" "$POINT" -o 'fsname=a\,b'
        [ "$(findmnt -n -o SOURCE "$POINT")" = a,b ]
        umount "$POINT"
        "#,
    );
}

#[test]
fn helpers_keep_the_conventions_of_mount() {
    script(
        r#"
        status() { # STATUS COMMAND...
            expected=$1; shift
            status=0; "$@" >"$T/out" 2>"$T/err" || status=$?
            [ $status = $expected ] || { echo "$*: $status instead of $expected"; cat "$T/err"; exit 6; }
        }
        said() { grep -q "$1" "$T/err" || { echo "not said: $1"; cat "$T/err"; exit 6; }; }
        # In any order, and a fake mount checks all but mounts nothing.
        status 0 mount.flatdisk "$IMAGES" "$POINT" -sfnv -o ro -t fuse.flatdisk
        status 0 mount.fuse.flatdisk -f -o rw "$IMAGES" -n "$POINT"
        if live; then echo "a fake mount is mounted"; exit 6; fi
        status 32 mount -f -t flatdisk "$IMAGES/absent" "$POINT"
        status 0 mount -n -v -t flatdisk "$IMAGES" "$POINT"
        live
        status 32 mount -t flatdisk "$IMAGES" "$POINT"
        said "already a mount of flatdisk"
        # In use: not unmounted, and it says by whom.
        exec 9< "$POINT/a.vhdx.img"
        status 32 umount "$POINT"
        said "sh (process $$)"
        live
        status 0 umount -l "$POINT"
        if live; then echo "still mounted"; exit 6; fi
        exec 9<&-
        # Not for us to do.
        status 1 mount.flatdisk "$IMAGES" "$POINT" -N /proc/self/ns/mnt
        status 1 umount.flatdisk -N /proc/self/ns/mnt "$POINT"
        # Usage.
        status 1 mount.flatdisk "$IMAGES"
        status 1 mount.flatdisk "$IMAGES" "$POINT" -Z
        status 1 umount.flatdisk
        status 32 umount.flatdisk "$POINT"
        status 32 mount.flatdisk "$IMAGES" "$POINT/absent"
        said "create the directory first"
        status 32 mount.flatdisk "$POINT" "$IMAGES/a.vhdx"
        said "the mount point comes last"
        "#,
    );
}

#[test]
fn mount_fuse3_runs_the_program_where_the_helper_is_missing() {
    if !have(&["mount.fuse3"]) {
        return;
    }
    script(
        r#"
        rm /usr/sbin/mount.flatdisk /usr/sbin/mount.fuse.flatdisk
        mount -t fuse.flatdisk "$IMAGES" "$POINT" -o ro,nofail,_netdev,user,uid=1
        [ "$(findmnt -n -o SOURCE,FSTYPE "$POINT" | tr -s ' ')" = "$IMAGES fuse.flatdisk" ]
        [ "$(stat -c %u:%a "$POINT/a.vhdx.img")" = 1:444 ]
        umount "$POINT"
        mount -t fuse "flatdisk#$IMAGES" "$POINT"
        [ "$(ls "$POINT")" = a.vhdx.img ]
        umount "$POINT"
        status=0; mount -t fuse.flatdisk "$IMAGES" "$POINT" -o nonsense 2>"$T/err" || status=$?
        [ $status = 1 ]; grep -q nonsense "$T/err"
        "#,
    );
}

#[test]
fn a_user_mounts_and_unmounts_what_fstab_allows() {
    if !have(&["setpriv", "fusermount3"]) {
        return;
    }
    script(
        r#"
        mknod "$T/fuse" c 10 229; chmod 666 "$T/fuse"
        mount --bind "$T/fuse" /dev/fuse
        chmod 755 "$T"; chown -R 65534:65534 "$IMAGES" "$POINT"
        nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups -- "$@"; }
        echo "$IMAGES $POINT flatdisk noauto,user 0 0" >> /etc/fstab
        nobody mount "$POINT"
        findmnt -n -o OPTIONS "$POINT" | grep -q user_id=65534
        nobody dd if=/dev/zero of="$POINT/a.vhdx.img" bs=4k count=1 conv=notrunc 2>/dev/null
        nobody umount "$POINT"
        if live; then echo "still mounted"; exit 7; fi
        closed
        "#,
    );
}

#[test]
fn other_fuse_mounts_are_unmounted_as_ever() {
    if !have(&["vhdimount"]) {
        return;
    }
    script(
        r#"
        "$FLATDISK" create -q --size 8M "$IMAGES/b.vhd"
        vhdimount "$IMAGES/b.vhd" "$POINT" >/dev/null
        exec 9< "$POINT/vhdi1"
        status=0; umount "$POINT" 2>"$T/err" || status=$?
        [ $status = 32 ]; grep -q "target is busy" "$T/err"
        umount -l "$POINT"
        exec 9<&-
        if live; then echo "still mounted"; exit 7; fi
        vhdimount "$IMAGES/b.vhd" "$POINT" >/dev/null
        cd "$POINT/.."
        umount "$(basename "$POINT")"
        if live; then echo "still mounted"; exit 7; fi
        status=0; umount.fuse "$POINT" 2>"$T/err" || status=$?
        [ $status = 32 ]; grep -q "not mounted" "$T/err"
        "#,
    );
}
