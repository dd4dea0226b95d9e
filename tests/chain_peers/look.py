"""Prints the size of a VHD, VHDX or VMDK as dissect.hypervisor sees it, and sectors of 512 bytes: look.py IMAGE OFFSET..."""

import sys
from pathlib import Path

from dissect.hypervisor.disk.vhd import VHD
from dissect.hypervisor.disk.vhdx import VHDX
from dissect.hypervisor.disk.vmdk import VMDK

image = Path(sys.argv[1])
match image.suffix:
    case ".vmdk":
        disk = VMDK(image)
    case ".vhd":
        disk = VHD(image.open("rb"))
    case _:
        disk = VHDX(image)
print(disk.size)
for offset in map(int, sys.argv[2:]):
    if image.suffix == ".vmdk":
        # As a stream it reads whole pieces of 8 KiB, and fails where the disk ends within one.
        print(disk.read_sectors(offset // 512, 1).hex())
        continue
    disk.seek(offset)
    print(disk.read(512).hex())
