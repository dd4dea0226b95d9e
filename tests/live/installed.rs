//! A machine on which flatdisk is installed.
//!
//! It is this machine in a private mount namespace, where changes to `/usr`, `/etc` and `/var` go to
//! memory: flatdisk is installed there as an administrator does it, and the machine stays as it is.

use super::{can_mount, create, have, scratch, succeed_in_namespace};

/// Runs before every script.
const PROLOGUE: &str = r#"
    set -eu
    mount -t tmpfs none "$T"
    for dir in usr etc var; do
        mkdir -p "$T/layers/$dir" "$T/layers/work-$dir"
        mount -t overlay none "/$dir" \
            -o "lowerdir=/$dir,upperdir=$T/layers/$dir,workdir=$T/layers/work-$dir" || {
            echo "overlayfs cannot be mounted over /usr, /etc and /var here"; exit 77
        }
    done
    live() { mountpoint -q "$POINT"; }
    trap 'live && umount -il "$POINT" || true' EXIT
    closed() { # no process has an image open
        for fd in /proc/[0-9]*/fd/*; do
            case "$(readlink "$fd" 2>/dev/null)" in "$IMAGES"/a.*) echo "open: $fd"; return 1;; esac
        done
    }
"#;

/// Runs a shell script on a machine on which flatdisk is installed in `/usr`. In it `$FLATDISK` is the
/// program under test, `$IMAGES` a folder with `a.vhdx`, `$POINT` a mount point, `$T` a scratch folder in
/// memory, `live` says whether `$POINT` is a mount, `closed` that nobody has the image open.
pub fn script(body: &str) {
    let install =
        r#"unset SOURCE_DATE_EPOCH; "$FLATDISK" install-helpers --prefix /usr >/dev/null"#;
    bare_script(&format!("{install}\n{body}"));
}

/// As [`script`], with nothing installed.
pub fn bare_script(body: &str) {
    if !can_mount() || !have(&["unshare", "mount"]) {
        return;
    }
    let (images, point, scratch) = (scratch(), scratch(), scratch());
    create(&images.path().join("a.vhdx"), "8M", &["--block-size", "1M"]);
    succeed_in_namespace(
        &format!("{PROLOGUE}\n{body}"),
        &[("IMAGES", &images.path()), ("POINT", &point.path()), ("T", &scratch.path())],
    );
}
