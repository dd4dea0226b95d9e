#!/usr/bin/env bash
# Guess: `cp --sparse=never SPARSE COPY` makes a copy with all its space allocated, and so does `cat SPARSE >COPY`, which writes every byte.
# Seen: on ext4. On XFS and btrfs cp clones the file if it can, whatever --sparse says, and cat has the kernel copy (copy_file_range),
#       which clones there too: both copies are as sparse as the source, and share its blocks. A preallocated source even loses
#       its allocation to `cp --sparse=never` on XFS. `cp --sparse=never --reflink=never` and dd allocate everything, so a disk that
#       must not be sparse, for Hyper-V for instance, takes these.
# With: coreutils 9.1-1 (Debian), Linux 6.18.
# Needs: root (a loop device), mkfs.ext4, mkfs.xfs, mkfs.btrfs, fallocate, Debian's apt-get and dpkg.
set -euo pipefail
for tool in mkfs.ext4 mkfs.xfs mkfs.btrfs fallocate losetup apt-get dpkg; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"
trap 'umount "$dir/mnt" 2>/dev/null || true; rm -rf "$dir"' EXIT
apt-get download -qq coreutils=9.1-1 2>/dev/null || { echo "coreutils 9.1-1 is not to be had"; exit 2; }
dpkg -x coreutils*.deb root
root/bin/cp --version | sed -n 1p; uname -r; mkdir mnt
changed=0
expect() { # FILE-SYSTEM WHAT WANTED-MIB
  sync -f mnt
  cmp "$source" mnt/copy || exit 2
  seen=$((($(stat -c %b mnt/copy) + 1024) / 2048))
  echo "$1, $2: $seen MiB of 64 allocated"
  [ "$seen" = "$3" ] || { echo "CHANGED: not $3"; changed=1; }
  rm mnt/copy
}
for kind in ext4 xfs btrfs; do
  rm -f disk && truncate -s 600M disk
  case $kind in
    ext4) mkfs.ext4 -q -F disk ;;
    xfs) mkfs.xfs -q -f disk ;;
    btrfs) mkfs.btrfs -q -f -m single disk >/dev/null 2>&1 ;;
  esac
  mount -o loop disk mnt 2>/dev/null || { echo "cannot mount $kind"; exit 2; }
  source=mnt/sparse
  truncate -s 64M $source && printf data | dd of=$source bs=1 seek=30000000 conv=notrunc status=none
  fallocate -l 64M mnt/preallocated
  sync -f mnt
  case $kind in ext4) never=64 cat=64 preallocated=64 ;; xfs) never=0 cat=0 preallocated=0 ;; btrfs) never=0 cat=0 preallocated=64 ;; esac
  root/bin/cp --sparse=never $source mnt/copy; expect $kind 'cp --sparse=never' $never
  root/bin/cat $source >mnt/copy; expect $kind 'cat' $cat
  root/bin/cp --sparse=never --reflink=never $source mnt/copy; expect $kind 'cp --sparse=never --reflink=never' 64
  root/bin/dd if=$source of=mnt/copy bs=1M status=none; expect $kind 'dd' 64
  source=mnt/preallocated
  root/bin/cp --sparse=never $source mnt/copy; expect $kind 'preallocated, cp --sparse=never' $preallocated
  umount mnt
done
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
