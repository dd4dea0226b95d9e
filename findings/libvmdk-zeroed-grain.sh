#!/usr/bin/env bash
# Guess: a grain that QEMU has recorded as zeroed (grain table entry 1, `zeroed_grain=on`) reads as zeroes in libvmdk.
# Seen: it reads as the image file from its second sector on, so the text of the descriptor appears on the disk.
# With: libvmdk-python 20260714 (PyPI), images made by qemu-img 10.0.2. dissect.hypervisor 3.21 and 7-Zip 26.02 read zeroes.
# Needs: python3 with venv, a C compiler, qemu-img, qemu-io.
set -euo pipefail
for tool in python3 cc qemu-img qemu-io; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
python3 -m venv env >/dev/null && env/bin/pip install --quiet libvmdk-python==20260714 dissect.hypervisor==3.21 || exit 2

qemu-img create -q -f vmdk -o zeroed_grain=on disk.vmdk 10M
qemu-io -c 'write -q -P 0xaa 0 128k' -c 'write -q -z 64k 64k' disk.vmdk
qemu-img convert -O raw disk.vmdk disk.raw

env/bin/python - <<'PY'
import sys
from pathlib import Path
import pyvmdk
from dissect.hypervisor.disk.vmdk import VMDK

truth = open("disk.raw", "rb").read()[65536 : 65536 + 32]
handle = pyvmdk.handle()
handle.open("disk.vmdk")
handle.open_extent_data_files()
handle.seek(65536)
libvmdk = handle.read(32)
other = VMDK(Path("disk.vmdk")).open() if hasattr(VMDK, "open") else VMDK(Path("disk.vmdk"))
other.seek(65536)
dissect = other.read(32)
start_of_descriptor = open("disk.vmdk", "rb").read()[512 : 512 + 32]
print("libvmdk", pyvmdk.get_version(), "reads", libvmdk)
print("qemu-img reads", truth)
print("dissect reads", dissect)
as_described = truth == dissect == bytes(32) and libvmdk == start_of_descriptor
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PY
