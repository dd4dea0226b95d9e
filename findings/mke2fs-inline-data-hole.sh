#!/usr/bin/env bash
# Guess: `mkfs.ext4 -O inline_data -d DIR` copies every file of DIR as it is, sparse ones included.
# Seen: the length of a sparse file is cut to the end of the last block that holds data, so a hole at its end is lost. Without
#       inline_data the same copy keeps its length.
# With: e2fsprogs 1.47.0-2+b2 (Debian). Matters to whoever makes test disks with -d, as an empty file system's guests would not notice.
# Needs: Debian's apt-get and dpkg, cmp.
set -euo pipefail
for tool in apt-get dpkg cmp; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
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

mkdir files
head -c 5000 /dev/urandom >data
truncate -s 4M files/hole-first && dd if=data of=files/hole-first bs=1 seek=900000 conv=notrunc status=none
truncate -s 4M files/data-first && dd if=data of=files/data-first bs=1 conv=notrunc status=none

changed=0
copy() { # FEATURES: makes a file system of `files`, and takes the files out again
  truncate -s 0 disk && truncate -s 32M disk
  run mke2fs -q -F -t ext4 -b 4096 -O "$1" -d files disk
  run debugfs -R 'dump /hole-first hole-first' disk 2>/dev/null
  run debugfs -R 'dump /data-first data-first' disk 2>/dev/null
  echo "$1: hole-first has $(stat -c %s hole-first) bytes of $(stat -c %s files/hole-first), data-first $(stat -c %s data-first)"
}
copy '^inline_data'
cmp -s hole-first files/hole-first && cmp -s data-first files/data-first || { echo "CHANGED: wrong without inline_data"; changed=1; }
copy inline_data
for file in hole-first data-first; do
  [ "$(stat -c %s $file)" -lt "$(stat -c %s files/$file)" ] || { echo "CHANGED: $file keeps its length"; changed=1; }
  cmp -s -n 5000 "$file" "files/$file" || { echo "CHANGED: $file differs where it has data"; changed=1; }
done
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
