//! Which images of a folder stand on which.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chain::{file_identity, leads_to};
use super::open::open_alone;
use super::{Id, Identity, ImageInfo, OpenOptions, ParentLink, by_extension, open};
use crate::error::Result;
use crate::storage::staged::is_unfinished;
use crate::storage::{Access, Host};

/// What an image stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stand {
    /// Nothing: it is no child.
    Alone,
    /// The image at this index of the list.
    On(usize),
    /// This image, which is not in the list.
    Outside(PathBuf),
    /// A parent that is not found, with the reason.
    Missing(String),
}

/// An image of a folder.
#[derive(Debug)]
#[non_exhaustive]
pub struct Member {
    /// Its path.
    pub path: PathBuf,
    /// What it says about itself.
    pub info: ImageInfo,
    /// Bytes of host space that its files take.
    pub disk_size: u64,
    /// What it stands on.
    pub stand: Stand,
}

/// The images in the folder `dir`, by name. Files that hold parts of others, and what cannot be opened
/// as an image, are left out.
///
/// # Errors
/// The folder cannot be listed.
pub fn members(host: &Arc<dyn Host>, dir: &Path, options: &OpenOptions) -> Result<Vec<Member>> {
    let peek = OpenOptions { access: Access::Peek, next_identity: None, ..options.clone() };
    let mut paths = host.list(dir)?;
    paths.sort();
    let mut found: Vec<(Member, Identity, Option<ParentLink>)> = Vec::new();
    for path in paths {
        if by_extension(&path).is_none() || path.file_name().is_some_and(is_unfinished) {
            continue;
        }
        let Ok(opened) = open_alone(host, &path, &peek) else { continue };
        let files = std::iter::once(&path).chain(&opened.info.extents);
        let allocated = |file: &PathBuf| host.open(file, Access::Peek).ok()?.allocated().ok();
        let disk_size = files.filter_map(allocated).sum();
        let member = Member { path, info: opened.info, disk_size, stand: Stand::Alone };
        found.push((member, opened.identity, opened.parent));
    }
    let parts: HashSet<PathBuf> =
        found.iter().flat_map(|(member, ..)| member.info.extents.iter().cloned()).collect();
    found.retain(|(member, ..)| !parts.contains(&member.path));

    let mut known: HashMap<Id, Vec<usize>> = HashMap::new();
    for (index, (_, identity, _)) in found.iter().enumerate() {
        for id in identity.keys() {
            known.entry(id).or_default().push(index);
        }
    }
    let stands: Vec<Stand> = found
        .iter()
        .map(|(member, _, link)| {
            let Some(link) = link else { return Stand::Alone };
            let leads = |index: &usize| {
                let Some((other, ..)) = found.get(*index) else { return false };
                other.path != member.path
                    && file_identity(host, &other.path)
                        .is_ok_and(|file| leads_to(host, &member.path, link, file, &peek))
            };
            let keys = link.identity.keys();
            let mut alike = keys.iter().filter_map(|id| known.get(id)).flatten().copied();
            if let Some(index) = alike.find(leads) {
                return Stand::On(index);
            }
            match open(host, &member.path, &peek) {
                Ok(image) => image.parent.map_or(Stand::Alone, |p| Stand::Outside(p.path)),
                Err(e) => Stand::Missing(e.what().to_owned()),
            }
        })
        .collect();
    let members = found.into_iter().zip(stands);
    Ok(members.map(|((member, ..), stand)| Member { stand, ..member }).collect())
}
