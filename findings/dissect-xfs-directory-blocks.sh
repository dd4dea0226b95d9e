#!/usr/bin/env bash
# Guess: a reader of XFS lists the same files whatever block size the file system was made with.
# Seen: dissect.xfs loses entries where a directory's block is larger than the file system's: with `-b size=2048` or 1024 (directory blocks
#       are 4096 bytes by default) a directory of 60 files has 23 or none, and with `-n size=8192` one of 1500 files half. No error;
#       a path that leads to a lost file is not found. Files' contents are right, and with the default sizes everything is.
# With: dissect.xfs 3.13, libfsxfs-python 20260901 (PyPI), file systems made by mkfs.xfs 6.1 and filled by Linux.
# Needs: root (a loop device), mkfs.xfs, python3 with venv.
set -euo pipefail
for tool in mkfs.xfs python3 losetup; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"
trap 'umount "$dir/mnt" 2>/dev/null || true; rm -rf "$dir"' EXIT
python3 -m venv env >/dev/null && env/bin/pip install --quiet dissect.xfs==3.13 libfsxfs-python==20260901 || exit 2
mkfs.xfs -V; mkdir mnt
fill() { # NAME OPTION...
  truncate -s 320M "$1" && mkfs.xfs -q -f "${@:2}" "$1"
  mount -o loop "$1" mnt 2>/dev/null || { echo "cannot mount $1"; exit 2; }
  mkdir mnt/some mnt/many
  (cd mnt/some && seq -f 'file_with_long_name_%g' 60 | xargs touch)
  (cd mnt/many && seq -f 'file_with_a_long_name_%g' 1500 | xargs touch)
  umount mnt
}
fill default; fill block1024 -b size=1024; fill block2048 -b size=2048; fill directory8192 -n size=8192
env/bin/python - <<'PY'
import sys

import pyfsxfs
from dissect.xfs import XFS

as_described = True
for image in ("default", "block1024", "block2048", "directory8192"):
    volume = pyfsxfs.volume()
    volume.open(image)
    fs = XFS(open(image, "rb"))
    for directory, true in (("some", 60), ("many", 1500)):
        libfsxfs = volume.get_file_entry_by_path("/" + directory).number_of_sub_file_entries
        dissect = sum(name not in (".", "..") for name in fs.get(directory).listdir())
        print(f"{image}, {true} files: libfsxfs {libfsxfs}, dissect.xfs {dissect}")
        # A directory that fits into one block of the file system's size is right in any case.
        whole = image == "default" or (image, directory) == ("directory8192", "some")
        as_described &= libfsxfs == true and (dissect == true) == whole
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PY
