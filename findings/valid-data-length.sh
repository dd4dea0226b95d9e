#!/usr/bin/env bash
# Guess: readers of NTFS and exFAT give zeroes behind the end of what was ever written to a file (NTFS: initialized size, exFAT:
#        ValidDataLength), as both formats demand: Windows leaves old data on the disk there when a program makes a file longer.
# Seen: dissect.ntfs gives what lies on the disk, data of other, deleted files included; TSK minds it in NTFS, but not in exFAT, and
#       neither does exfat-fuse 1.3. No error, the length is right. (The crate ntfs 0.4.0 does as dissect.ntfs.)
# With: dissect.ntfs 3.16, pytsk3 20260715 (PyPI), ntfs-3g 2022.10.3, exfat-fuse 1.3.0+git20220115-2 (Debian).
# Needs: root and /dev/fuse, a loop device, ntfs-3g, ntfscat, mkfs.ntfs, mkfs.exfat, fsck.exfat, python3 with venv, Debian's apt-get.
set -euo pipefail
for tool in ntfs-3g ntfscat mkfs.ntfs mkfs.exfat fsck.exfat python3 apt-get dpkg losetup; do
  command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"; loop=
trap 'umount "$dir/mnt" 2>/dev/null || true; sleep 0.5; [ -z "$loop" ] || losetup -d "$loop"; rm -rf "$dir"' EXIT
apt-get download -qq exfat-fuse=1.3.0+git20220115-2 2>/dev/null || { echo "exfat-fuse 1.3.0+git20220115-2 is not to be had"; exit 2; }
dpkg -x exfat-fuse*.deb root
python3 -m venv env >/dev/null && env/bin/pip install --quiet dissect.ntfs==3.16 pytsk3==20260715 || exit 2

mkdir mnt
truncate -s 64M ntfs exfat
mkfs.ntfs -q -F -f ntfs >/dev/null 2>&1
mkfs.exfat exfat >/dev/null
(yes 'old data' || true) | head -c 300000 >file.bin
ntfs-3g ntfs mnt || exit 2
cp file.bin mnt/file.bin && umount mnt
loop=$(losetup -f --show exfat)
root/sbin/mount.exfat-fuse "$loop" mnt >/dev/null || exit 2
cp file.bin mnt/file.bin && sync && umount mnt
sleep 1; losetup -d "$loop"; loop=

# What Windows does when it makes a file of 100000 bytes 300000 bytes long: only the number on the disk is another.
python3 - <<'PY'
import struct

disk = bytearray(open("ntfs", "rb").read())
at = disk.find("file.bin".encode("utf-16-le"), disk.find(b"FILE0"))
record = at - at % 1024
attribute = record + struct.unpack_from("<H", disk, record + 20)[0]
while struct.unpack_from("<I", disk, attribute)[0] != 0x80:
    attribute += struct.unpack_from("<I", disk, attribute + 4)[0]
assert struct.unpack_from("<QQ", disk, attribute + 48) == (300000, 300000)
struct.pack_into("<Q", disk, attribute + 56, 100000)
open("ntfs", "wb").write(disk)

disk = bytearray(open("exfat", "rb").read())
entries = disk.find("file.bin".encode("utf-16-le")) - 2 - 64
length = (disk[entries + 1] + 1) * 32
assert disk[entries] == 0x85 and disk[entries + 32] == 0xC0
assert struct.unpack_from("<Q", disk, entries + 40)[0] == 300000
struct.pack_into("<Q", disk, entries + 40, 100000)
checksum = 0
for at in (*range(2), *range(4, length)):
    checksum = (checksum << 15 | checksum >> 1) + disk[entries + at] & 0xFFFF
struct.pack_into("<H", disk, entries + 2, checksum)
open("exfat", "wb").write(disk)
PY
fsck.exfat -n exfat | tail -n 1
ntfscat ntfs file.bin >truth
cmp <(head -c 100000 file.bin; head -c 200000 /dev/zero) truth || { echo "ntfscat gives something else"; exit 2; }
loop=$(losetup -r -f --show exfat)
root/sbin/mount.exfat-fuse -o ro "$loop" mnt >/dev/null || exit 2
cp mnt/file.bin exfat-fuse.out; umount mnt

env/bin/python - <<'PY'
import sys

import pytsk3
from dissect.ntfs import NTFS


def tsk(disk):
    return pytsk3.FS_Info(pytsk3.Img_Info(disk)).open("/file.bin").read_random(0, 300000)


truth, old = open("truth", "rb").read(), open("file.bin", "rb").read()
as_described = True
for name, seen, zeroes in (
    ("NTFS: TSK", tsk("ntfs"), True),
    ("NTFS: dissect.ntfs", NTFS(open("ntfs", "rb")).mft.get("file.bin").open().read(), False),
    ("exFAT: TSK", tsk("exfat"), False),
    ("exFAT: exfat-fuse", open("exfat-fuse.out", "rb").read(), False),
):
    print(f"{name}: {len(seen)} bytes, behind the written part {seen[100000:100009]}")
    as_described &= seen == (truth if zeroes else old)
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PY
