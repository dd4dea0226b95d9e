#!/usr/bin/env bash
# Guess: `resize2fs 'disk.raw?offset=N' SIZE` and `e2image -ra -O N FS disk.raw` work on the place at N and leave the rest of the disk alone,
#        as e2fsck, debugfs and mke2fs -E offset=N do.
# Seen: both shorten the file, and all that lies behind is gone, other partitions and the second GPT for example. e2image ends it with the
#       file system that it copied. resize2fs ends it at SIZE counted from the file's beginning, so the end of the resized file system
#       itself is lost too, by N bytes, and that also when it enlarges. (For a file that holds nothing but the file system that is
#       what one wants; the offset is forgotten there.) Through a loop device nothing is lost.
# With: e2fsprogs 1.47.0-2+b2 (Debian).
# Needs: Debian's apt-get and dpkg.
set -euo pipefail
for tool in apt-get dpkg; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
for package in e2fsprogs libext2fs2 libcom-err2 libss2; do
  apt-get download -qq "$package=1.47.0-2+b2" 2>/dev/null || { echo "$package 1.47.0-2+b2 is not to be had"; exit 2; }
done
for package in ./*.deb; do dpkg -x "$package" root; done
libraries=$(dirname "$(find root -name 'libext2fs.so.2' | head -n 1)")
run() { # PROGRAM ARGUMENT...
  program=$1; shift
  LD_LIBRARY_PATH=$libraries "root/sbin/$program" "$@"
}
run mke2fs -V 2>&1 | sed -n 1p

mib=$((1 << 20))
changed=0
expect() { # WHAT WANTED SEEN
  echo "$1: $3"
  [ "$2" = "$3" ] || { echo "CHANGED: not $2"; changed=1; }
}
disk() { # a disk of 100 MiB: 1 MiB, a file system of 40 MiB, and a second partition full of text
  (yes 'second partition' || true) | head -c 100M >disk
  run mke2fs -q -F -t ext4 -E offset=$mib disk 40M
  run e2fsck -fy "disk?offset=$mib" >/dev/null 2>&1 || { echo "e2fsck fails"; exit 2; }
  [ "$(stat -c %s disk)" = $((100 * mib)) ] || { echo "mke2fs or e2fsck changed the size"; exit 2; }
}
blocks() { run dumpe2fs -h "disk?offset=$mib" 2>/dev/null | awk '/^Block count/ {c = $3} /^Block size/ {s = $3} END {print c * s}'; }
for size in 20 90; do
  disk
  run resize2fs "disk?offset=$mib" ${size}M >/dev/null 2>&1 || { echo "CHANGED: resize2fs refuses"; exit 1; }
  expect "resized to $size MiB: bytes of the file system" $((size * mib)) "$(blocks)"
  expect "    bytes of the disk, which had $((100 * mib))" $((size * mib)) "$(stat -c %s disk)"
  expect "    bytes of the file system behind the disk's end" $mib $(($(blocks) + mib - $(stat -c %s disk)))
done
disk
truncate -s 30M fs && run mke2fs -q -F -t ext4 fs
run e2image -ra -O $((10 * mib)) fs disk >/dev/null 2>&1 || { echo "CHANGED: e2image refuses"; exit 1; }
expect "30 MiB copied to 10 MiB by e2image: bytes of the disk" $((40 * mib)) "$(stat -c %s disk)"
expect "    the disk's beginning" 'second par' "$(head -c 10 disk)"
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
