#!/usr/bin/env bash
# Guess: `qemu-img map --output=json` says of each stretch what the table for people says, so that a program can read the bytes itself.
# Seen: it gives offsets without the file that they are in. Of a VMDK in several files the same offset stands there once for each file, and of
#       a child the parent's stretches (depth 1) have offsets in a file that is not named, so a program that takes them for offsets in
#       the image, as it may for a raw or a fixed disk, reads other data. The table has a column "File", but no stretches of zeroes.
# With: qemu-img 10.0.2.
# Needs: qemu-img, qemu-io, python3.
set -euo pipefail
for tool in qemu-img qemu-io python3; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
qemu-img --version | sed -n 1p
qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentFlat split.vmdk 4G
qemu-img create -q -f vmdk base.vmdk 8M
for at in 0 2G; do qemu-io -f vmdk -c "write -q -P 0xaa $at 64k" split.vmdk; done
qemu-io -f vmdk -c 'write -q -P 1 0 64k' -c 'write -q -P 2 1M 64k' base.vmdk
qemu-img create -q -f vmdk -b base.vmdk -F vmdk child.vmdk
qemu-io -f vmdk -c 'write -q -P 3 1M 64k' child.vmdk
python3 - <<'PY'
import json
import subprocess
import sys


def data(image):
    """Offset on the disk, and what is said of the place, of each stretch that is not zero."""
    command = ["qemu-img", "map", "--output=json", "-f", "vmdk", image]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return {part["start"]: part for part in found if part["data"] and not part["zero"]}


as_described = True
for image in ("split.vmdk", "child.vmdk"):
    table = subprocess.run(["qemu-img", "map", "-f", "vmdk", image], check=True, capture_output=True, text=True).stdout
    files = {int(line.split()[0], 16): line.split()[3] for line in table.splitlines()[1:]}
    parts = data(image)
    for start, part in parts.items():
        print(f"{image}: disk {start}: JSON offset {part['offset']}, depth {part['depth']}; the table: {files.get(start)}")
        as_described &= not any("file" in key for key in part)
    as_described &= len(set(files.values())) == 2 == len(parts)
    if image == "split.vmdk":
        as_described &= [part["offset"] for part in parts.values()] == [0, 0]
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PY
