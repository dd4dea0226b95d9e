#!/usr/bin/env bash
# Guess: libvhdi reads a block of a differencing VHDX by its state in the table: not present, the parent's; zero, as trimming in the guest
#        leaves it, zeroes; fully present, the child's own.
# Seen: only fully present blocks are right. For the others each sector is taken by the bitmap of sectors, and where there is no block of
#       bitmaps, as the format has it while no block is partially present, the beginning of the image file serves as one. So a child
#       that stores nothing lacks sectors at the beginning of the disk (they are zeroes), the GPT's header among them; and trimmed
#       blocks show the parent's data again.
# With: libvhdi-python 20260901, dissect.hypervisor 3.21 (PyPI), images made by qemu-img 10.0.2; the child by making one of them a child.
# Needs: python3 with venv, a C compiler, qemu-img, qemu-io.
set -euo pipefail
for tool in python3 cc qemu-img qemu-io; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
python3 -m venv env >/dev/null && env/bin/pip install --quiet libvhdi-python==20260901 dissect.hypervisor==3.21 || exit 2
qemu-img create -q -f vhdx -o block_size=1M parent.vhdx 8M
qemu-io -f vhdx -c 'write -q -P 0x50 0 8M' parent.vhdx
qemu-img create -q -f vhdx -o block_size=1M child.vhdx 8M
env/bin/python - <<'PY'
import struct
import sys
import uuid
from pathlib import Path

import pyvhdi
from dissect.hypervisor.disk.vhdx import VHDX

MIB = 1 << 20
BAT, METADATA = (uuid.UUID(text).bytes_le for text in (
    "2dc27766-f623-4200-9d64-115e9bfd4a08", "8b7ca206-4790-4b9a-b8fe-575f050f886e"))
PARAMETERS, LOCATOR, LOCATOR_TYPE = (uuid.UUID(text).bytes_le for text in (
    "caa16737-fa36-4d43-b3b6-33f0aa44e76b", "a8d35f2d-b30b-454d-abf7-d3d84834ab0c", "b04aefb7-d19e-4a81-b789-25b8e9445913"))


def regions(image):
    count = struct.unpack_from("<I", image, 0x30008)[0]
    entries = (struct.unpack_from("<16sQ", image, 0x30010 + 32 * at) for at in range(count))
    return {kind: offset for kind, offset in entries}


def locator(pairs):
    strings, table, at = b"", b"", 20 + 12 * len(pairs)
    for pair in pairs:
        key, value = (text.encode("utf-16-le") for text in pair)
        table += struct.pack("<IIHH", at + len(strings), at + len(strings) + len(key), len(key), len(value))
        strings += key + value
    return LOCATOR_TYPE + struct.pack("<HH", 0, len(pairs)) + table + strings


# The child is a disk of its own so far. It gets a parent locator and the mark that it has a parent (MS-VHDX 2.6.2.1, 2.6.2.6), and a
# table (2.5) that has block 1 as zero, block 3 as fully present, and all others as not present.
parent = open("parent.vhdx", "rb").read()
headers = [struct.unpack_from("<4sIQ16s16s", parent, at) for at in (0x10000, 0x20000)]
linkage = uuid.UUID(bytes_le=max(headers, key=lambda header: header[2])[4])
image = bytearray(open("child.vhdx", "rb").read())
metadata, table = regions(image)[METADATA], regions(image)[BAT]
count = struct.unpack_from("<H", image, metadata + 10)[0]
for at in range(metadata + 32, metadata + 32 * (count + 1), 32):
    kind, offset = struct.unpack_from("<16sI", image, at)
    if kind == PARAMETERS:
        image[metadata + offset + 4] |= 2
item = locator([("parent_linkage", f"{{{linkage}}}"), ("relative_path", ".\\parent.vhdx")])
struct.pack_into("<16sIIII", image, metadata + 32 * (count + 1), LOCATOR, 0x11000, len(item), 4, 0)
struct.pack_into("<H", image, metadata + 10, count + 1)
image[metadata + 0x11000 : metadata + 0x11000 + len(item)] = item
assert len(image) % MIB == 0
image[table : table + MIB] = bytes(MIB)
struct.pack_into("<4Q", image, table, 0, 2, 0, len(image) | 6)
open("child.vhdx", "wb").write(image + b"C" * MIB)

child, base = pyvhdi.file(), pyvhdi.file()
child.open("child.vhdx")
base.open("parent.vhdx")
child.set_parent(base)
libvhdi = b"".join(iter(lambda: child.read(MIB), b""))
dissect = VHDX(Path("child.vhdx")).read(8 * MIB)
as_described = dissect == b"P" * MIB + bytes(MIB) + b"P" * MIB + b"C" * MIB + b"P" * 4 * MIB
print("libvhdi", pyvhdi.get_version(), "dissect.hypervisor", "right" if as_described else "wrong")
for block, state, own in ((0, "not present", b"P"), (1, "zero", b"\0"), (2, "not present", b"P"), (3, "fully present", b"C")):
    sectors = [libvhdi[at : at + 1] for at in range(block * MIB, (block + 1) * MIB, 512)]
    counts = {name: sectors.count(name) for name in (b"P", b"\0", b"C")}
    print(f"block {block}, {state}: " + ", ".join(f"{counts[kind]} {name}" for kind, name in (
        (b"P", "sectors of the parent"), (b"\0", "of zeroes"), (b"C", "of the child"))))
    if block == 0:
        print(f"    the first 16: {b''.join(sectors[:16])}")
        as_described &= counts[b"\0"] > 10 and sectors[1] == b"\0"
    else:
        as_described &= counts[b"P" if state == "zero" else own] == 2048
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PY
