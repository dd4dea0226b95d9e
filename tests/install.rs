//! What `install-helpers` lays: where it lies, what reads it, and that it goes away again.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use live::installed::{bare_script, script};
use live::{flatdisk, have, outcome, scratch, succeed};

/// All files and links below a folder, by their paths from it.
fn files_in(root: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => folders.push(entry.path()),
                false => _ = found.insert(entry.path().strip_prefix(root).unwrap().to_owned()),
            }
        }
    }
    found
}

/// The lines a successful `install-helpers` prints, from below `root`.
fn install(root: &Path, options: &[&str]) -> BTreeSet<PathBuf> {
    let mut command = flatdisk();
    command.args(["install-helpers", "--root"]).arg(root).args(options);
    let printed = succeed(&mut command);
    printed.lines().map(|line| Path::new(line).strip_prefix(root).unwrap().to_owned()).collect()
}

#[test]
fn what_is_installed_is_what_is_printed_and_goes_away_again() {
    for prefix in ["/usr", "/usr/local", "/opt/flatdisk"] {
        let root = scratch();
        let root = root.path();
        let announced = install(root, &["--prefix", prefix, "--dry-run"]);
        assert_eq!(files_in(root), BTreeSet::new(), "a dry run changes nothing");
        assert_eq!(install(root, &["--prefix", prefix]), announced);
        assert_eq!(files_in(root), announced);
        // Again, over itself.
        assert_eq!(install(root, &["--prefix", prefix]), announced);
        for name in ["mount.flatdisk", "umount.fuse.flatdisk"] {
            let helper = root.join("usr/sbin").join(name);
            let program = fs::canonicalize(&helper).unwrap();
            assert_eq!(
                program,
                fs::canonicalize(root).unwrap().join(&prefix[1..]).join("bin/flatdisk")
            );
            let output = succeed(std::process::Command::new(helper).arg("--version"));
            assert!(
                output.starts_with(name.split_once("fuse.").map_or(name, |_| "umount.flatdisk"))
            );
        }
        let unit = root.join(&prefix[1..]).join("lib/systemd/system/flatdisk@.service");
        let unit = fs::read_to_string(unit).unwrap();
        assert!(unit.contains(&format!("ExecStart={prefix}/bin/flatdisk mount -f")), "{unit}");

        // What is not ours stays, even under our names.
        let foreign = root.join("usr/sbin/mount.flatdisk");
        fs::remove_file(&foreign).unwrap();
        fs::write(&foreign, "somebody else's").unwrap();
        assert_eq!(install(root, &["--prefix", prefix]).len(), announced.len() - 1);
        assert_eq!(fs::read(&foreign).unwrap(), b"somebody else's");
        let removed = install(root, &["--prefix", prefix, "--uninstall"]);
        assert_eq!(files_in(root), BTreeSet::from(["usr/sbin/mount.flatdisk".into()]));
        assert_eq!(removed.len(), announced.len() - 1);
        assert!(!root.join(&prefix[1..]).join("share/doc/flatdisk").exists());
    }
}

#[test]
fn installing_without_the_right_says_what_to_do() {
    if !have(&["setpriv"]) || !live::can_mount() {
        return;
    }
    let root = scratch();
    let mut command = std::process::Command::new("setpriv");
    command.args(["--reuid=65534", "--clear-groups", "--", "cat", env!("CARGO_BIN_EXE_flatdisk")]);
    if !outcome(&mut command).status.success() {
        // The program itself lies where only root can reach it.
        return;
    }
    let mut command = std::process::Command::new("setpriv");
    command.args(["--reuid=65534", "--clear-groups", "--", env!("CARGO_BIN_EXE_flatdisk")]);
    let output = outcome(command.args(["install-helpers", "--root"]).arg(root.path()));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("permission denied (run it as root, or with --root)"), "{said}");
}

#[test]
fn man_pages_are_clean_dated_and_found() {
    let pages = scratch();
    let dated = |date: &str| {
        succeed(flatdisk().arg("man").arg(pages.path()).env("SOURCE_DATE_EPOCH", date));
        fs::read(pages.path().join("flatdisk-check.1")).unwrap()
    };
    let page = dated("951782400");
    assert!(String::from_utf8_lossy(&page).contains("2000-02-29"));
    assert_eq!(page, dated("951782400"));
    let output = outcome(flatdisk().arg("man").arg(pages.path()).env("SOURCE_DATE_EPOCH", "x"));
    assert_eq!(output.status.code(), Some(1));
    if !have(&["man", "groff"]) {
        return;
    }
    script(
        r#"
        export MANPATH=/usr/share/man MANROFFOPT=; cd /usr/share/man
        for page in /usr/share/man/man1/flatdisk*.1 /usr/share/man/man8/*mount*flatdisk.8 \
            /usr/share/man/man8/umount.fuse.8; do
            name=$(basename "$page"); section=${name##*.}; name=${name%.*}
            [ "$(man -w "$section" "$name")" != "" ]
            groff -man -Tutf8 -ww "$page" 2>"$T/warnings" >/dev/null
            if [ -s "$T/warnings" ]; then cat "$page" "$T/warnings"; exit 6; fi
        done
        has() { # PAGE HEADING...
            man "$1" > "$T/page"; shift
            for heading in "$@"; do
                grep -q "^$heading" "$T/page" || { echo "no $heading"; cat "$T/page"; exit 6; }
            done
        }
        has flatdisk NAME SYNOPSIS DESCRIPTION COMMANDS EXAMPLES "EXIT STATUS" ENVIRONMENT FILES "SEE ALSO"
        has flatdisk-mount SYNOPSIS ARGUMENTS OPTIONS EXAMPLES "EXIT STATUS"
        has flatdisk-check OPTIONS EXAMPLES "EXIT STATUS"
        has mount.flatdisk OPTIONS "MOUNT OPTIONS" EXAMPLES "EXIT STATUS" FILES
        has mount.fuse.flatdisk "MOUNT OPTIONS"
        has umount.flatdisk "EXIT STATUS"
        man mount.flatdisk | grep -q "allow_parent=DIR"
        man flatdisk-check | grep -q "3 *there are no errors"
        "#,
    );
}

#[test]
fn shells_complete_commands_and_options() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = succeed(flatdisk().args(["completions", shell]));
        assert!(script.contains("install-helpers"), "{shell}");
    }
    if !have(&["bash"]) {
        return;
    }
    script(
        r#"
        bash -euc '
            . /usr/share/bash-completion/completions/flatdisk
            completes() { # WORDS... EXPECTED
                COMP_WORDS=("${@:1:$#-1}") COMP_CWORD=$(($# - 2)) COMPREPLY=()
                _flatdisk flatdisk "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}" || :
                case " ${COMPREPLY[*]} " in *" ${!#} "*) ;; *) echo "$*: ${COMPREPLY[*]}"; exit 6;; esac
            }
            completes flatdisk mou mount
            completes flatdisk check --re --repair
            completes flatdisk mount --allow- --allow-parent
        '
        "#,
    );
}

#[test]
fn systemd_accepts_the_units() {
    if !have(&["systemd-analyze"]) {
        return;
    }
    bare_script(
        r#"
        export XDG_RUNTIME_DIR="$T"
        clean() { # systemd-analyze's arguments: it succeeds and has nothing to say
            systemd-analyze "$@" > "$T/said" 2>&1 || { cat "$T/said"; exit 6; }
            if [ -s "$T/said" ]; then cat "$T/said"; exit 6; fi
        }
        for prefix in /usr /usr/local; do
            "$FLATDISK" install-helpers --prefix $prefix >/dev/null
            clean verify flatdisk@mnt-images.service
            clean verify --user flatdisk@home-me-flat.service
            mkdir -p /etc/systemd/system
            cp $prefix/share/doc/flatdisk/examples/mnt-flat.*mount /etc/systemd/system
            clean verify mnt-flat.mount mnt-flat.automount
            "$FLATDISK" install-helpers --prefix $prefix --uninstall >/dev/null
        done
        "#,
    );
}

#[test]
fn systemd_makes_units_of_the_fstab_lines_of_the_readme() {
    let generator = "/usr/lib/systemd/system-generators/systemd-fstab-generator";
    if !Path::new(generator).exists() {
        live::skip("systemd-fstab-generator is not installed");
        return;
    }
    let readme =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let lines: Vec<_> =
        readme.lines().filter(|line| line.starts_with("    /") && line.ends_with(" 0 0")).collect();
    assert!(lines.len() >= 3, "{lines:?}");
    let dir = scratch();
    let fstab = dir.path().join("fstab");
    fs::write(&fstab, lines.join("\n") + "\n").unwrap();
    let outputs = ["normal", "early", "late"].map(|name| dir.path().join(name));
    outputs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let mut generate = std::process::Command::new(generator);
    succeed(generate.args(&outputs).env("SYSTEMD_FSTAB", &fstab));
    for line in lines {
        let fields: Vec<_> = line.split_whitespace().collect();
        let name = fields[1].trim_start_matches('/').replace('/', "-");
        let unit = fs::read_to_string(outputs[0].join(format!("{name}.mount"))).unwrap();
        assert!(unit.contains(&format!("\nWhat={}\n", fields[0])), "{unit}");
        assert!(unit.contains(&format!("\nType={}\n", fields[2])), "{unit}");
        for option in fields[3].split(',') {
            if let Some(path) = option.strip_prefix("x-systemd.requires-mounts-for=") {
                assert!(unit.contains(&format!("RequiresMountsFor={path}\n")), "{unit}");
            }
            if option == "x-systemd.automount" {
                assert!(outputs[0].join(format!("{name}.automount")).exists());
            }
        }
    }
}

#[test]
fn desktops_know_images_and_flat_files() {
    let tools = ["desktop-file-validate", "update-mime-database", "appstreamcli", "gio"];
    if !have(&tools) {
        return;
    }
    script(
        r#"
        desktop-file-validate --no-hints /usr/share/applications/flatdisk.desktop
        appstreamcli validate --no-net /usr/share/metainfo/org.flatdisk.flatdisk.metainfo.xml >&2
        is() { # TYPE FILE
            type=$(gio info -a standard::content-type "$2" | sed -n 's/.*content-type: //p')
            [ "$type" = "$1" ] || { echo "$2: $type instead of $1"; exit 6; }
        }
        cd "$IMAGES"
        is application/x-vhdx-disk a.vhdx
        "$FLATDISK" create -q --parent a.vhdx b.avhdx
        is application/x-vhdx-disk b.avhdx
        "$FLATDISK" create -q --size 1M c.vhd
        "$FLATDISK" create -q --parent c.vhd d.avhd
        is application/x-vhd-disk c.vhd
        is application/x-vhd-disk d.avhd
        "$FLATDISK" create -q --size 1M --subformat monolithicFlat e.vmdk
        is application/x-vmdk-disk e.vmdk
        cp e.vmdk "$T/descriptor"
        is application/x-vmdk-disk "$T/descriptor"
        echo "entity e is end;" > f.vhd
        is text/x-vhdl f.vhd
        for type in vhd vhdx vmdk; do
            gio mime application/x-$type-disk | grep -q "Default.*flatdisk.desktop"
        done
        "$FLATDISK" mount "$IMAGES" "$POINT"
        for name in a.vhdx b.avhdx c.vhd d.avhd e.vmdk; do
            is application/x-raw-disk-image "$POINT/$name.img"
        done
        is text/plain "$POINT/f.vhd.error.txt"
        "$FLATDISK" umount "$POINT"
        "#,
    );
}

#[test]
fn browse_shows_an_image_below_home_as_long_as_it_is_mounted() {
    script(
        r#"
        export HOME="$T/home" PATH="$T/bin:$PATH"
        mkdir "$HOME" "$T/bin"
        printf '#!/bin/sh\necho "$1" >> "$T/shown"\n' > "$T/bin/xdg-open"
        printf '#!/bin/sh\necho "$*" >> "$T/told"\n' > "$T/bin/notify-send"
        chmod +x "$T/bin/xdg-open" "$T/bin/notify-send"
        until_true() { # COMMAND...: polls for half a minute at most
            tries=0
            until "$@"; do
                tries=$((tries + 1)); [ $tries -lt 3000 ] || { echo "never: $*"; exit 6; }
                sleep 0.01
            done
        }
        POINT="$HOME/flatdisk/a.vhdx"
        flatdisk browse "$IMAGES/a.vhdx" & browser=$!
        until_true test -s "$T/shown"
        [ "$(cat "$T/shown")" = "$POINT" ]
        [ "$(ls "$POINT")" = a.vhdx.img ]
        # The same image again is shown again; another one of that name gets a place of its own.
        flatdisk browse "$IMAGES/a.vhdx"
        shown_twice() { [ "$(sort "$T/shown" | uniq -c | tr -s ' ')" = " 2 $POINT" ]; }
        until_true shown_twice
        mkdir "$T/other"; "$FLATDISK" create -q --size 1M "$T/other/a.vhdx"
        flatdisk browse --read-only "$T/other/a.vhdx" & other=$!
        until_true mountpoint -q "$POINT 2"
        [ "$(stat -c %s:%a "$POINT 2/a.vhdx.img")" = 1048576:444 ]
        umount "$POINT 2"; wait $other
        umount "$POINT"; wait $browser
        [ ! -e "$HOME/flatdisk" ]
        status=0; flatdisk browse "$T/absent.vhd" 2>"$T/err" || status=$?
        [ $status = 32 ]; grep -q absent.vhd "$T/err"; grep -q absent.vhd "$T/told"
        "#,
    );
}
