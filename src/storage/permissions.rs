//! Permission bits, access lists included: what everybody of a class may do at least.

use std::fs::Metadata;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use nix::sys::stat::fstat;

use super::user::{User, in_group};

/// Where the kernel keeps POSIX access lists.
const ACCESS_LIST: &str = "system.posix_acl_access";

/// What somebody wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// Read a file or list a directory.
    Read,
    /// Read and write a file.
    Write,
    /// Go through a directory.
    Search,
}

/// Owner, group and permission bits of a file or directory. Where it has an access list, a class has only
/// what the list gives to everybody in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permissions {
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Nine bits.
    pub mode: u16,
}

/// The permissions of an open file, or of what a descriptor stands for.
pub fn of(fd: BorrowedFd<'_>) -> io::Result<Permissions> {
    let stat = fstat(fd)?;
    let mode = stat.st_mode as u16 & 0o777;
    // The kernel answers for mere places only by this way.
    let list = xattr::get_deref(format!("/proc/self/fd/{}", fd.as_raw_fd()), ACCESS_LIST);
    let mode = match list {
        Ok(None) => mode,
        Ok(Some(list)) => least(mode, &list),
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => mode,
        Err(_) => mode & 0o700,
    };
    Ok(Permissions { uid: stat.st_uid, gid: stat.st_gid, mode })
}

impl Permissions {
    /// Those in a file's metadata, without access lists.
    pub fn of(meta: &Metadata) -> Self {
        Self { uid: meta.uid(), gid: meta.gid(), mode: meta.mode() as u16 & 0o777 }
    }

    /// Root's alone.
    pub const NONE: Self = Self { uid: 0, gid: 0, mode: 0 };

    /// Whether `user` may do what it wishes.
    pub(super) fn allow(&self, user: &User, wish: Wish) -> bool {
        let bits = match wish {
            Wish::Read => 4,
            Wish::Write => 6,
            Wish::Search => 1,
        };
        let class = match () {
            () if user.uid == self.uid => 6,
            () if user.has_group(self.gid) => 3,
            () => 0,
        };
        (self.mode >> class) & bits == bits
    }

    /// As these, where whoever may read may do all that matters.
    pub fn readable(self) -> Self {
        Self { mode: self.mode & 0o444 | (self.mode & 0o444) >> 1, ..self }
    }

    /// As these, where whoever may go through a directory may do all that matters.
    pub fn searchable(self) -> Self {
        Self { mode: (self.mode & 0o111) * 7, ..self }
    }

    /// Who may read: the bits for that.
    pub fn readers(self) -> u16 {
        self.mode & 0o444
    }

    /// What is left of these permissions where `other` must allow the same. Owner and group stay
    /// these.
    pub fn and(self, other: &Self) -> Self {
        let bits = |class: u32| (other.mode >> class) & 7;
        let owner = match () {
            () if self.uid == 0 => 7,
            () if self.uid == other.uid => bits(6),
            () if in_group(self.uid, other.gid) => bits(3),
            () => bits(0),
        };
        // Among those whom a class has here, there may be some of each class there.
        let group = if self.gid == other.gid { bits(3) } else { bits(3) & bits(0) };
        let rest = if self.gid == other.gid { bits(0) } else { bits(3) & bits(0) };
        Self { mode: self.mode & (owner << 6 | group << 3 | rest), ..self }
    }
}

/// Mode bits of a file with an access list, whose classes are mixed: the list names users and groups
/// one by one, and the group's bits in the mode are the most that any of these get.
fn least(mode: u16, list: &[u8]) -> u16 {
    const VERSION: u32 = 2;
    const NAMED_USER: u16 = 0x02;
    const GROUP: u16 = 0x04;
    const NAMED_GROUP: u16 = 0x08;
    let Some((version, entries)) = list.split_first_chunk::<4>() else { return mode & 0o700 };
    if u32::from_le_bytes(*version) != VERSION {
        return mode & 0o700;
    }
    let mask = (mode >> 3) & 7;
    let (mut group, mut named) = (0, 7);
    for entry in entries.chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let bits = u16::from_le_bytes([entry[2], entry[3]]) & mask;
        match tag {
            GROUP => group = bits,
            NAMED_USER | NAMED_GROUP => named &= bits,
            _ => {}
        }
    }
    mode & 0o700 | (group & named) << 3 | mode & named
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permissions(uid: u32, gid: u32, mode: u16) -> Permissions {
        Permissions { uid, gid, mode }
    }

    #[test]
    fn of_two_files_nobody_gets_what_one_of_them_denies() {
        // Users and groups that no host knows.
        let (alice, bob, staff, other) =
            (3_000_000_001, 3_000_000_002, 3_000_000_003, 3_000_000_004);
        let both = |a: Permissions, b: Permissions| a.and(&b).mode;
        let own = permissions(bob, staff, 0o664);
        assert_eq!(both(own, permissions(bob, staff, 0o640)), 0o640);
        assert_eq!(both(own, permissions(bob, staff, 0o600)), 0o600);
        assert_eq!(both(own, permissions(alice, staff, 0o600)), 0o000);
        // The owner of the first is a stranger to the second, as may be anybody of its group.
        assert_eq!(both(own, permissions(alice, staff, 0o644)), 0o444);
        assert_eq!(both(own, permissions(alice, other, 0o604)), 0o400);
        assert_eq!(both(own, permissions(alice, other, 0o640)), 0o000);
        assert_eq!(both(own, permissions(bob, other, 0o646)), 0o644);
        assert_eq!(both(own, permissions(0, 0, 0o666)), 0o664);
    }

    #[test]
    fn an_access_list_gives_a_class_what_all_of_it_have() {
        let list = |entries: &[(u16, u16)]| {
            let mut list = 2u32.to_le_bytes().to_vec();
            for (tag, bits) in entries {
                list.extend(tag.to_le_bytes());
                list.extend(bits.to_le_bytes());
                list.extend([0; 4]);
            }
            list
        };
        // user::rw- user:x:r-- group::--- mask::r-- other::---
        assert_eq!(least(0o640, &list(&[(1, 6), (2, 4), (4, 0), (16, 4), (32, 0)])), 0o600);
        // user::rw- group::rw- mask::r-- other::r--
        assert_eq!(least(0o644, &list(&[(1, 6), (4, 6), (16, 4), (32, 4)])), 0o644);
        // One user is denied what all others have.
        assert_eq!(least(0o644, &list(&[(1, 6), (2, 0), (4, 4), (16, 4), (32, 4)])), 0o600);
        assert_eq!(least(0o644, b"?"), 0o600);
    }
}
