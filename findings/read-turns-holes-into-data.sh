#!/usr/bin/env bash
# Guess: reading a file does not change where lseek's SEEK_DATA and SEEK_HOLE find its data.
# Seen: on ext4 and XFS a preallocated file (fallocate) is one hole until somebody reads it: what was read is data from then on, 64 KiB
#       or all of it, until the page cache lets go of it. So whether `cp` or qemu-img copies a fixed raw disk's empty part depends on who
#       looked at the disk before, a checksum or an antivirus scan for instance; `qemu-img map` says zero:true, and zero:false after;
#       and `fallocate --dig-holes` takes away the allocation of what was read, and of nothing else. On btrfs it stays a hole. The kernel takes
#       every page in the cache above an unwritten extent for data, as it may be dirty.
# With: Linux 6.18, qemu-img 10.0.2.
# Needs: root (loop devices), mkfs.ext4, mkfs.xfs, mkfs.btrfs, qemu-img, python3.
set -euo pipefail
for tool in mkfs.ext4 mkfs.xfs mkfs.btrfs qemu-img python3 losetup; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"
trap 'umount "$dir/mnt" 2>/dev/null || true; rm -rf "$dir"' EXIT
uname -r; mkdir mnt
cat >data.py <<'PY'
import os
import sys

file = os.open(sys.argv[1], os.O_RDONLY)
if sys.argv[2:] == ["forget"]:
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
elif len(sys.argv) > 2:
    os.pread(file, 65536, int(sys.argv[2]))
at, data = 0, 0
while True:
    try:
        at = os.lseek(file, at, os.SEEK_DATA)
    except OSError:
        break
    end = os.lseek(file, at, os.SEEK_HOLE)
    data, at = data + end - at, end
print(data)
PY

changed=0
expect() { # FILE-SYSTEM WHAT WANTED SEEN
  echo "$1: $2: $4 bytes of data"
  [ "$3" = "$4" ] || { echo "CHANGED: not $3"; changed=1; }
}
zero() { qemu-img map --output=json -f raw "$1" | grep -c '"zero": true' || true; }
for kind in ext4 xfs btrfs; do
  rm -f disk && truncate -s 400M disk
  case $kind in
    ext4) mkfs.ext4 -q -F disk ;;
    xfs) mkfs.xfs -q -f disk ;;
    btrfs) mkfs.btrfs -q -f disk >/dev/null 2>&1 ;;
  esac
  mount -o loop disk mnt 2>/dev/null || { echo "cannot mount $kind"; exit 2; }
  fallocate -l 8M mnt/fixed.raw
  sync
  case $kind in btrfs) part=0 all=0 zeroes=1 ;; *) part=65536 all=8388608 zeroes=0 ;; esac
  expect $kind "preallocated" 0 "$(python3 data.py mnt/fixed.raw)"
  [ "$(zero mnt/fixed.raw)" = 1 ] || { echo "CHANGED: qemu-img map sees data"; changed=1; }
  expect $kind "64 KiB at 2 MiB read" $part "$(python3 data.py mnt/fixed.raw 2097152)"
  cat mnt/fixed.raw >/dev/null
  expect $kind "all of it read" $all "$(python3 data.py mnt/fixed.raw)"
  [ "$(zero mnt/fixed.raw)" = $zeroes ] || { echo "CHANGED: qemu-img map"; changed=1; }
  for dug in unread read; do
    fallocate -l 8M mnt/$dug.raw
    sync -f mnt
    [ $dug = unread ] || cat mnt/read.raw >/dev/null
    fallocate --dig-holes mnt/$dug.raw
    sync -f mnt
    left=$(du -k mnt/$dug.raw | cut -f 1)
    echo "$kind: $dug, fallocate --dig-holes: $left KiB of 8192 allocated"
    if [ $dug = unread ] || [ $kind = btrfs ]; then least=8192; else least=0; fi
    [ "$left" = $least ] || { echo "CHANGED: not $least"; changed=1; }
  done
  expect $kind "page cache dropped" 0 "$(python3 data.py mnt/fixed.raw forget)"
  umount mnt
done
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
