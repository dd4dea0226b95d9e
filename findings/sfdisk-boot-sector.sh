#!/usr/bin/env bash
# Guess: sfdisk and fdisk tell a disk that was formatted without a partition table from one with an empty table, as the kernel and blkid do.
# Seen: the boot sectors of FAT, NTFS and exFAT end in 55 AA too, and to sfdisk and fdisk each is an MBR without partitions ("Disklabel type:
#       dos", exit status 0), so `sfdisk -d || format it` and the like go astray, and `sfdisk --append` writes an entry into the middle
#       of the boot code: the file system stays, and has a partition inside. parted knows FAT and NTFS ("loop"), but not exFAT
#       ("msdos"); blkid knows FAT and NTFS, and calls exFAT a file system and a dos partition table at once. None errs with ext4.
# With: util-linux 2.38.1, parted 3.5, dosfstools 4.2, ntfs-3g 2022.10.3, exfatprogs 1.2.0.
# Needs: sfdisk, fdisk, blkid, parted, mkfs.vfat, mkfs.ntfs, mkfs.exfat, mkfs.ext4.
set -euo pipefail
for tool in sfdisk fdisk blkid parted mkfs.vfat mkfs.ntfs mkfs.exfat mkfs.ext4; do
  command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }
done
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
sfdisk --version; parted --version | sed -n 1p
truncate -s 64M vfat ntfs exfat ext4
mkfs.vfat vfat >/dev/null
mkfs.ntfs -q -F -f ntfs >/dev/null 2>&1
mkfs.exfat exfat >/dev/null
mkfs.ext4 -q -F ext4
changed=0
expect() { # SYSTEM PROGRAM WANTED SEEN
  echo "$1, $2: $4"
  [ "$3" = "$4" ] || { echo "CHANGED: not $3"; changed=1; }
}
for system in vfat ntfs exfat ext4; do
  table=dos by_parted=loop by_blkid='' # what blkid says of a partition table beside the file system
  case $system in ext4) table=none ;; exfat) by_parted=msdos by_blkid=dos ;; esac
  expect $system sfdisk $table "$(sfdisk -d $system 2>/dev/null | sed -n 's/^label: //p' | grep . || echo none)"
  expect $system fdisk $table "$(fdisk -l $system 2>/dev/null | sed -n 's/^Disklabel type: //p' | grep . || echo none)"
  expect $system parted $by_parted "$(parted -s $system print 2>/dev/null | sed -n 's/^Partition Table: //p')"
  expect $system "blkid's file system" $system "$(blkid -p -s TYPE -o value $system)"
  expect $system "blkid's partition table" "$by_blkid" "$(blkid -p -s PTTYPE -o value $system || true)"
done
echo 'start=2048, size=4096' | sfdisk -q --append ntfs >/dev/null 2>&1 || { echo "CHANGED: sfdisk --append refuses"; changed=1; }
expect ntfs "file system after sfdisk --append" ntfs "$(blkid -p -s TYPE -o value ntfs || true)"
expect ntfs "partitions after sfdisk --append" 1 "$(sfdisk -d ntfs | grep -c 'start=')"
[ "$changed" = 0 ] && echo "as described"
exit "$changed"
