#!/usr/bin/env bash
# Guess: writing 256 pieces of 4 KiB into a reflink copy of an image on XFS takes about 1 MiB of new space, as on btrfs.
# Seen: 32 MiB: each first write to a shared place allocates 128 KiB (the CoW extent size hint's default) and uses 4 of them. du and df count
#       the rest as taken until the file is inactivated or, after minutes, a worker clears it: a copy that is written in many places
#       looks as large as its source before it is, whatever fsync and sync do. A remount shows what is really needed.
# With: Linux 6.18, xfsprogs 6.1, btrfs-progs 6.2.
# Needs: root (a loop device), mkfs.xfs, mkfs.btrfs, python3.
set -euo pipefail
for tool in mkfs.xfs mkfs.btrfs python3 losetup; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"
trap 'umount "$dir/mnt" 2>/dev/null || true; rm -rf "$dir"' EXIT
uname -r; mkdir mnt
before=0
used() { # KiB of the file system, without what it used before
  sync -f mnt
  echo $(($(df -k --output=used mnt | tail -n 1) - before))
}
changed=0
expect() { # FILE-SYSTEM WHAT LEAST MOST
  seen=$(used)
  echo "$1, $2: $seen KiB used"
  [ "$seen" -ge "$3" ] && [ "$seen" -le "$4" ] || { echo "CHANGED: not $3 to $4"; changed=1; }
}
for kind in xfs btrfs; do
  rm -f disk && truncate -s 600M disk
  case $kind in
    xfs) mkfs.xfs -q -f disk ;;
    btrfs) mkfs.btrfs -q -f -m single disk >/dev/null 2>&1 ;;
  esac
  mount -o loop disk mnt 2>/dev/null || { echo "cannot mount $kind"; exit 2; }
  dd if=/dev/zero of=mnt/image.raw bs=64M count=1 oflag=direct status=none
  cp --reflink=always mnt/image.raw mnt/copy.raw || exit 2
  before=0 before=$(used)
  python3 - <<'PY'
import os

copy = os.open("mnt/copy.raw", os.O_RDWR)
for number in range(256):
    os.pwrite(copy, b"x" * 4096, number << 18)
os.fsync(copy)
PY
  case $kind in xfs) least=30000 most=36000 ;; btrfs) least=1000 most=3000 ;; esac
  expect $kind "256 writes of 4 KiB" $least $most
  umount mnt; mount -o loop disk mnt
  expect $kind "mounted again" 1000 3000
  umount mnt
done
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
