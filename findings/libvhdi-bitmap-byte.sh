#!/usr/bin/env bash
# Guess: a sector that the bitmap of a differencing VHD does not mark comes from the parent, whatever its number.
# Seen: behind the last marked sector of a run libvhdi shows zeroes instead of the parent's data up to the end of that byte of
#       the bitmap, that is up to the next multiple of eight sectors; from there on the parent shows.
# With: libvhdi-python 20260901 (PyPI; the same was seen with 20210425). 7-Zip 26.02 shows the parent.
# Needs: python3 with venv, a C compiler.
set -euo pipefail
for tool in python3 cc; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
python3 -m venv env >/dev/null && env/bin/pip install --quiet libvhdi-python==20260901 || exit 2

env/bin/python - <<'PY'
import struct
import sys

import pyvhdi

SECTOR, BLOCK, SIZE = 512, 2 << 20, 4 << 20


def with_checksum(make):
    """The structure that `make` gives for a checksum, with the checksum that it must have."""
    return make(~sum(make(0)) & 0xFFFFFFFF)


def footer(kind, unique_id):
    return with_checksum(lambda sum: struct.pack(
        ">8sIIQI4sI4sQQHBBII16sB427x", b"conectix", 2, 0x10000, 512, 0, b"find", 0x10000, b"Wi2k",
        SIZE, SIZE, 120, 4, 17, kind, sum, unique_id, 0))


def dynamic_header(parent_id, parent_name):
    utf16 = parent_name.encode("utf-16-be")
    locator = struct.pack(">4sIIIQ", b"W2ru", 512, len(utf16), 0, 2048) if parent_name else b""
    return with_checksum(lambda sum: struct.pack(
        ">8sQQIIII16sII512s192s256x", b"cxsparse", 2**64 - 1, 1536, 0x10000, SIZE // BLOCK, BLOCK, sum,
        parent_id, 0, 0, utf16, locator))


def image(path, kind, unique_id, blocks, parent_id=bytes(16), parent_name=""):
    """Writes an image; `blocks` gives for a block the set of its stored sectors and its bytes."""
    table, body = [0xFFFFFFFF] * (SIZE // BLOCK), b""
    for number, (stored, data) in sorted(blocks.items()):
        bitmap = bytearray(SECTOR)
        for sector in stored:
            bitmap[sector // 8] |= 0x80 >> sector % 8
        table[number] = (4096 + len(body)) // SECTOR
        body += bytes(bitmap) + data
    head = footer(kind, unique_id) + dynamic_header(parent_id, parent_name)
    head += struct.pack(f">{len(table)}I", *table).ljust(SECTOR, b"\xff")
    head += parent_name.encode("utf-16-le")
    with open(path, "wb") as out:
        out.write(head.ljust(4096, b"\0") + body + footer(kind, unique_id))


everything = range(BLOCK // SECTOR)
image("parent.vhd", 3, b"\1" * 16, {n: (everything, b"P" * BLOCK) for n in (0, 1)})
stored = {*range(10), 100}
data = bytearray(BLOCK)
for sector in stored:
    data[sector * SECTOR:(sector + 1) * SECTOR] = b"C" * SECTOR
image("child.vhd", 4, b"\2" * 16, {0: (stored, bytes(data))}, b"\1" * 16, "parent.vhd")

parent, child = pyvhdi.file(), pyvhdi.file()
parent.open("parent.vhd")
child.open("child.vhd")
child.set_parent(parent)


def shown(sector):
    child.seek(sector * SECTOR)
    return child.read(1)


print("libvhdi", pyvhdi.get_version())
right = wrong = 0
for sector in range(BLOCK // SECTOR):
    expected = b"C" if sector in stored else b"P"
    hidden = 10 <= sector < 16 or 101 <= sector < 104
    got = shown(sector)
    if got == (b"\0" if hidden else expected):
        right += 1
    else:
        wrong += 1
        print(f"sector {sector}: {got}")
print("sectors 8 to 17:", b"".join(map(shown, range(8, 18))), "(the disk: CCPPPPPPPP)")
print("as described" if not wrong else "CHANGED")
sys.exit(1 if wrong else 0)
PY
