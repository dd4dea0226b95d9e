#!/usr/bin/env bash
# Converting, side by side with `qemu-img convert -m 16 -W`: medians, in seconds, and how many times faster.
#
#   benches/convert.sh [DIRECTORY] [MIB] [ROUNDS]
#
# DIRECTORY (default: a new one in /dev/shm) is where source and targets lie: on XFS or btrfs blocks are shared.
# The source is a disk of MIB MiB (default 2048), a third of it each data that does not compress, data that does,
# and holes. Both programs make their target durable: qemu-img with -t writeback, which flushes at the end.
# FLATDISK names the program to be measured (default: target/release/flatdisk).
set -euo pipefail

flatdisk=${FLATDISK:-$(dirname "$0")/../target/release/flatdisk}
dir=${1:-$(mktemp -d /dev/shm/convert.XXXXXX)}
mib=${2:-2048}
rounds=${3:-5}
mkdir -p "$dir"
trap 'rm -f "$dir"/bench-*' EXIT

median() { sort -n | sed -n "$(((rounds + 1) / 2))p"; }

# Runs a command $rounds times, each with the target gone and everything written back; prints the median.
measure() {
    local round start end
    for ((round = 0; round < rounds; round++)); do
        rm -f "$dir"/bench-target*
        sync -f "$dir"
        start=$(date +%s%N)
        "$@" >/dev/null
        end=$(date +%s%N)
        echo "$(((end - start) / 1000))"
    done | median
}

row() {
    local what=$1 ours=$2 theirs=$3
    awk -v what="$what" -v a="$ours" -v b="$theirs" \
        'BEGIN { printf "%-44s %9.3f %9.3f %7.1f\n", what, a / 1e6, b / 1e6, b / a }'
}

source=$dir/bench-source.raw
truncate -s "${mib}M" "$source"
third=$((mib / 3))
dd if=/dev/urandom of="$source" bs=1M count="$third" conv=notrunc status=none
seq 1 $((third * 120000)) | head -c "${third}M" | dd of="$source" bs=1M seek="$third" conv=notrunc iflag=fullblock status=none

declare -A options=(
    [raw]="-O raw"
    [vhd]="-O vhd --subformat dynamic"
    [vhd-fixed]="-O vhd --subformat fixed"
    [vhdx]="-O vhdx --subformat dynamic"
    [vmdk]="-O vmdk --subformat monolithicSparse"
    [stream]="-O vmdk --subformat streamOptimized"
)
declare -A theirs=(
    [raw]="-O raw"
    [vhd]="-O vpc -o subformat=dynamic,force_size=on"
    [vhd-fixed]="-O vpc -o subformat=fixed,force_size=on"
    [vhdx]="-O vhdx"
    [vmdk]="-O vmdk"
    [stream]="-O vmdk -o subformat=streamOptimized"
)
declare -A names=([raw]=raw [vhd]=vpc [vhd-fixed]=vpc [vhdx]=vhdx [vmdk]=vmdk [stream]=vmdk)

printf '%-44s %9s %9s %7s\n' "$(stat -f -c %T "$dir"), $mib MiB" flatdisk qemu-img times
for kind in ${KINDS:-raw vhd vhd-fixed vhdx vmdk stream}; do
    target=$dir/bench-target.${kind%%-*}
    # shellcheck disable=SC2086
    ours=$(measure "$flatdisk" convert -q --reflink never ${options[$kind]} --from raw "$source" "$target")
    # shellcheck disable=SC2086
    qemu=$(measure qemu-img convert -m 16 -W -t writeback -f raw ${theirs[$kind]} "$source" "$target")
    row "raw to $kind" "$ours" "$qemu"
    if [ "$(stat -f -c %T "$dir")" != tmpfs ] && [ "$kind" != stream ]; then
        # shellcheck disable=SC2086
        ours=$(measure "$flatdisk" convert -q ${options[$kind]} --from raw "$source" "$target")
        row "raw to $kind, blocks shared" "$ours" "$qemu"
    fi
    [ "$kind" = raw ] && continue
    image=$dir/bench-image.$kind
    # shellcheck disable=SC2086
    "$flatdisk" convert -q --reflink never ${options[$kind]} --from raw "$source" "$image"
    ours=$(measure "$flatdisk" convert -q --reflink never -O raw "$image" "$dir/bench-target.raw")
    qemu=$(measure qemu-img convert -m 16 -W -t writeback -f "${names[$kind]}" -O raw "$image" "$dir/bench-target.raw")
    row "$kind to raw" "$ours" "$qemu"
    if [ "$(stat -f -c %T "$dir")" != tmpfs ] && [ "$kind" != stream ]; then
        ours=$(measure "$flatdisk" convert -q -O raw "$image" "$dir/bench-target.raw")
        row "$kind to raw, blocks shared" "$ours" "$qemu"
    fi
    rm -f "$image"
done
