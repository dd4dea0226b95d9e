//! The command line's habits: where output goes, what mistakes are told.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use live::{create, flatdisk, outcome, scratch, succeed};

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn version_and_help_are_results() {
    let version = succeed(flatdisk().arg("--version"));
    assert_eq!(version.lines().next(), Some(concat!("flatdisk ", env!("CARGO_PKG_VERSION"))));
    for command in [&[][..], &["mount"], &["check"]] {
        let short = succeed(flatdisk().args(command).arg("-h"));
        let long = succeed(flatdisk().args(command).arg("--help"));
        assert!(!short.contains("Exit status:"), "{short}");
        assert!(long.contains("Examples:") && long.contains("Exit status:"), "{long}");
    }
    let nothing = outcome(&mut flatdisk());
    assert_eq!((nothing.status.code(), nothing.stdout.len()), (Some(1), 0));
}

#[test]
fn colours_come_only_when_wanted() {
    let help = |name: &str, value: &str| {
        outcome(flatdisk().arg("--help").env_remove("NO_COLOR").env(name, value)).stdout
    };
    assert!(!help("LANG", "C").contains(&0x1b));
    assert!(help("CLICOLOR_FORCE", "1").contains(&0x1b));
    let both = outcome(flatdisk().arg("--help").env("NO_COLOR", "1").env("CLICOLOR", "1"));
    assert!(!both.stdout.contains(&0x1b));
}

#[test]
fn json_is_asked_for_in_either_spelling() {
    let dir = scratch();
    let image = dir.path().join("a.vhdx");
    let child = dir.path().join("c.vhdx");
    let created = |spelling: &str, options: &[&Path]| {
        let mut command = flatdisk();
        command.args(["create", spelling]).args(options);
        serde_json::from_str::<serde_json::Value>(&succeed(&mut command)).unwrap()
    };
    let made = created("--json", &["--size=10MB".as_ref(), &image]);
    assert_eq!(made["virtual_size"], 10 << 20);
    let made = created("--output=json", &["--parent".as_ref(), &image, &child]);
    assert_eq!(made["parent"].as_str(), image.to_str());
    for command in [&["info"][..], &["info", "--chain"], &["check"], &["map"]] {
        let answer = |spelling| succeed(flatdisk().args(command).arg(spelling).arg(&child));
        assert_eq!(answer("--json"), answer("--output=json"));
        serde_json::from_str::<serde_json::Value>(&answer("-J")).unwrap();
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error_and_a_full_disk_is_one() {
    let dir = scratch();
    let image = dir.path().join("a.vhd");
    create(&image, "1G", &[]);
    for arguments in [&["completions", "bash"][..], &["map", image.to_str().unwrap()]] {
        let mut child = flatdisk()
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = flatdisk().args(arguments).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("no space left on device"), "{}", stderr(&output));
    }
}

#[test]
fn common_mistakes_are_told_in_one_line() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    create(path("a.vhd").as_ref(), "1M", &[]);
    std::fs::write(path("text"), "no image").unwrap();
    std::fs::write(path("empty.vhd"), "").unwrap();
    let (image, text, empty, absent, folder) =
        (path("a.vhd"), path("text"), path("empty.vhd"), path("absent.vhd"), path(""));
    let told = |arguments: &[&str], status: i32, what: &str| {
        let output = outcome(flatdisk().args(arguments));
        let said = stderr(&output);
        assert!(said.contains(what), "{arguments:?}: {said}");
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty() && said.lines().count() == 1, "{arguments:?}: {said}");
        assert!(said.starts_with("flatdisk: "), "{arguments:?}: {said}");
    };
    for command in ["info", "check", "map"] {
        told(&[command, &absent], 1, "no such file or directory");
        told(&[command, &folder], 1, "this is a directory, not an image");
        told(&[command, &text], 1, "not a VHD, VHDX or VMDK image");
    }
    told(&["info", &empty], 1, "the file is empty");
    told(&["create", "--size=1M", &image], 1, "file exists");
    told(&["create", "--size=1M", &path("x")], 1, "use --format");
    told(&["create", "--size=1000", &path("x.vhd")], 1, "not a multiple of 512");
    told(&["create", "--size=1M", &path("no/x.vhd")], 1, "no such file or directory");
    told(&["sync", &folder], 1, "not in a mount of flatdisk");
    told(&["umount", &folder], 32, "not mounted");
    told(&["commit", &image], 1, "no parent");
    told(&["install-helpers", "--prefix=usr"], 1, "must be an absolute path");
    if live::can_mount() {
        told(&["mount", &absent, &folder], 32, "no such file or directory");
        told(&["mount", &image, &absent], 32, "create the directory first");
        told(&["mount", &folder, &image], 32, "the mount point comes last");
        told(&["mount", &text, &folder], 32, "not a VHD, VHDX or VMDK image");
        told(&["mount", "-o", "nonsense", &image, &folder], 1, "unknown mount option `nonsense`");
    }
    // The parser's own, with its advice.
    let output = outcome(Command::new(env!("CARGO_BIN_EXE_flatdisk")).arg("inof"));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("'info'"), "{}", stderr(&output));
}

fn parsed(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", stderr(output)))
}

#[test]
fn failures_are_json_where_json_is_wanted() {
    let dir = scratch();
    let absent = dir.path().join("absent.vhd");
    let text = dir.path().join("text");
    std::fs::write(&text, "no image").unwrap();
    for command in [&["info", "--json"][..], &["check", "--output=json"], &["map", "-J"]] {
        let output = outcome(flatdisk().args(command).arg(&absent));
        assert_eq!(output.status.code(), Some(1));
        let failure = parsed(&output);
        assert_eq!(failure["kind"], "not_found", "{command:?}: {failure}");
        assert_eq!(failure["file"].as_str(), absent.to_str());
        assert!(failure["what"].as_str().unwrap().contains("no such file"));
        assert!(failure.get("offset").is_some() && failure.get("hint").is_some());
        assert_eq!(stderr(&output).lines().count(), 1);
    }
    let failure = parsed(&outcome(flatdisk().args(["create", "--json", "-s1M"]).arg(&text)));
    assert_eq!(
        (&failure["kind"], &failure["hint"]),
        (&"invalid_input".into(), &"use --format".into())
    );
}

#[test]
fn wrong_arguments_and_failed_mounts_are_json_where_json_is_wanted() {
    let dir = scratch();
    let folder = dir.path().to_str().unwrap();
    let absent = dir.path().join("absent.vhd");
    let absent = absent.to_str().unwrap();
    let failure = |arguments: &[&str], status: i32| {
        let output = outcome(flatdisk().args(arguments));
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {}", stderr(&output));
        let failure = parsed(&output);
        assert!(failure["what"].is_string(), "{failure}");
        failure
    };
    assert_eq!(failure(&["info", "--json", "--nonsense"], 1)["kind"], "invalid_input");
    assert_eq!(failure(&["check", "-J"], 1)["kind"], "invalid_input");
    assert_eq!(failure(&["inof", "--output=json"], 1)["kind"], "invalid_input");
    let failed = failure(&["umount", "--json", folder], 32);
    assert_eq!((&failed["kind"], failed["file"].as_str()), (&"not_found".into(), Some(folder)));
    if live::can_mount() {
        let mount = ["mount", "--json", "-o", "nonsense", absent, folder];
        assert_eq!(failure(&mount, 1)["kind"], "invalid_input");
        let failed = failure(&["mount", "--json", absent, folder], 32);
        assert_eq!((&failed["kind"], failed["file"].as_str()), (&"not_found".into(), Some(absent)));
        let image = dir.path().join("a.vhd");
        create(&image, "1M", &[]);
        let point = scratch();
        let run =
            |arguments: &[&str]| parsed(&outcome(flatdisk().args(arguments).arg(point.path())));
        let _mounting = live::mounting();
        let mounted = run(&["mount", "--json", image.to_str().unwrap()]);
        assert_eq!(mounted["mountpoint"].as_str(), point.path().to_str());
        let unmounted = run(&["umount", "--json"]);
        assert_eq!(unmounted["mounts"][0]["unmounted"], true);
    }
}

#[test]
fn a_name_that_says_another_format_is_remarked_and_the_image_is_made() {
    let dir = scratch();
    let image = |name: &str| dir.path().join(name);
    let mut create = flatdisk();
    create.args(["create", "-q", "-O", "vhd", "-s1M"]).arg(image("x.vhdx"));
    let mut convert = flatdisk();
    convert.args(["convert", "-q", "-O", "vhd"]).args([image("x.vhdx"), image("y.vhdx")]);
    for (mut command, made) in [(create, "x.vhdx"), (convert, "y.vhdx")] {
        let output = outcome(&mut command);
        assert!(output.status.success());
        let said = stderr(&output);
        assert!(said.contains("a VHD with the extension of a VHDX") && said.lines().count() == 1);
        let info = succeed(flatdisk().arg("info").arg(image(made)));
        assert!(info.contains("VHD dynamic"), "{info}");
    }
}

#[test]
fn several_images_are_looked_at_and_the_worst_counts() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    create(&path("a.vhdx"), "4M", &[]);
    create(&path("b.vhd"), "4M", &[]);
    std::fs::write(path("text"), "no image").unwrap();
    let run = |arguments: &[&str], images: &[&str]| {
        outcome(flatdisk().args(arguments).args(images.iter().map(|name| path(name))))
    };
    for command in ["info", "check"] {
        let good = run(&[command, "--json"], &["a.vhdx", "b.vhd"]);
        assert_eq!(good.status.code(), Some(0));
        let names: Vec<_> = parsed(&good)["images"]
            .as_array()
            .unwrap()
            .iter()
            .map(|image| image["filename"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(names, [path("a.vhdx"), path("b.vhd")].map(|p| p.to_str().unwrap().to_owned()));
        let mixed = run(&[command], &["a.vhdx", "text", "b.vhd"]);
        assert_eq!(mixed.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&mixed.stdout).contains("b.vhd"));
        assert!(stderr(&mixed).contains("not a VHD, VHDX or VMDK image"));
    }
    let failed = parsed(&run(&["info", "-J"], &["text", "a.vhdx"]));
    assert_eq!(failed["failures"][0]["kind"], "not_this_format");
    assert_eq!(failed["images"].as_array().unwrap().len(), 1);
    // Errors outweigh none.
    let mut bytes = std::fs::read(path("b.vhd")).unwrap();
    bytes.truncate(1500);
    std::fs::write(path("b.vhd"), bytes).unwrap();
    assert_eq!(run(&["check"], &["b.vhd", "a.vhdx"]).status.code(), Some(2));
    assert_eq!(run(&["check"], &["b.vhd", "text", "a.vhdx"]).status.code(), Some(1));
}

#[test]
fn an_image_in_the_place_of_a_command_gets_advice() {
    let dir = scratch();
    create(&dir.path().join("a.vhd"), "1M", &[]);
    for (arguments, advice) in
        [(vec![], "flatdisk info IMAGE"), (vec!["mount"], "mount point comes last")]
    {
        let output = outcome(flatdisk().current_dir(dir.path()).args(&arguments).arg("a.vhd"));
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(advice), "{}", stderr(&output));
    }
}

#[test]
fn a_map_in_json_is_that_of_qemu_img() {
    if !live::have(&["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = scratch();
    let run = |program: &str, arguments: &[&str]| {
        succeed(Command::new(program).args(arguments).current_dir(dir.path()))
    };
    run("qemu-img", &["create", "-q", "-fvmdk", "base.vmdk", "8M"]);
    let writes = ["-c", "write -P5 1M 100k", "-c", "write -P6 5M 64k", "-c", "write -P7 3M 1M"];
    run("qemu-io", &[&["-fvmdk"][..], &writes, &["base.vmdk"]].concat());
    run("qemu-img", &["create", "-q", "-fvmdk", "-bbase.vmdk", "-Fvmdk", "top.vmdk"]);
    run("qemu-io", &["-fvmdk", "-c", "write -P8 2M 64k", "-c", "write -P9 3M 64k", "top.vmdk"]);
    let keys = ["start", "length", "depth", "present", "zero", "data", "compressed", "offset"];
    for image in ["base.vmdk", "top.vmdk"] {
        let runs = |text: String| {
            let runs: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
            runs.iter().map(|run| keys.map(|key| run[key].clone())).collect::<Vec<_>>()
        };
        let theirs = runs(run("qemu-img", &["map", "--output=json", "-fvmdk", image]));
        let ours = runs(run(env!("CARGO_BIN_EXE_flatdisk"), &["map", "--json", image]));
        assert_eq!(ours, theirs, "{image}");
    }
}

#[test]
fn quiet_commands_print_nothing() {
    let dir = scratch();
    create(&dir.path().join("a.vhdx"), "4M", &[]);
    create(&dir.path().join("b.vhdx"), "4M", &[]);
    for command in [
        &["create", "-q", "--parent", "a.vhdx", "c.vhdx"][..],
        &["rebase", "-q", "c.vhdx", "--parent", "b.vhdx"],
        &["commit", "-q", "c.vhdx"],
        &["check", "-q", "a.vhdx", "b.vhdx"],
        &["install-helpers", "-q", "--root", "root", "--prefix", "/usr"],
    ] {
        let output = outcome(flatdisk().current_dir(dir.path()).args(command));
        assert!(output.status.success(), "{command:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{command:?}");
    }
}
