#!/usr/bin/env bash
# Guess: `VMDK(file).read(size)` of dissect.hypervisor reads any valid VMDK to its end.
# Seen: of a disk whose size is no multiple of 8 KiB it raises IndexError in the last buffer, which reaches behind the disk; the same
#       object's `read_sectors` reads all of it right. Disks made of partitions or by `truncate` often have such sizes.
# With: dissect.hypervisor 3.21, dissect.util 3.24 (PyPI), images made by qemu-img 10.0.2.
# Needs: python3 with venv, qemu-img.
set -euo pipefail
for tool in python3 qemu-img; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
python3 -m venv env >/dev/null && env/bin/pip install --quiet dissect.hypervisor==3.21 dissect.util==3.24 || exit 2
for size in 41943040 41944576; do
  head -c 3000000 /dev/urandom >"$size.raw"
  truncate -s "$size" "$size.raw"
  qemu-img convert -f raw -O vmdk "$size.raw" "$size.vmdk"
done
env/bin/python - <<'PY'
import sys
from dissect.hypervisor.disk.vmdk import VMDK

as_described = True
for size, whole in ((41943040, True), (41944576, False)):
    truth = open(f"{size}.raw", "rb").read()
    disk = VMDK(open(f"{size}.vmdk", "rb"))
    as_described &= disk.read_sectors(0, size // 512) == truth
    disk.seek(0)
    try:
        seen = "right" if disk.read(size) == truth else "WRONG"
    except IndexError as error:
        seen = f"IndexError: {error}"
    print(f"{size} bytes: read gives {seen}")
    as_described &= (seen == "right") == whole and seen != "WRONG"
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PY
