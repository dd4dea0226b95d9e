#!/usr/bin/env bash
# Guess: `cp SPARSE EXISTING` writes every byte of the copy, so a target that keeps its old bytes when it is opened (as a block device
#        does) ends up right.
# Seen: cp opens the target with O_TRUNC and then skips the holes of the source with lseek; it relies on the truncation having emptied
#       the file. qemu-img opens the same target without O_TRUNC, calls ftruncate(0) and ftruncate(size), and writes only what is not zero.
#       So a file system that takes truncation lightly keeps old bytes wherever the source has holes. To a block device cp writes the
#       zeroes.
# With: coreutils 9.1-1 (Debian), qemu-img 10.0.2, strace.
# Needs: Debian's apt-get and dpkg, strace, qemu-img, root for the loop device.
set -euo pipefail
for tool in apt-get dpkg strace qemu-img losetup; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"; loop=
trap '[ -z "$loop" ] || losetup -d "$loop"; rm -rf "$dir"' EXIT
apt-get download -qq coreutils=9.1-1 2>/dev/null || { echo "coreutils 9.1-1 is not to be had"; exit 2; }
dpkg -x coreutils*.deb root
root/bin/cp --version | sed -n 1p; qemu-img --version | sed -n 1p

truncate -s 8M source && dd if=/dev/urandom of=source bs=64k count=1 seek=64 conv=notrunc status=none
dirty() { tr '\0' '\377' </dev/zero | head -c 8M >"$1" || true; }
written() { grep -oE '^(write|pwrite64)\(.*= [0-9]+$' "$1" | sed 's/.*= //' | awk '{s += $1} END {print s + 0}'; }
changed=0
expect() { "${@:2}" || { echo "CHANGED: $1"; changed=1; }; }

dirty target
strace -o trace -e trace=openat,lseek,write,ftruncate,copy_file_range root/bin/cp --reflink=never source target
expect "cp does not open with O_TRUNC" grep -q 'target.*O_TRUNC' trace
moved=$(awk -F'= ' '/^(write|copy_file_range)\(/ {s += $NF} END {print s + 0}' trace)
echo "cp to a file: $moved bytes of 8388608 written"
expect "cp writes holes" test "$moved" -lt 1048576
cmp source target

dirty device.img
loop=$(losetup -f --show device.img)
strace -o trace -e trace=openat,lseek,write,copy_file_range root/bin/cp --reflink=never source "$loop"
echo "cp to a block device: $(written trace) bytes written"
expect "cp leaves holes out on a device" test "$(written trace)" = 8388608
losetup -d "$loop"; loop=

dirty target
strace -f -o trace -e trace=openat,ftruncate qemu-img convert -f raw -O raw source target
expect "qemu-img opens with O_TRUNC" sh -c '! grep -q "target.*O_TRUNC" trace'
expect "qemu-img does not call ftruncate(0)" grep -qE 'ftruncate\([0-9]+, 0\)' trace
cmp source target
echo "qemu-img to a file: $(grep -c 'ftruncate(' trace) calls of ftruncate, no O_TRUNC"
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
