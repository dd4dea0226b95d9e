#!/usr/bin/env bash
# Guess: space that was preallocated for a raw disk (fallocate) stays reserved for it when the disk is cloned (cp --reflink), and the clone
#        is as preallocated as its source.
# Seen: on btrfs neither has any reserve left: every write to either of them needs new space, and fails when the file system is full, though
#       du shows all of it allocated in both. On XFS the source keeps its reserve, and the clone has none: it occupies no blocks where
#       nothing was written. So one reflink copy, taken as a backup for instance, undoes what preallocation was made for.
# With: Linux 6.18, coreutils 9.1.
# Needs: root (loop devices), mkfs.xfs, mkfs.btrfs.
set -euo pipefail
for tool in mkfs.xfs mkfs.btrfs fallocate losetup; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"
trap 'umount "$dir/mnt" 2>/dev/null || true; rm -rf "$dir"' EXIT
uname -r; mkdir mnt
changed=0
expect() { # FILE-SYSTEM WHAT LEAST MOST SEEN
  echo "$1: $2: $5 MiB"
  [ "$5" -ge "$3" ] && [ "$5" -le "$4" ] || { echo "CHANGED: not $3 to $4"; changed=1; }
}
written() { # FILE: how much of 40 MiB can be written into it, in MiB
  said=$(dd if=/dev/zero of="$1" bs=1M count=40 conv=notrunc,fsync oflag=direct 2>&1 | tail -n 1) || true
  echo $((${said%% *} >> 20))
}
full() { # takes the rest of the file system
  local number=0 size
  for size in 64M 16M 4M 1M 256K 64K 4K; do
    while fallocate -l $size mnt/rest$number 2>/dev/null; do number=$((number + 1)); done
    rm -f mnt/rest$number
  done
}
for kind in xfs btrfs; do
  for cloned in no yes; do
    rm -f disk && truncate -s 320M disk
    case $kind in
      xfs) mkfs.xfs -q -f disk ;;
      btrfs) mkfs.btrfs -q -f -m single disk >/dev/null 2>&1 ;;
    esac
    mount -o loop disk mnt 2>/dev/null || { echo "cannot mount $kind"; exit 2; }
    fallocate -l 50M mnt/fixed.raw
    [ $cloned = no ] || cp --reflink=always mnt/fixed.raw mnt/clone.raw || exit 2
    sync
    held=$(du -m mnt/fixed.raw | cut -f 1)
    case $kind-$cloned in
      *-no)
        full
        expect $kind "not cloned, $held MiB allocated, written on a full disk" 40 40 "$(written mnt/fixed.raw)"
        ;;
      xfs-yes)
        expect xfs "clone allocated" 0 1 "$(du -m mnt/clone.raw | cut -f 1)"
        full
        expect xfs "cloned, $held MiB allocated, written on a full disk" 40 40 "$(written mnt/fixed.raw)"
        expect xfs "written into the clone" 0 2 "$(written mnt/clone.raw)"
        ;;
      btrfs-yes)
        expect btrfs "clone allocated" 50 50 "$(du -m mnt/clone.raw | cut -f 1)"
        full
        expect btrfs "cloned, $held MiB allocated, written on a full disk" 0 2 "$(written mnt/fixed.raw)"
        expect btrfs "written into the clone" 0 2 "$(written mnt/clone.raw)"
        ;;
    esac
    umount mnt
  done
done
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
