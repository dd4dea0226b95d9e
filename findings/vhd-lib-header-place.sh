#!/usr/bin/env bash
# Guess: a reader of VHDs goes from the footer to the dynamic header by the footer's data offset, wherever the header lies.
# Seen: vhd-lib reads the 1,024 bytes behind the first sector for it; a header elsewhere is "invalid header checksum 0", and the
#       VHD is none to Xen Orchestra.
# With: vhd-lib 0.7.2 (npm). qemu-img 10.0.2 and libvhdi-python 20260901 (PyPI) read the same file.
# Needs: node with npm, python3 with venv, a C compiler, qemu-img.
set -euo pipefail
for tool in node npm python3 cc qemu-img; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
npm install --silent --no-audit --no-fund --prefix . vhd-lib@0.7.2 >/dev/null 2>&1 || exit 2
python3 -m venv env >/dev/null && env/bin/pip install --quiet libvhdi-python==20260901 || exit 2

cat >make.py <<'PY'
import struct

SECTOR, BLOCK, SIZE, TABLE, DATA = 512, 2 << 20, 4 << 20, 8192, 12288


def with_checksum(make):
    return make(~sum(make(0)) & 0xFFFFFFFF)


def image(path, header_at):
    """A dynamic disk of two blocks, the first of which is stored."""
    footer = with_checksum(lambda sum: struct.pack(
        ">8sIIQI4sI4sQQHBBII16sB427x", b"conectix", 2, 0x10000, header_at, 0, b"find", 0x10000, b"Wi2k",
        SIZE, SIZE, 120, 4, 17, 3, sum, b"\1" * 16, 0))
    header = with_checksum(lambda sum: struct.pack(
        ">8sQQIIII16sII512s192s256x", b"cxsparse", 2**64 - 1, TABLE, 0x10000, SIZE // BLOCK, BLOCK, sum,
        bytes(16), 0, 0, b"", b""))
    with open(path, "wb") as out:
        out.write(footer)
        out.seek(header_at)
        out.write(header)
        out.seek(TABLE)
        out.write(struct.pack(">2I", DATA // SECTOR, 0xFFFFFFFF).ljust(SECTOR, b"\xff"))
        out.seek(DATA)
        out.write(b"\xff" * SECTOR + b"D" * BLOCK + footer)


image("usual.vhd", 512)
image("moved.vhd", 2048)
PY
env/bin/python make.py
qemu-img compare -f vpc -F vpc usual.vhd moved.vhd >/dev/null || { echo "QEMU sees two different disks"; exit 1; }
env/bin/python -c 'import pyvhdi
for name in ("usual.vhd", "moved.vhd"):
    disk = pyvhdi.open(name)
    assert disk.read_buffer(512) == b"D" * 512, name'

cat >look.js <<'JS'
const fs = require('fs')
const { default: Vhd } = require('vhd-lib')
const path = process.argv[2]
const files = {
  getSize: async () => fs.statSync(path).size,
  read: async (_, buffer, position) => {
    const fd = fs.openSync(path, 'r')
    const bytesRead = fs.readSync(fd, buffer, 0, buffer.length, position)
    fs.closeSync(fd)
    return { bytesRead, buffer }
  },
}
const vhd = new Vhd(files, path)
vhd.readHeaderAndFooter().then(
  () => console.log(`opened: ${vhd.header.cookie}`),
  error => console.log(`refused: ${String(error.message).split('\n')[0]}`))
JS
usual=$(node look.js usual.vhd) moved=$(node look.js moved.vhd)
echo "header at 512: $usual"
echo "header at 2048: $moved"
[[ $usual == opened:* && $moved == refused:* ]] || { echo "vhd-lib behaves otherwise now"; exit 1; }
