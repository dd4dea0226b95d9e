#!/usr/bin/env bash
# Guess: a reader of NTFS that has been in use for years lists directories on volumes with any cluster size.
# Seen: with clusters of more than 4096 bytes libfsntfs finds no file at all in a directory that has outgrown its MFT record: the directory
#       is empty, and files in it do not exist, without an error. The records of such an index are smaller than a cluster, and are
#       numbered in units of 512 bytes then; libfsntfs multiplies by the cluster size and skips what it finds unallocated there.
#       Disks for databases and backups often have clusters of 64 KiB. (The crate ntfs 0.4.0 multiplies in the same way, and calls the
#       volume damaged; TSK, 7-Zip and dissect.ntfs list every file.)
# With: libfsntfs-python 20260827, dissect.ntfs 3.16 (PyPI), volumes made by mkfs.ntfs and filled by ntfs-3g 2022.10.3.
# Needs: root and /dev/fuse, ntfs-3g, mkfs.ntfs, python3 with venv.
set -euo pipefail
for tool in ntfs-3g mkfs.ntfs python3; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"
trap 'umount "$dir/mnt" 2>/dev/null || true; rm -rf "$dir"' EXIT
python3 -m venv env >/dev/null && env/bin/pip install --quiet libfsntfs-python==20260827 dissect.ntfs==3.16 || exit 2
mkdir mnt
for cluster in 4096 8192 65536; do
  truncate -s 200M $cluster.disk && mkfs.ntfs -q -F -f -c $cluster $cluster.disk >/dev/null 2>&1
  ntfs-3g $cluster.disk mnt || exit 2
  mkdir mnt/few mnt/many
  touch mnt/few/file_1
  (cd mnt/many && seq -f 'file_%g' 300 | xargs touch)
  umount mnt
done
env/bin/python - <<'PY'
import sys

import pyfsntfs
from dissect.ntfs import NTFS

as_described = True
for cluster in (4096, 8192, 65536):
    volume = pyfsntfs.volume()
    volume.open(f"{cluster}.disk")
    ntfs = NTFS(open(f"{cluster}.disk", "rb"))
    for directory, true in (("few", 1), ("many", 300)):
        libfsntfs = volume.get_file_entry_by_path("\\" + directory).number_of_sub_file_entries
        dissect = len(ntfs.mft.get(directory).listdir())
        found = volume.get_file_entry_by_path(f"\\{directory}\\file_1") is not None
        print(f"clusters of {cluster}, {true} files: dissect.ntfs {dissect}, libfsntfs {libfsntfs}, file_1 found: {found}")
        right = cluster == 4096 or directory == "few"
        as_described &= dissect == true and libfsntfs == (true if right else 0) and found == right
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PY
