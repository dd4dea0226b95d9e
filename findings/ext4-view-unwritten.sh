#!/usr/bin/env bash
# Guess: a reader of ext4 gives zeroes for the part of a file that was preallocated (fallocate) and never written.
# Seen: the crate ext4-view gives what the disk held there before, data of files long deleted included: it takes unwritten extents
#       for written ones. Written parts of the same file and holes are right; debugfs and dissect.extfs give zeroes.
# With: ext4-view 1.0.0 (crates.io), dissect.extfs 3.15 (PyPI), a file system made by mkfs.ext4 1.47 and written by Linux.
# Needs: root (a loop device), mkfs.ext4, debugfs, cargo, python3 with venv.
set -euo pipefail
for tool in mkfs.ext4 debugfs cargo python3 losetup; do command -v "$tool" >/dev/null || { echo "needs $tool"; exit 2; }; done
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 2; }
dir=$(mktemp -d); cd "$dir"
trap 'umount "$dir/mnt" 2>/dev/null || true; rm -rf "$dir"' EXIT

(yes STALE || true) | head -c 64M >disk
mkfs.ext4 -q -F -E nodiscard disk
mkdir mnt && mount -o loop disk mnt || exit 2
fallocate -l 1M mnt/file
printf written | dd of=mnt/file bs=1 seek=524288 conv=notrunc status=none
cp mnt/file truth
umount mnt
debugfs -R 'cat /file' disk 2>/dev/null >debugfs.out
cmp truth debugfs.out || { echo "debugfs differs from the kernel"; exit 2; }

mkdir -p reader/src
cat >reader/Cargo.toml <<'TOML'
[package]
name = "reader"
version = "0.0.0"
edition = "2021"
[dependencies]
ext4-view = { version = "=1.0.0", features = ["std"] }
TOML
cat >reader/src/main.rs <<'RUST'
fn main() {
    let disk = std::fs::File::open("disk").expect("disk");
    let fs = ext4_view::Ext4::load(Box::new(disk)).expect("file system");
    std::fs::write("ext4-view.out", fs.read("/file").expect("file")).expect("output");
}
RUST
cargo build --quiet --manifest-path reader/Cargo.toml --target-dir target || exit 2
target/debug/reader
python3 -m venv env >/dev/null && env/bin/pip install --quiet dissect.extfs==3.15 || exit 2
env/bin/python - <<'PY'
import sys
from dissect.extfs import ExtFS

truth, seen = open("truth", "rb").read(), open("ext4-view.out", "rb").read()
dissect = ExtFS(open("disk", "rb")).get("/file").open().read()
print("the kernel:", truth[:12], "dissect.extfs:", dissect[:12], "ext4-view:", seen[:12])
stale = {seen[at : at + 4096].strip(b"STALE\n") == b"" for at in (0, 4096, 131072)}
written = slice(524288, 524288 + 7)
as_described = dissect == truth and truth[:4096] == bytes(4096) and stale == {True} and seen[written] == b"written"
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PY
