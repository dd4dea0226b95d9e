#!/usr/bin/env bash
# Guess: making a file system in a raw disk that was preallocated (fallocate, `qemu-img create -o preallocation=falloc`) leaves it allocated:
#        mkfs writes its few blocks.
# Seen: mkfs.ext4 on the file itself punches out everything that it does not write, and 8 MiB of 400 are left: the space that was reserved
#       can run out later. On a loop device over the file mkfs.ext4, mkfs.xfs and mkfs.btrfs do, as they discard the device and the
#       loop driver makes holes of that; on the file itself mkfs.xfs and mkfs.btrfs leave it as it is, and mkfs.ntfs, mkfs.vfat and
#       mkswap always do. mkfs.ext4 -E nodiscard, mkfs.xfs -K and mkfs.btrfs -K keep the allocation.
# With: e2fsprogs 1.47.0, xfsprogs 6.1, btrfs-progs 6.2, ntfs-3g 2022.10.3, dosfstools 4.2, util-linux 2.38, Linux 6.18.
# Needs: root (a loop device), these programs; a TMPDIR whose file system has fallocate and can punch holes.
set -euo pipefail
for tool in mkfs.ext4 mkfs.xfs mkfs.btrfs mkfs.ntfs mkfs.vfat mkswap fallocate losetup; do
  command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"; loop=
trap '[ -z "$loop" ] || losetup -d "$loop"; rm -rf "$dir"' EXIT
uname -r
held() { echo $((($(stat -c %b disk) + 1024) / 2048)); }
changed=0
try() { # FILE LOOP MKFS...: "kept" or "lost" on the file itself and on a loop device over it
  for on in file loop; do
    rm -f disk; fallocate -l 400M disk 2>/dev/null || { echo "no fallocate here"; exit 2; }
    if [ $on = file ]; then
      "${@:3}" disk >/dev/null 2>&1
      wanted=$1
    else
      loop=$(losetup -f --show disk)
      "${@:3}" "$loop" >/dev/null 2>&1
      losetup -d "$loop"; loop=
      wanted=$2
    fi
    seen=$([ "$(held)" -ge 400 ] && echo kept || echo lost)
    echo "$3 on the $on: $(held) MiB of 400 allocated"
    [ "$seen" = "$wanted" ] || { echo "CHANGED: not $wanted"; changed=1; }
  done
}
try lost lost mkfs.ext4 -q -F
try kept kept mkfs.ext4 -q -F -E nodiscard
try kept lost mkfs.xfs -q -f
try kept lost mkfs.btrfs -q -f
try kept kept mkfs.ntfs -q -F -f
try kept kept mkfs.vfat
try kept kept mkswap
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
