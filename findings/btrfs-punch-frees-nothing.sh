#!/usr/bin/env bash
# Guess: what is punched out of a disk image (fstrim on a loop device, qemu's discard=unmap, compacting tools) goes back to the host's file
#        system, as du shows; and writing over a raw disk's bytes needs no more room than the disk has.
# Seen: not on btrfs. An extent, up to 128 MiB long where the image was written in large pieces, stays whole until nobody refers to any part
#       of it: 240 MiB of 256 punched, du says 16, and not one block is free for others. In the same way an image whose bytes are written
#       over, but for one piece of each extent, takes nearly twice its size. `btrfs filesystem defragment` leaves pieces between holes as
#       they are; a copy (cp --reflink=never) takes no more than it holds. On ext4 and XFS df agrees with du.
# With: Linux 6.18, btrfs-progs 6.2.
# Needs: root (a loop device), mkfs.ext4, mkfs.xfs, mkfs.btrfs, btrfs, python3, fallocate.
set -euo pipefail
for tool in mkfs.ext4 mkfs.xfs mkfs.btrfs btrfs python3 fallocate losetup; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"
trap 'umount "$dir/mnt" 2>/dev/null || true; rm -rf "$dir"' EXIT
uname -r; mkdir mnt
head -c 64M /dev/urandom >random
before=0
used() { # MiB of the file system, without what it used when it was empty
  sync -f mnt
  echo $((($(df -k --output=used mnt | tail -n 1) - before) / 1024))
}
changed=0
expect() { # FILE-SYSTEM WHAT LEAST MOST
  seen=$(used)
  echo "$1: $2: du says $(du -m mnt/disk.raw | cut -f 1) MiB, the file system uses $seen"
  [ "$seen" -ge "$3" ] && [ "$seen" -le "$4" ] || { echo "CHANGED: not $3 to $4"; changed=1; }
}
fresh() { # a file system, and an image of 64 MiB in it, written in one piece
  rm -f disk && truncate -s 500M disk
  case $1 in
    ext4) mkfs.ext4 -q -F disk ;;
    xfs) mkfs.xfs -q -f disk ;;
    btrfs) mkfs.btrfs -q -f -m single disk >/dev/null 2>&1 ;;
  esac
  mount -o loop disk mnt 2>/dev/null || { echo "cannot mount $1"; exit 2; }
  before=0 before=$(($(used) * 1024))
  dd if=random of=mnt/disk.raw bs=64M count=1 oflag=direct status=none
}
for kind in ext4 xfs btrfs; do
  fresh $kind
  expect $kind "written" 62 68
  for ((at = 0; at < 64; at++)); do fallocate -p -o ${at}M -l 960K mnt/disk.raw; done
  case $kind in btrfs) least=62 most=68 ;; *) least=3 most=8 ;; esac
  expect $kind "60 MiB punched out" $least $most
  if [ $kind = btrfs ]; then
    btrfs filesystem defragment -f mnt/disk.raw
    expect $kind "defragmented" 62 68
    cp --reflink=never --sparse=always mnt/disk.raw mnt/copy.raw && mv mnt/copy.raw mnt/disk.raw
    sleep 1
    expect $kind "copied" 3 8
  fi
  umount mnt
  fresh $kind
  for ((at = 0; at < 64; at++)); do
    dd if=/dev/zero of=mnt/disk.raw bs=960K count=1 seek=${at}M oflag=direct,seek_bytes conv=notrunc status=none
  done
  case $kind in btrfs) least=120 most=130 ;; *) least=62 most=68 ;; esac
  expect $kind "60 MiB written over" $least $most
  umount mnt
done
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
