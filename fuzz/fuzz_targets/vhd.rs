//! VHD images, patched anywhere.
#![no_main]

use std::sync::LazyLock;

use flatdisk_fuzz::{Images, images, patched};
use libfuzzer_sys::fuzz_target;

static IMAGES: Images = LazyLock::new(|| images("vhd"));

fuzz_target!(|data: &[u8]| patched(&IMAGES, data));
