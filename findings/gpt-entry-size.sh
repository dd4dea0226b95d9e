#!/usr/bin/env bash
# Guess: what reads GPTs reads one with entries of 256 bytes, as UEFI allows 128 times a power of two.
# Seen: sgdisk shows an empty table and `sgdisk -v` finds no problems, so its next write makes the partitions go; to libblkid (partx, lsblk,
#       udev) there is only a protective MBR. sfdisk, parted, dissect.volume, libvsgpt and TSK have the partitions, so the
#       same disk is partitioned to one half of a system and empty to the other. (The kernel's sources demand 128 bytes too.)
# With: gdisk 1.0.9, util-linux 2.38.1, parted 3.5; dissect.volume 3.18, libvsgpt-python 20260911, pytsk3 20260715 (PyPI).
# Needs: sgdisk, sfdisk, partx, blkid, parted, python3 with venv.
set -euo pipefail
for tool in sgdisk sfdisk partx blkid parted python3; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
python3 -m venv env >/dev/null
env/bin/pip install --quiet dissect.volume==3.18 libvsgpt-python==20260911 pytsk3==20260715 || exit 2
python3 - <<'PY'
import struct
import uuid
import zlib

SECTORS, COUNT, LINUX = 131072, 128, uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4").bytes_le
disk_id = uuid.uuid4().bytes_le
for size in (128, 256):
    entries = bytearray(COUNT * size)
    for number, (first, last) in enumerate(((2048, 6143), (8192, 20479))):
        entry = LINUX + uuid.uuid4().bytes_le + struct.pack("<QQQ", first, last, 0) + "data".encode("utf-16-le")
        entries[number * size : number * size + len(entry)] = entry
    sectors = len(entries) // 512

    def header(my, other, table, checksum=0):
        return struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, checksum, 0, my, other, 2 + sectors,
                           SECTORS - 2 - sectors, disk_id, table, COUNT, size, zlib.crc32(entries))

    def write(out, my, other, table):
        out.seek(table * 512)
        out.write(entries)
        out.seek(my * 512)
        out.write(header(my, other, table, zlib.crc32(header(my, other, table))))

    with open(f"entries{size}", "wb") as out:
        out.truncate(SECTORS * 512)
        out.seek(446)
        out.write(struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, SECTORS - 1))
        out.seek(510)
        out.write(b"\x55\xaa")
        write(out, 1, SECTORS - 1, 2)
        write(out, SECTORS - 1, 1, SECTORS - 1 - sectors)
PY
changed=0
expect() { # DISK PROGRAM WANTED SEEN
  echo "$1, $2: $4"
  [ "$3" = "$4" ] || { echo "CHANGED: not $3"; changed=1; }
}
for disk in entries128 entries256; do
  seen=2 kind=gpt
  case $disk in *256) seen=0 kind=PMBR ;; esac
  expect $disk "partitions in sfdisk" 2 "$(sfdisk -d $disk 2>/dev/null | grep -c 'start=' || true)"
  expect $disk "partitions in parted" 2 "$(parted -ms $disk print 2>/dev/null | grep -c '^[0-9]' || true)"
  expect $disk "partitions in sgdisk" $seen "$(sgdisk -p $disk 2>/dev/null | grep -c '^ *[0-9]* .*data' || true)"
  expect $disk "problems in sgdisk -v" 'No problems found.' "$(sgdisk -v $disk 2>/dev/null | grep -o 'No problems found\.' || true)"
  expect $disk "partitions in partx" $seen "$(partx -g $disk 2>/dev/null | wc -l)"
  expect $disk "table in blkid" $kind "$(blkid -p -s PTTYPE -o value $disk || true)"
done
expect entries256 "partitions in dissect.volume, libvsgpt, TSK" '2 2 2' "$(env/bin/python - <<'PY'
import pytsk3
import pyvsgpt
from dissect.volume.disk import Disk

volume = pyvsgpt.volume()
volume.open("entries256")
tsk = pytsk3.Volume_Info(pytsk3.Img_Info("entries256"))
print(len(Disk(open("entries256", "rb")).partitions), volume.number_of_partitions, sum(part.flags == 1 for part in tsk))
PY
)"
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
