//! Children: disks that hold only what was written since they were made, and show their parent for
//! the rest. Always sparse, and of the family of their parent: hosted programs take hosted chains,
//! ESX takes its own.

use std::path::Path;

use crate::error::{Error, Result};
use crate::formats::references::{rooted, way};
use crate::formats::{CreateSpec, Identity, Image};
use crate::storage::Host;

use super::cowd;
use super::create::{
    MadeFiles, NewDescriptor, base_name, file_name, grain, split, split_size, write_sparse,
    write_text,
};
use super::layout::SECTOR;

/// Makes a child of `parent` at `path`, which does not exist. The parent is not touched; from now on
/// it must not be written.
pub fn create_child(host: &dyn Host, path: &Path, parent: &Image, spec: &CreateSpec) -> Result<()> {
    let Identity::VmdkCid(cid) = parent.identity else {
        return Err(Error::invalid("the parent of a VMDK is a VMDK"));
    };
    if parent.info.details["cid"].is_null() {
        return Err(Error::invalid("the parent has no CID by which a child could know it"));
    }
    let hint = hint(path, &parent.path)?;
    let grain = grain(spec, true)?;
    let sectors = parent.disk.size() / SECTOR;
    let stem = base_name(path)?;
    let long_cid = match parent.info.details["ddb"]["longContentID"].as_str() {
        Some(long) => long.to_owned(),
        None => format!("{:024x}{cid:08x}", fastrand::u128(..) >> 32),
    };
    let text = |create_type: &str, extents: &[String]| {
        let descriptor = NewDescriptor {
            create_type,
            cid,
            long_cid: long_cid.clone(),
            parent: Some((cid, &hint)),
            extents,
            ddb: Vec::new(),
        };
        descriptor.text()
    };
    let mut made = MadeFiles::new(host);
    // Without zeroed grains whatever a guest discards is stored as zeroes, to hide the parent's data.
    let zeroed = spec.zeroed_grains.unwrap_or(true);
    match child_type(parent, spec)? {
        "vmfsSparse" => {
            let name = format!("{stem}-delta.vmdk");
            if spec.block_size.is_some() || spec.zeroed_grains == Some(true) {
                return Err(Error::invalid("a vmfsSparse child has no grains to choose"));
            }
            let extent = made.create(&path.with_file_name(&name))?;
            cowd::write_new(&*extent, sectors, &name, None)?;
            let line = format!("RW {sectors} VMFSSPARSE \"{name}\"");
            write_text(&*made.create(path)?, &text("vmfsSparse", &[line]))?;
        }
        "twoGbMaxExtentSparse" => {
            let mut lines = Vec::new();
            for (number, size) in (1..).zip(split(sectors, split_size(spec, true)?)) {
                let name = format!("{stem}-s{number:03}.vmdk");
                let extent = made.create(&path.with_file_name(&name))?;
                write_sparse(&*extent, size, grain, zeroed, None)?;
                lines.push(format!("RW {size} SPARSE \"{name}\""));
            }
            write_text(&*made.create(path)?, &text("twoGbMaxExtentSparse", &lines))?;
        }
        _ => {
            let line = format!("RW {sectors} SPARSE \"{}\"", file_name(path)?);
            let text = text("monolithicSparse", &[line]);
            write_sparse(&*made.create(path)?, sectors, grain, zeroed, Some(&text))?;
        }
    }
    made.keep(path)
}

/// What kind of child `parent` gets: of the parent's family unless `spec` says another. Programs take
/// no chains of both families.
fn child_type(parent: &Image, spec: &CreateSpec) -> Result<&'static str> {
    let family = parent.info.subformat.to_ascii_lowercase();
    let esx = family.starts_with("vmfs") || family == "sesparse";
    let usual = match () {
        () if esx => "vmfsSparse",
        () if family.contains("gbmaxextent") => "twoGbMaxExtentSparse",
        () => "monolithicSparse",
    };
    let Some(wanted) = &spec.subformat else { return Ok(usual) };
    let children: &[&str] =
        if esx { &["vmfsSparse"] } else { &["monolithicSparse", "twoGbMaxExtentSparse"] };
    children.iter().copied().find(|known| known.eq_ignore_ascii_case(wanted)).ok_or_else(|| {
        let what = format!("a {} disk has no child of type {wanted}", parent.info.subformat);
        Error::invalid(what).hint(children.join(", "))
    })
}

/// How the child at `path` names its parent: from its own directory on, so that both can be moved
/// together, unless they have no directory in common.
pub fn hint(path: &Path, parent: &Path) -> Result<String> {
    let (child, parent) = (rooted(path), rooted(parent));
    let common = child.components().zip(parent.components()).take_while(|(a, b)| a == b).count();
    let way = way(&child, &parent);
    let name = match way.strip_prefix(".") {
        Ok(below) => below,
        Err(_) if common > 1 => &way,
        // Only the root is common.
        Err(_) => &parent,
    };
    match name.to_str() {
        Some(name) if !name.contains('"') && !name.chars().any(char::is_control) => {
            Ok(name.to_owned())
        }
        _ => Err(Error::invalid("a descriptor cannot hold the parent's file name")),
    }
}
