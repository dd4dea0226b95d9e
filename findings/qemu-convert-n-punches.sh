#!/usr/bin/env bash
# Guess: `qemu-img convert -n` writes into the existing raw file as it is, so one that was preallocated, or is full of old data, keeps its
#        space: that is what people create the target themselves for.
# Seen: it punches the target empty first, and then writes what is not zero: of a preallocated target of 64 MiB 4 KiB are left allocated when
#       the disk holds 4 KiB, and the rest has to be found again when the disk is written. The content is right. With `-S 0`, with
#       --target-is-zero (right only for a target that is zero), and without -n but with -o preallocation=falloc all stays allocated.
# With: qemu-img 10.0.2.
# Needs: qemu-img, fallocate, cmp; a TMPDIR whose file system has fallocate and can punch holes.
set -euo pipefail
for tool in qemu-img fallocate cmp; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
qemu-img --version | sed -n 1p
truncate -s 64M source.raw
printf data | dd of=source.raw bs=1 seek=30000000 conv=notrunc status=none
changed=0
try() { # WHAT preallocated|written|absent LEAST-KIB MOST-KIB OPTION...
  rm -f target.raw
  case $2 in
    preallocated) fallocate -l 64M target.raw 2>/dev/null || { echo "no fallocate here"; exit 2; } ;;
    written) head -c 64M /dev/urandom >target.raw ;;
  esac
  qemu-img convert -f raw -O raw "${@:5}" source.raw target.raw
  cmp source.raw target.raw || { echo "CHANGED: wrong content"; changed=1; }
  sync target.raw
  seen=$(($(stat -c %b target.raw) / 2))
  echo "$1: $seen KiB of 65536 allocated"
  [ "$seen" -ge "$3" ] && [ "$seen" -le "$4" ] || { echo "CHANGED: not $3 to $4"; changed=1; }
}
try 'preallocated, -n' preallocated 4 1024 -n
try 'written, -n' written 4 1024 -n
try 'preallocated, -n -S 0' preallocated 65536 66560 -n -S 0
try 'preallocated, -n --target-is-zero' preallocated 65536 66560 -n --target-is-zero
try 'new, -o preallocation=falloc' absent 65536 66560 -o preallocation=falloc
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
