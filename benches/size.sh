#!/usr/bin/env bash
# Changing an image in place, side by side with what people do with qemu-img: a new image by `qemu-img convert` instead of
# compact and flatten, `qemu-img commit`, `qemu-img resize` where it can. Medians of seconds; most memory in MiB.
#
#   benches/size.sh [DIRECTORY] [MIB] [ROUNDS]
#
# DIRECTORY (default: a new one in /dev/shm) is where the images lie. They have MIB MiB (default 4096) that were all
# written; half of it is zeroes now. FLATDISK names the program to be measured (default: target/release/flatdisk).
# GNU time (/usr/bin/time) tells the memory.
set -euo pipefail

flatdisk=${FLATDISK:-$(dirname "$0")/../target/release/flatdisk}
dir=${1:-$(mktemp -d /dev/shm/size.XXXXXX)}
mib=${2:-4096}
rounds=${3:-5}
mkdir -p "$dir"
times=$(mktemp -d)
trap 'rm -rf "$dir"/bench-* "$times"' EXIT

# run LIST COMMAND...: appends seconds and KiB to a list.
run() {
    local list=$times/$1
    shift
    sync -f "$dir"
    /usr/bin/time -q -a -o "$list" -f '%e %M' "$@" >/dev/null
}

median() { cut -d' ' -f"$2" "$times/$1" | sort -n | sed -n "$(((rounds + 1) / 2))p"; }

row() {
    awk -v what="$1" -v a="$(median ours 1)" -v m="$(median ours 2)" -v b="$([ -e "$times/qemu" ] && median qemu 1 || echo 0)" \
        'BEGIN { printf "%-34s %8.2f %8s %7s %9.1f\n", what, a, b ? b : "-", b ? sprintf("%.1f", b / (a > 0 ? a : 0.005)) : "-", m / 1024 }'
    rm -f "$times"/*
}

declare -A names=([vhd]=vpc [vhdx]=vhdx [vmdk]=vmdk)
printf '%-34s %8s %8s %7s %9s\n' "$(stat -f -c %T "$dir"), $mib MiB" flatdisk qemu-img times "MiB used"

full=$dir/bench-full.raw
half=$((mib / 2))
for kind in ${KINDS:-vhd vhdx vmdk}; do
    truncate -s "${mib}M" "$full"
    for ((at = 0; at < mib; at += 64)); do dd if=/dev/urandom of="$full" bs=1M count=64 seek="$at" conv=notrunc status=none; done
    "$flatdisk" convert -q --from raw "$full" "$dir/bench-made.$kind"
    rm -f "$full"
    # Every second 64 MiB.
    for ((at = 0; at < half; at += 64)); do
        head -c 64M /dev/zero | "$flatdisk" write --offset "$((at * 2))M" "$dir/bench-made.$kind" >/dev/null
    done
    for ((round = 0; round < rounds; round++)); do
        cp "$dir/bench-made.$kind" "$dir/bench-image.$kind"
        run qemu qemu-img convert -m 16 -W -t writeback -f "${names[$kind]}" -O "${names[$kind]}" "$dir/bench-image.$kind" "$dir/bench-new.$kind"
        rm -f "$dir/bench-new.$kind"
        run ours "$flatdisk" compact -q "$dir/bench-image.$kind"
    done
    row "compact $kind"
    rm -f "$dir"/bench-*

    "$flatdisk" create -q "$dir/bench-base.$kind" "${mib}M"
    child=$dir/bench-child.$kind
    for ((round = 0; round < rounds; round++)); do
        for who in ours qemu; do
            rm -f "$dir"/bench-*
            "$flatdisk" create -q "$dir/bench-base.$kind" "${mib}M"
            head -c "$half"M /dev/urandom | "$flatdisk" write "$dir/bench-base.$kind" >/dev/null
            "$flatdisk" create -q --parent "$dir/bench-base.$kind" "$child"
            head -c 256M /dev/urandom | "$flatdisk" write --offset 1G "$child" >/dev/null
            case $who in
            ours) run ours "$flatdisk" flatten -q "$child" ;;
            # It reads chains of VMDK only; of the others, what the parent alone holds.
            qemu) run qemu qemu-img convert -m 16 -W -t writeback -f "${names[$kind]}" -O "${names[$kind]}" \
                "$([ "$kind" = vmdk ] && echo "$child" || echo "$dir/bench-base.$kind")" "$dir/bench-new.$kind" ;;
            esac
        done
    done
    row "flatten $kind"
    rm -f "$dir"/bench-*
    for ((round = 0; round < rounds; round++)); do
        for who in ours qemu; do
            [ "$who" = qemu ] && [ "$kind" != vmdk ] && continue
            rm -f "$dir"/bench-*
            "$flatdisk" create -q "$dir/bench-base.$kind" "${mib}M"
            "$flatdisk" create -q --parent "$dir/bench-base.$kind" "$child"
            head -c 1G /dev/urandom | "$flatdisk" write --offset 64M "$child" >/dev/null
            case $who in
            ours) run ours "$flatdisk" commit -q "$child" ;;
            qemu) run qemu qemu-img commit -d -t writeback -f vmdk "$child" ;;
            esac
        done
    done
    row "commit 1 GiB $kind"
    rm -f "$dir"/bench-*
    size=2T
    [ "$kind" = vhd ] && size=1T
    larger=4T
    [ "$kind" = vhd ] && larger=2040G
    for ((round = 0; round < rounds; round++)); do
        rm -f "$dir"/bench-*
        "$flatdisk" create -q "$dir/bench-image.$kind" "$size"
        run ours "$flatdisk" resize -q "$dir/bench-image.$kind" "$larger"
    done
    row "grow $kind, $size to $larger"
    rm -f "$dir"/bench-*
done
