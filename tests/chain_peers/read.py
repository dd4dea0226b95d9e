"""Writes the contents of a VHD, or of a VHDX or VMDK chain, as dissect.hypervisor reads them: read.py IMAGE RAW."""

import shutil
import sys
from pathlib import Path

from dissect.hypervisor.disk.vhd import VHD
from dissect.hypervisor.disk.vhdx import VHDX
from dissect.hypervisor.disk.vmdk import VMDK

image, raw = map(Path, sys.argv[1:])
match image.suffix:
    case ".vmdk":
        disk = VMDK(image)
    case ".vhd":
        disk = VHD(image.open("rb"))
    case _:
        disk = VHDX(image)
with raw.open("wb") as out:
    shutil.copyfileobj(disk, out, 1 << 20)
