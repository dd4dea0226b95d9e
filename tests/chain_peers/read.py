"""Writes the contents of a VHDX or VMDK chain as dissect.hypervisor reads them: read.py IMAGE RAW."""

import shutil
import sys
from pathlib import Path

from dissect.hypervisor.disk.vhdx import VHDX
from dissect.hypervisor.disk.vmdk import VMDK

image, raw = map(Path, sys.argv[1:])
disk = VMDK(image) if image.suffix == ".vmdk" else VHDX(image)
with raw.open("wb") as out:
    shutil.copyfileobj(disk, out, 1 << 20)
