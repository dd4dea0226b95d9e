#!/usr/bin/env bash
# Guess: a reader that knows ext4's inline_data gives all of a file that is stored in its inode, or says that it cannot.
# Seen: three give its first 60 bytes, which fit into i_block, and not the rest, which lies in the attribute system.data: dissect.extfs
#       ends there, the package ext4 and libfsext go on with zeroes up to the right length. Nobody is told, and as the file is short
#       text in most cases (fstab, hostname, keys), it looks like one. The kernel, debugfs and TSK give the whole file.
# With: dissect.extfs 3.15, ext4 1.4.1, libfsext-python 20260821, pytsk3 20260715 (PyPI), file systems made by mke2fs 1.47.0.
# Needs: mke2fs, debugfs, python3 with venv.
set -euo pipefail
for tool in mke2fs debugfs python3; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
python3 -m venv env >/dev/null
env/bin/pip install --quiet dissect.extfs==3.15 ext4==1.4.1 libfsext-python==20260821 pytsk3==20260715 || exit 2
mkdir files
printf '%s' 'UUID=29e62668-3064-463b-b6a8-1cdd7f41e843 / ext4 errors=remount-ro 0 1' >files/fstab
printf '%s' 'a line of no more than 60 bytes' >files/short
truncate -s 32M disk && mke2fs -q -F -t ext4 -O inline_data -I 256 -d files disk
debugfs -R 'cat /fstab' disk 2>/dev/null | cmp - files/fstab || { echo "debugfs differs"; exit 2; }
env/bin/python - <<'PY'
import sys

import ext4
import pyfsext
import pytsk3
from dissect.extfs import ExtFS

volume = pyfsext.volume()
volume.open("disk")
readers = {
    "dissect.extfs": lambda name: ExtFS(open("disk", "rb")).get(name).open().read(),
    "ext4": lambda name: ext4.Volume(open("disk", "rb")).inode_at(name).open().read(),
    "libfsext": lambda name: volume.get_file_entry_by_path(name).read(4096),
    "TSK": lambda name: pytsk3.FS_Info(pytsk3.Img_Info("disk")).open(name).read_random(0, 4096),
}
fstab, short = open("files/fstab", "rb").read(), open("files/short", "rb").read()
zeroes = fstab[:60] + bytes(len(fstab) - 60)
expected = {"dissect.extfs": fstab[:60], "ext4": zeroes, "libfsext": zeroes, "TSK": fstab}
as_described = True
print("the file:", fstab)
for name, read in readers.items():
    seen = read("/fstab")
    print(f"{name}: {seen}")
    as_described &= seen == expected[name] and read("/short") == short
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PY
