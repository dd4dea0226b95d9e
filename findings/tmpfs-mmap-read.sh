#!/usr/bin/env bash
# Guess: reading a sparse file on tmpfs (/dev/shm, and /tmp of many systems) leaves it sparse, as on every disk file system.
# Seen: read() does, reading through mmap() does not: each page looked at is allocated for good, counts against the tmpfs's size and
#       the machine's memory, and is data for SEEK_DATA from then on. A disk of 100 MiB with nothing in it occupies 100 MiB after one
#       pass of a tool that maps what it reads, also read-only; when the tmpfs is full such a tool gets SIGBUS where read() gives zeroes.
#       On ext4 the same pass allocates nothing.
# With: Linux 6.18.
# Needs: root (mount), python3; TMPDIR on a disk file system with sparse files.
set -euo pipefail
command -v python3 >/dev/null || { echo "needs python3"; exit 2; }
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"
trap 'umount "$dir/mnt" 2>/dev/null || true; rm -rf "$dir"' EXIT
[ "$(stat -f -c %T .)" != tmpfs ] || { echo "needs a TMPDIR on a disk"; exit 2; }
uname -r; mkdir mnt && mount -t tmpfs -o size=256M none mnt || exit 2
truncate -s 100M mnt/disk.raw ondisk.raw
cat >map.py <<'PY'
import mmap
import os
import sys

file = os.open(sys.argv[1], os.O_RDONLY)
view = mmap.mmap(file, 0, prot=mmap.PROT_READ)
assert sum(view[at] for at in range(0, len(view), 4096)) == 0
PY
changed=0
expect() { # WHAT WANTED-KIB FILE
  seen=$(du -k "$3" | cut -f 1)
  echo "$1: $seen KiB allocated"
  [ "$seen" = "$2" ] || { echo "CHANGED: not $2"; changed=1; }
}
sha256sum mnt/disk.raw ondisk.raw >/dev/null
expect "tmpfs, read" 0 mnt/disk.raw
python3 map.py mnt/disk.raw
expect "tmpfs, mapped and looked at" 102400 mnt/disk.raw
python3 map.py ondisk.raw
expect "$(stat -f -c %T .), mapped and looked at" 0 ondisk.raw
python3 -c 'import os; assert os.lseek(os.open("mnt/disk.raw", 0), 0, os.SEEK_DATA) == 0' || { echo "CHANGED: SEEK_DATA"; changed=1; }
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
