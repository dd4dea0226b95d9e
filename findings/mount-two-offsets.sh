#!/usr/bin/env bash
# Guess: `mount -o loop,offset=N disk.raw` mounts each partition of a disk image, one after the other.
# Seen: only the first; the second is refused ("overlapping loop device exists"), whichever of the two was first, because without sizelimit=
#       the first loop device reaches to the end of the file, or the second would. A loop device over the whole image stops every
#       mount with an offset in the same way. With sizelimit= both mount. And where a read-only loop device with the same offset is
#       there, mount takes that one and mounts read-only, though the file could be written.
# With: util-linux 2.38.1, Linux 6.18.
# Needs: root (loop devices), mkfs.ext4.
set -euo pipefail
for tool in mkfs.ext4 losetup mount; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"; loop=
trap 'umount "$dir/one" "$dir/two" 2>/dev/null || true; [ -z "$loop" ] || losetup -d "$loop"; rm -rf "$dir"' EXIT
mount --version
mkdir one two
truncate -s 100M disk.raw
first=$((1 << 20)) second=$((34 << 20)) size=$((32 << 20))
for offset in $first $second; do mkfs.ext4 -q -F -E offset=$offset disk.raw 32M; done
changed=0
expect() { # WHAT WANTED SEEN
  echo "$1: $3"
  [ "$2" = "$3" ] || { echo "CHANGED: not $2"; changed=1; }
}
try() { # OPTIONS DIRECTORY
  local said
  if said=$(mount -o "loop,$1" disk.raw "$2" 2>&1); then
    grep -q " $dir/$2 .* ro," /proc/mounts && echo 'mounted read-only' || echo mounted
  else
    grep -o 'overlapping loop device exists' <<<"$said" || echo "$said"
  fi
}
done_with() { umount one two 2>/dev/null || true; }
expect "first partition" mounted "$(try offset=$first one)"
expect "then the second" 'overlapping loop device exists' "$(try offset=$second two)"
done_with
expect "second partition" mounted "$(try offset=$second two)"
expect "then the first" 'overlapping loop device exists' "$(try offset=$first one)"
done_with
expect "first partition with sizelimit" mounted "$(try offset=$first,sizelimit=$size one)"
expect "then the second with sizelimit" mounted "$(try offset=$second,sizelimit=$size two)"
done_with
loop=$(losetup -f --show disk.raw)
expect "a loop device over the whole disk, then the first partition" 'overlapping loop device exists' "$(try offset=$first,sizelimit=$size one)"
losetup -d "$loop"
loop=$(losetup -f --show --read-only --offset $first disk.raw)
expect "a read-only loop device there, then the first partition" 'mounted read-only' "$(try offset=$first one)"
done_with
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
