#!/usr/bin/env bash
# Guess: the crate ntfs either unpacks a file with the compression attribute or refuses to read it.
# Seen: it hands out the stored (LZNT1) form as the content, without an error; the length it states is the unpacked one.
# With: ntfs 0.4.0 (crates.io), dissect.ntfs 3.16 (PyPI), a volume made by mkfs.ntfs and written by ntfs-3g 2022.10.3.
# Needs: root and /dev/fuse, ntfs-3g, mkfs.ntfs, setfattr, cargo, python3 with venv.
set -euo pipefail
for tool in ntfs-3g mkfs.ntfs setfattr cargo python3; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"
trap 'umount "$dir/mnt" 2>/dev/null || true; rm -rf "$dir"' EXIT

truncate -s 32M disk
mkfs.ntfs -q -F -f disk >/dev/null 2>&1
mkdir mnt && ntfs-3g -o compression disk mnt || exit 2
mkdir mnt/folder
setfattr -h -v 0x00000800 -n system.ntfs_attrib_be mnt/folder
(yes 'a line of text' || true) | head -c 300000 >truth
cp truth mnt/folder/file
umount mnt

mkdir -p reader/src
cat >reader/Cargo.toml <<'TOML'
[package]
name = "reader"
version = "0.0.0"
edition = "2021"
[dependencies]
ntfs = "=0.4.0"
TOML
cat >reader/src/main.rs <<'RUST'
use ntfs::indexes::NtfsFileNameIndex;
use ntfs::{Ntfs, NtfsReadSeek};

fn main() {
    let mut disk = std::fs::File::open("disk").expect("disk");
    let mut ntfs = Ntfs::new(&mut disk).expect("file system");
    ntfs.read_upcase_table(&mut disk).expect("upper-case table");
    let mut at = ntfs.root_directory(&mut disk).expect("root");
    for name in ["folder", "file"] {
        let index = at.directory_index(&mut disk).expect("index");
        let mut finder = index.finder();
        let found = NtfsFileNameIndex::find(&mut finder, &ntfs, &mut disk, name);
        let next = found.expect("entry").expect("search").to_file(&ntfs, &mut disk).expect("file");
        at = next;
    }
    let data = at.data(&mut disk, "").expect("data").expect("data");
    let attribute = data.to_attribute().expect("attribute");
    let mut value = attribute.value(&mut disk).expect("value");
    let mut start = [0; 64];
    let length = value.read(&mut disk, &mut start).expect("no error");
    println!("{}", value.len());
    std::fs::write("ntfs.out", &start[..length]).expect("output");
}
RUST
cargo build --quiet --manifest-path reader/Cargo.toml --target-dir target || exit 2
length=$(target/debug/reader) || { echo "CHANGED: reading fails now"; exit 1; }
python3 -m venv env >/dev/null && env/bin/pip install --quiet dissect.ntfs==3.16 || exit 2
LENGTH=$length env/bin/python - <<'PY'
import os
import sys
from dissect.ntfs import NTFS

truth, seen = open("truth", "rb").read(), open("ntfs.out", "rb").read()
dissect = NTFS(open("disk", "rb")).mft.get("folder/file").open().read()
print("written:", truth[:16], "dissect.ntfs:", dissect[:16], "ntfs:", seen[:16], "length", os.environ["LENGTH"])
# A chunk of LZNT1 begins with its length and a mark, and a byte of flags; then literal bytes follow.
stored = seen[3:11] == truth[:8] and seen[:8] != truth[:8]
as_described = dissect == truth and stored and int(os.environ["LENGTH"]) == len(truth)
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PY
