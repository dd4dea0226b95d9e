#!/usr/bin/env bash
# Guess: a library that finds the GPT of a disk with sectors of 4096 bytes knows from where it found it how large a sector is.
# Seen: the npm package partitioninfo (of Etcher) lists such a disk's partitions with a type, ids and names, and with offsets and sizes in
#       sectors of 512 bytes: each at an eighth of its place, an eighth as long. Right for disks with sectors of 512 bytes. An ext4 that
#       is read at the stated offset is not there.
# With: partitioninfo 6.0.3, file-disk 8.0.1 (npm), a disk made by sfdisk 2.38 on a loop device with `--sector-size 4096`.
# Needs: root (a loop device), node, npm, sfdisk.
set -euo pipefail
for tool in node npm sfdisk losetup; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"; loop=
trap '[ -z "$loop" ] || losetup -d "$loop"; rm -rf "$dir"' EXIT
npm install --silent --no-audit --no-fund partitioninfo@6.0.3 file-disk@8.0.1 >/dev/null 2>&1 || { echo "the packages are not to be had"; exit 2; }
for sector in 512 4096; do
  truncate -s 256M $sector.raw
  loop=$(losetup -f --show --sector-size $sector $sector.raw) || exit 2
  printf 'label: gpt\nstart=2048, size=4096\n' | sfdisk -q --no-reread --no-tell-kernel "$loop"
  losetup -d "$loop"; loop=
done
cat >list.js <<'JS'
const { FileDisk, withOpenFile } = require('file-disk');
const { getPartitions } = require('partitioninfo');

async function main() {
  let described = true;
  for (const sector of [512, 4096]) {
    const { type, partitions } = await withOpenFile(`${sector}.raw`, 'r', (file) => getPartitions(new FileDisk(file)));
    const [{ offset, size }] = partitions;
    console.log(`sectors of ${sector}: ${type}, at ${offset} instead of ${2048 * sector}, ${size} bytes instead of ${4096 * sector}`);
    described = described && type === 'gpt' && offset === 2048 * 512 && size === 4096 * 512;
  }
  console.log(described ? 'as described' : 'CHANGED');
  return described ? 0 : 1;
}

main().then((code) => process.exit(code), (error) => { console.log(`CHANGED: ${error}`); process.exit(1); });
JS
node list.js
