#!/usr/bin/env bash
# Converting, side by side with `qemu-img convert -m 16 -W`: medians of seconds, wall clock and processor time.
#
#   benches/convert.sh [DIRECTORY] [MIB] [ROUNDS]
#
# DIRECTORY (default: a new one in /dev/shm) is where source and targets lie: on XFS or btrfs blocks are shared.
# The source is a disk of MIB MiB (default 2048), a third of it each data that does not compress, data that does,
# and holes. Both programs make their target durable: qemu-img with -t writeback, which flushes at the end.
# They take turns, so that what else the machine does hits both. FLATDISK names the program to be measured
# (default: target/release/flatdisk), KINDS which kinds of targets and sources.
set -euo pipefail

flatdisk=${FLATDISK:-$(dirname "$0")/../target/release/flatdisk}
dir=${1:-$(mktemp -d /dev/shm/convert.XXXXXX)}
mib=${2:-2048}
rounds=${3:-5}
mkdir -p "$dir"
times=$(mktemp -d)
trap 'rm -rf "$dir"/bench-* "$times"' EXIT
filesystem=$(stat -f -c %T "$dir")
TIMEFORMAT='%R %U %S'

# Runs a command with the target gone and everything written back; appends its times to a list.
run() {
    local list=$times/$1
    shift
    rm -f "$dir"/bench-target*
    sync -f "$dir"
    { time "$@" >/dev/null 2>"$times/error"; } 2>&1 | awk '{ print $1, $2 + $3 }' >>"$list" || {
        cat "$times/error" >&2
        return 1
    }
}

median() { cut -d' ' -f"$2" "$times/$1" | sort -n | sed -n "$(((rounds + 1) / 2))p"; }

# pair WHAT: the commands in the arrays ours and qemu, in turns.
pair() {
    rm -f "$times"/*
    for ((round = 0; round < rounds; round++)); do
        run ours "${ours[@]}"
        run qemu "${qemu[@]}"
    done
    printf '%-34s %8.3f %8.3f %7.1f %11.3f %8.3f\n' "$1" "$(median ours 1)" "$(median qemu 1)" \
        "$(awk -v a="$(median ours 1)" -v b="$(median qemu 1)" 'BEGIN { print b / (a > 0 ? a : 0.001) }')" \
        "$(median ours 2)" "$(median qemu 2)"
}

source=$dir/bench-source.raw
rm -f "$source"
truncate -s "${mib}M" "$source"
third=$((mib / 3))
dd if=/dev/urandom of="$source" bs=1M count="$third" conv=notrunc status=none
# More lines than are taken: that seq finds nobody to read them is no failure.
{ seq 1 $((third * 120000)) 2>/dev/null || true; } | head -c "${third}M" |
    dd of="$source" bs=1M seek="$third" conv=notrunc iflag=fullblock status=none

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
shares=no
[ "$filesystem" = tmpfs ] || shares=yes

printf '%-34s %8s %8s %7s %11s %8s\n' "$filesystem, $mib MiB" flatdisk qemu-img times "flatdisk cpu" "qemu cpu"
for kind in ${KINDS:-raw vhd vhd-fixed vhdx vmdk stream}; do
    read -ra to <<<"${options[$kind]}"
    read -ra qemu_to <<<"${theirs[$kind]}"
    target=$dir/bench-target.${kind%%-*}
    qemu=(qemu-img convert -m 16 -W -t writeback -f raw "${qemu_to[@]}" "$source" "$target")
    ours=("$flatdisk" convert -q --reflink never "${to[@]}" --from raw "$source" "$target")
    pair "raw to $kind"
    if [ "$shares" = yes ] && [ "$kind" != stream ]; then
        ours=("$flatdisk" convert -q --reflink always "${to[@]}" --from raw "$source" "$target")
        pair "raw to $kind, blocks shared"
    fi
    [ "$kind" = raw ] && continue
    image=$dir/bench-image.$kind
    "$flatdisk" convert -q --reflink never "${to[@]}" --from raw "$source" "$image"
    target=$dir/bench-target.raw
    qemu=(qemu-img convert -m 16 -W -t writeback -f "${names[$kind]}" -O raw "$image" "$target")
    ours=("$flatdisk" convert -q --reflink never -O raw "$image" "$target")
    pair "$kind to raw"
    if [ "$shares" = yes ] && [ "$kind" != stream ]; then
        ours=("$flatdisk" convert -q --reflink always -O raw "$image" "$target")
        pair "$kind to raw, blocks shared"
    fi
    rm -f "$image"
done
