//! Parents' names in children: the input is the locator of a VHD (its entry and its data) and the
//! locator item of a VHDX.
#![no_main]

use std::path::Path;
use std::sync::{Arc, LazyLock};

use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host, Storage};
use flatdisk_fuzz::{exercise, images, seal};
use libfuzzer_sys::fuzz_target;

/// Hosts with an image and a child of it.
static CHILDREN: LazyLock<[Arc<MemoryHost>; 2]> = LazyLock::new(|| {
    ["vhd", "vhdx"].map(|format| {
        let (host, path) = images(format).swap_remove(0);
        let dynamic: Arc<dyn Host> = host.clone();
        let options = OpenOptions::new(Access::Read);
        let parent = formats::open(&dynamic, Path::new(&path), &options).expect("an image");
        let child = Path::new("/t/child").with_extension(format);
        let made = match format {
            "vhd" => formats::vhd::create_child(&*host, &child, &parent, None),
            _ => formats::vhdx::create_child(&*host, &child, &parent, &CreateSpec::default()),
        };
        made.expect("a child");
        host
    })
});

const LOCATOR_TYPE: [u8; 4] = [0xb7, 0xef, 0x4a, 0xb0];

fuzz_target!(|data: &[u8]| {
    let Some((&first, rest)) = data.split_first() else { return };
    let vhdx = first & 1 == 1;
    let host = CHILDREN[usize::from(vhdx)].fork();
    let path = Path::new("/t/child").with_extension(if vhdx { "vhdx" } else { "vhd" });
    let file = host.file(&path).expect("the child");
    if vhdx {
        // The item keeps its type; the rest of it is the input.
        let mut bytes = vec![0; 1 << 20];
        let mut at = 0;
        while let Some(data) = file.next_data(at).expect("memory has holes") {
            let len = bytes.len().min((data.end - data.start) as usize);
            file.read_at(data.start, &mut bytes[..len]).expect("inside the file");
            if let Some(found) = bytes[..len].windows(4).position(|w| w == LOCATOR_TYPE) {
                let rest = &rest[..rest.len().min(60_000)];
                file.write_at(data.start + found as u64 + 16, rest).expect("memory takes all");
                break;
            }
            at = data.end;
        }
    } else {
        let (entry, text) = rest.split_at(rest.len().min(24 * 8));
        file.write_at(512 + 576, entry).expect("memory takes all writes");
        let text = &text[..text.len().min(4096)];
        file.write_at(2048, text).expect("memory takes all writes");
        seal(&*file);
    }
    exercise(&host, &path);
});
