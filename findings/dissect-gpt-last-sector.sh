#!/usr/bin/env bash
# Guess: the partition that dissect.volume finds in a GPT is as long as the GPT says.
# Seen: it lacks its last sector (4096 bytes on a disk with such sectors), as the last block of a GPT entry is taken for the one behind
#       it. What stands there is lost to whoever copies or hashes a partition: NTFS's second boot sector, the end of a RAID member.
#       Partitions of an MBR are right.
# With: dissect.volume 3.18 (PyPI), disks made by sfdisk 2.38.
# Needs: python3 with venv, sfdisk.
set -euo pipefail
for tool in python3 sfdisk; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
python3 -m venv env >/dev/null && env/bin/pip install --quiet dissect.volume==3.18 || exit 2
for label in gpt dos; do
  (yes 'a disk full of text' || true) | head -c 64M >$label
  printf 'label: %s\nstart=2048, size=4096\nstart=8192, size=10000\n' $label | sfdisk -q $label
done
env/bin/python - <<'PY'
import sys

from dissect.volume.disk import Disk

as_described = True
for name, lack in (("gpt", 1), ("dos", 0)):
    for partition, sectors in zip(Disk(open(name, "rb")).partitions, (4096, 10000)):
        got = len(partition.open().read())
        print(f"{name} {partition.number}: {got} bytes of {sectors * 512}")
        as_described &= got == (sectors - lack) * 512 == partition.size
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PY
