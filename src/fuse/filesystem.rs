//! `impl fuser::Filesystem`: unpack the request, call the [`Tree`], reply. No decisions.
//!
//! Reads use one page-aligned buffer per thread and one reply; nothing is allocated for them.
//!
//! Whatever may ask the host for something goes through [`Shell::serve`], so that a host that does not
//! answer holds up only those who wait for it.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fmt::Display;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType,
    Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner,
    OpenAccMode, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek,
    ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use zerocopy::{FromBytes, IntoBytes};

use super::daemon::Event;
use super::errno::errno;
use super::lanes::Lanes;
use super::options::MountOptions;
use super::passthrough::Passthrough;
use super::tree::{Attributes, Kind, Tree, Wanted};
use crate::error::{Error, ErrorKind};

/// How long the kernel believes names and attributes: a change of the host's directory shows after
/// that time at the latest.
const TTL: Duration = Duration::from_secs(1);

/// Largest read and write request. The kernel's own limit is 256 pages by default.
pub const MAX_REQUEST: u32 = 1 << 20;

/// Requests that may be under way in the background (read-ahead, asynchronous direct I/O). Above that
/// the kernel holds back the rest, whatever image they are for: a loop device whose image hangs has
/// some 128 of them under way.
const MAX_BACKGROUND: u16 = 1024;

#[derive(FromBytes, IntoBytes, Clone)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

thread_local! {
    static BUFFER: RefCell<Vec<Page>> = const { RefCell::new(Vec::new()) };
}

/// The file system that fuser serves.
pub struct Shell {
    tree: Arc<Tree>,
    lanes: Arc<Lanes>,
    writeback: bool,
    /// Present where the kernel may read by itself.
    passthrough: Option<Arc<Passthrough>>,
    /// Told when the kernel ended the session.
    ended: Sender<Event>,
}

thread_local! {
    /// Tells of the end of this thread, which ends with the session.
    static END: RefCell<Option<End>> = const { RefCell::new(None) };
}

struct End {
    lanes: Arc<Lanes>,
    ended: Sender<Event>,
}

impl Drop for End {
    fn drop(&mut self) {
        self.lanes.end();
        let _ = self.ended.send(Event::Ending);
    }
}

impl Shell {
    /// Serves `tree` by `all` threads, of which `readers` read at a time; `ended` hears of the end of the session.
    pub fn new(
        tree: Arc<Tree>,
        options: &MountOptions,
        readers: usize,
        all: usize,
        ended: Sender<Event>,
    ) -> Self {
        // The kernel would write to the image whatever layer is above it by then.
        let passthrough = options.passthrough && options.nonpersistent.is_none();
        Self {
            tree,
            lanes: Arc::new(Lanes::new(readers, all)),
            writeback: options.writeback,
            passthrough: passthrough.then(Arc::default),
            ended,
        }
    }

    /// Serves a request about inode `ino`: here, or, so that somebody reads on, by another thread.
    fn serve(&self, ino: INodeNo, act: impl FnOnce(&Arc<Tree>) + Send + 'static) {
        self.serve_with(ino, &[], |tree, _| act(tree));
    }

    /// [`Self::serve`] with data that belongs to the request.
    fn serve_with(
        &self,
        ino: INodeNo,
        data: &[u8],
        act: impl FnOnce(&Arc<Tree>, &[u8]) + Send + 'static,
    ) {
        END.with_borrow_mut(|end| {
            end.get_or_insert_with(|| {
                self.lanes.witness();
                End { lanes: self.lanes.clone(), ended: self.ended.clone() }
            });
        });
        if let Some(_serving) = self.lanes.serve() {
            let _work = self.tree.under_way.begin(ino.0);
            return act(&self.tree, data);
        }
        let (tree, data) = (self.tree.clone(), data.to_vec());
        self.lanes.hand_over(move || {
            let _work = tree.under_way.begin(ino.0);
            act(&tree, &data);
        });
    }
}

/// The errno of a failed request, and a line in the log unless the failure is an everyday answer.
fn failed(request: impl Display, error: &Error) -> Errno {
    let errno = errno(error);
    match error.kind() {
        ErrorKind::NotFound => {}
        ErrorKind::Denied | ErrorKind::ReadOnly | ErrorKind::Exists | ErrorKind::Busy => {
            log::info!("{request}: {error}");
        }
        _ if errno == libc::ESTALE || errno == libc::ENOTDIR => {}
        _ => log::error!("{request}: {error}"),
    }
    Errno::from_i32(errno)
}

fn file_attr(attributes: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(attributes.ino),
        size: attributes.size,
        blocks: attributes.blocks,
        atime: attributes.atime,
        mtime: attributes.mtime,
        ctime: attributes.ctime,
        crtime: attributes.ctime,
        kind: file_type(attributes.kind),
        perm: attributes.mode,
        // For a directory 1 says that the number of its folders is not counted.
        nlink: 1,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Folder => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Link => FileType::Symlink,
    }
}

/// Answers a request for an extended attribute, or for their list.
fn reply_xattr(reply: ReplyXattr, size: u32, value: &[u8]) {
    match size {
        0 => reply.size(value.len() as u32),
        size if value.len() > size as usize => reply.error(Errno::ERANGE),
        _ => reply.data(value),
    }
}

impl Filesystem for Shell {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each one is an improvement only; an older kernel goes without.
        for capability in [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            // One request for open(2) with O_TRUNC: who opened the file so is known.
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            // Spares the kernel a question about security.capability before every write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        ] {
            if config.add_capabilities(capability).is_err() {
                log::debug!("the kernel lacks {capability:?}");
            }
        }
        if self.writeback && config.add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE).is_err() {
            log::warn!("the kernel has no write-back cache; writing through");
        }
        if self.passthrough.is_some() {
            // Two levels, so that images may lie on an overlay.
            let possible = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
                && config.set_max_stack_depth(2).is_ok();
            self.passthrough.take_if(|_| !possible);
        }
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn destroy(&mut self) {
        let _ = self.ended.send(Event::Unmounted);
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        self.serve(parent, move |tree| match tree.lookup(parent.0, &name) {
            Ok(found) => reply.entry(&TTL, &file_attr(&found), Generation(0)),
            Err(e) => reply.error(failed("lookup", &e)),
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.tree.forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.serve(ino, move |tree| match tree.attributes(ino.0) {
            Ok(attributes) => reply.attr(&TTL, &file_attr(&attributes)),
            Err(e) => reply.error(failed("stat", &e)),
        });
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.serve(ino, move |tree| {
            let done = size.map_or(Ok(false), |size| tree.truncate(ino.0, fh.map(|fh| fh.0), size));
            let size = |done: bool| size.filter(|_| !done);
            match done.and_then(|done| tree.change(ino.0, size(done), mode, (uid, gid))) {
                Ok(attributes) => reply.attr(&TTL, &file_attr(&attributes)),
                Err(e) => reply.error(failed("change of attributes", &e)),
            }
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        self.serve(ino, move |tree| match tree.link_target(ino.0) {
            Ok(target) => reply.data(target.as_os_str().as_encoded_bytes()),
            Err(e) => reply.error(failed("readlink", &e)),
        });
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        if !super::is_master(req.uid()) {
            return reply.error(Errno::EPERM);
        }
        let (name, target) = (link_name.to_owned(), target.to_owned());
        self.serve(parent, move |tree| match tree.link(parent.0, &name, &target) {
            // Not to be remembered: the next lookup finds a flat file under this name.
            Ok(link) => reply.entry(&Duration::ZERO, &file_attr(&link), Generation(0)),
            Err(e) => reply.error(failed("symlink", &e)),
        });
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if !super::is_master(req.uid()) {
            return reply.error(Errno::EPERM);
        }
        let name = name.to_owned();
        self.serve(parent, move |tree| match tree.unpin(parent.0, &name) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(failed("unlink", &e)),
        });
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let write = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let read = flags.acc_mode() != OpenAccMode::O_WRONLY;
        let truncate = flags.0 & libc::O_TRUNC != 0;
        let passthrough = self.passthrough.clone();
        self.serve(ino, move |tree| {
            if let Some(passthrough) = passthrough.as_ref().filter(|_| truncate) {
                passthrough.wait_for_release(ino.0);
            }
            match tree.open_as(ino.0, Wanted { write, read, truncate }) {
                Ok(opened) => {
                    let mut flags = FopenFlags::empty();
                    flags.set(FopenFlags::FOPEN_KEEP_CACHE, opened.keep_cache);
                    flags.set(FopenFlags::FOPEN_DIRECT_IO, opened.direct);
                    // Nothing to report at the close of a file that was only read.
                    flags.set(FopenFlags::FOPEN_NOFLUSH, !write);
                    flags.set(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES, write);
                    match passthrough {
                        Some(passthrough) if truncate => {
                            if !passthrough.reply_without(reply, ino.0, opened.handle, flags) {
                                let _ = tree.release(ino.0, opened.handle);
                            }
                        }
                        Some(passthrough) => {
                            // Asked at every open: an inode that is passed through stays so, even
                            // when the kernel has refused others since, and writes must be watched.
                            let file = tree.lend(ino.0, write);
                            passthrough.reply(reply, ino.0, opened.handle, flags, file);
                        }
                        None => reply.opened(FileHandle(opened.handle), flags),
                    }
                }
                Err(e) => reply.error(failed("open", &e)),
            }
        });
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.serve(ino, move |tree| {
            BUFFER.with_borrow_mut(|pages| {
                let needed = (size as usize).div_ceil(size_of::<Page>());
                if pages.len() < needed {
                    pages.resize(needed, Page([0; 4096]));
                }
                let buf = &mut pages.as_mut_slice().as_mut_bytes()[..size as usize];
                match tree.read(ino.0, fh.0, offset, buf) {
                    Ok(len) => reply.data(&buf[..len]),
                    Err(e) => {
                        reply
                            .error(failed(format_args!("read of {size} bytes at {offset:#x}"), &e));
                    }
                }
            });
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.serve_with(ino, data, move |tree, data| {
            let reached = tree.reach(ino.0, fh.0, offset, data.len() as u64);
            match reached.and_then(|()| tree.write(ino.0, offset, data)) {
                Ok(len) => reply.written(len as u32),
                Err(e) => {
                    let len = data.len();
                    reply.error(failed(format_args!("write of {len} bytes at {offset:#x}"), &e));
                }
            }
        });
    }

    fn flush(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.serve(ino, move |tree| match tree.flush(ino.0, fh.0) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(failed("close", &e)),
        });
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if let Some(passthrough) = &self.passthrough {
            passthrough.release(ino.0);
        }
        self.serve(ino, move |tree| match tree.release(ino.0, fh.0) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(failed("release", &e)),
        });
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.serve(ino, move |tree| match tree.sync(ino.0) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(failed("fsync", &e)),
        });
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.serve(ino, move |tree| {
            // Reserving space beyond what was written extends a file that is written anew.
            let reached = match mode & libc::FALLOC_FL_KEEP_SIZE {
                0 => tree.reach(ino.0, fh.0, offset.saturating_add(length), 0),
                _ => Ok(()),
            };
            match reached.and_then(|()| tree.allocate(ino.0, offset, length, mode)) {
                Ok(()) => reply.ok(),
                Err(e) => {
                    let request = format_args!("fallocate of {length} bytes at {offset:#x}");
                    reply.error(failed(request, &e));
                }
            }
        });
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let (Ok(offset), libc::SEEK_DATA | libc::SEEK_HOLE) = (u64::try_from(offset), whence)
        else {
            return reply.error(Errno::EINVAL);
        };
        self.serve(ino, move |tree| match tree.seek(ino.0, offset, whence == libc::SEEK_DATA) {
            Ok(Some(offset)) => reply.offset(offset as i64),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(e) => reply.error(failed("lseek", &e)),
        });
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.serve(ino, move |tree| match tree.open_folder(ino.0) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(e) => reply.error(failed("opendir", &e)),
        });
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = match self.tree.entries(fh.0) {
            Ok(entries) => entries,
            Err(e) => return reply.error(failed("readdir", &e)),
        };
        for (i, entry) in entries.iter().enumerate().skip(offset as usize) {
            let kind = file_type(entry.kind);
            if reply.add(INodeNo(entry.ino), i as u64 + 1, kind, &entry.name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.tree.release_folder(fh.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        self.serve(ino, move |tree| match tree.host_space(ino.0) {
            Ok(host) => reply.statfs(
                host.blocks(),
                host.blocks_free(),
                host.blocks_available(),
                host.files(),
                host.files_free(),
                host.block_size() as u32,
                host.name_max() as u32,
                host.fragment_size() as u32,
            ),
            Err(e) => reply.error(failed("statfs", &e)),
        });
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = name.to_owned();
        self.serve(ino, move |tree| match tree.xattr(ino.0, &name) {
            Ok(Some(value)) => reply_xattr(reply, size, &value),
            Ok(None) => reply.error(Errno::NO_XATTR),
            Err(e) => reply.error(failed("getxattr", &e)),
        });
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.serve(ino, move |tree| match tree.xattrs(ino.0) {
            Ok(xattrs) => {
                let mut names = Vec::new();
                for (name, _) in xattrs {
                    names.extend_from_slice(name.as_bytes());
                    names.push(0);
                }
                reply_xattr(reply, size, &names);
            }
            Err(e) => reply.error(failed("listxattr", &e)),
        });
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EOPNOTSUPP);
    }

    // The kernel checks permissions itself (default_permissions), and does the rest of these
    // without us when told that we cannot.

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    // Names are the host's: nothing is made, moved or removed here.

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.unlink(req, parent, name, reply);
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn link(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _newparent: INodeNo,
        _newname: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EROFS);
    }
}
