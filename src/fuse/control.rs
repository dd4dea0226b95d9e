//! The control socket: how `umount`, `sync`, `status`, `open` and `close` reach a running daemon.
//!
//! One socket per mount, named after the mount's device number, in a directory that only the
//! daemon's user can enter; the daemon also asks the kernel who is calling. A request and its answer
//! are one line of JSON each.
//!
//! The kernel gives a device number to a new mount as soon as the old one has gone, while the old
//! daemon may still be closing images. So a socket's name may have passed to another daemon.
//!
//! Leaving is the exception: after the answer (everything is flushed) the connection stays open
//! while the caller unmounts, and a second answer comes when every image is closed. umount(2) alone
//! waits for neither.
//!
//! Every question has a time limit, on both sides. A daemon names the images that do not answer it in
//! time; a caller names a daemon that does not, be it stopped, or a program of a user's that only looks
//! like one. Nothing of another user's is opened that a file system of his could make hang.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, getsockopt, setsockopt, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::geteuid;
use parking_lot::Mutex;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use super::image::FixedRun;
use super::mounts::{self, MountEntry};
use super::tree::{ROOT, Tree};
use super::under_way::NO_INODE;
use super::{Mounted, is_master};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::names::Name;
use crate::storage::remembered::identity;
use crate::storage::{FileIdentity, archive};

/// Longest request or answer in bytes.
const MAX_LINE: u64 = 16 << 20;

/// How long after the mount the socket may come.
const SOCKET_DELAY: Duration = Duration::from_secs(2);

/// How long a daemon may take to answer, besides the work that is asked of it.
const ANSWER: Duration = Duration::from_secs(2);

/// How long a daemon may take to open or close images.
const OPENING: Duration = Duration::from_secs(60);

/// How long a daemon may take to copy a throw-away layer.
const KEEPING: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a caller may take to send its request, or to take its answer.
const CALLER: Duration = Duration::from_secs(30);

/// How often a caller that waits looks whether the daemon was stopped.
const LOOK: Duration = Duration::from_millis(200);

/// How long to wait for descriptors or threads that are used up.
const PAUSE: Duration = Duration::from_millis(100);

/// What a daemon can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Flush every image.
    Sync {
        /// How long that may take.
        patience: Duration,
    },
    /// Describe the mount.
    Status,
    /// Flush every image, and say when all are closed.
    Leave {
        /// How long the flush may take.
        patience: Duration,
    },
    /// Show more images in the root.
    Open {
        /// Absolute paths.
        images: Vec<Name>,
        /// Their partitions, too.
        #[serde(default)]
        partitions: bool,
        /// Where what is written goes, if not to the images.
        #[serde(default)]
        throw_away: Option<Name>,
    },
    /// Take images out of the root.
    Close {
        /// Their names in the root.
        names: Vec<Name>,
        /// Where a child is made first that holds what was written to the throw-away layer of the only one.
        #[serde(default)]
        keep: Option<Name>,
    },
    /// Give the host's file to a loop device, if a disk lies in it in one piece. The connection stays open
    /// until the device is bound; see [`Connection::borrow_file`].
    Give {
        /// Name of the flat file in the root.
        name: Name,
        /// Whether the device can be written.
        write: bool,
    },
}

impl Request {
    /// How long the answer may take.
    fn patience(&self) -> Duration {
        match self {
            Self::Sync { patience } | Self::Leave { patience } => *patience + ANSWER,
            Self::Status => ANSWER,
            Self::Close { keep: Some(_), .. } => KEEPING,
            Self::Open { .. } | Self::Close { .. } | Self::Give { .. } => OPENING,
        }
    }
}

/// A daemon's answer.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// What went wrong, a line each.
    pub errors: Vec<String>,
    /// Names of the images opened.
    pub names: Vec<Name>,
    /// The mount, if that was the question.
    pub status: Option<MountStatus>,
    /// Where the disk lies in the file that comes with the answer, if that was the question.
    #[serde(default)]
    pub run: Option<Run>,
}

/// A disk in one piece in a host file.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Run {
    /// Byte of the file that is the disk's first.
    pub at: u64,
    /// Bytes of the disk.
    pub len: u64,
    /// Bytes per logical sector.
    pub sector_size: u32,
}

/// A mount, as `flatdisk status --json` shows it.
#[derive(Debug, Serialize, Deserialize)]
pub struct MountStatus {
    /// Where it is mounted.
    #[serde(with = "crate::names")]
    pub mountpoint: PathBuf,
    /// What is mounted.
    pub source: String,
    /// The daemon's process id.
    pub pid: u32,
    /// Whether nothing can be written.
    pub read_only: bool,
    /// Whether the kernel has ended the session and images are being closed.
    pub ending: bool,
    /// The images in use.
    pub images: Vec<ImageStatus>,
    /// What failed to reach its image.
    pub failures: Vec<String>,
}

/// An image in use.
#[derive(Debug, Serialize, Deserialize)]
pub struct ImageStatus {
    /// The image.
    #[serde(with = "crate::names")]
    pub image: PathBuf,
    /// Bytes per logical sector of its disk.
    pub sector_size: u32,
    /// Files open for reading.
    pub readers: u32,
    /// Files open for writing.
    pub writers: u32,
    /// Whether writes wait for a flush.
    pub unflushed: bool,
    /// Why it cannot be written through the mount, if it cannot.
    pub read_only: Option<String>,
    /// The images it stands on, nearest first.
    pub parents: Vec<Name>,
    /// Bytes that vanish when the image is closed, in a `nonpersistent` mount.
    pub throw_away: Option<u64>,
    /// Table pages in memory.
    pub table_pages: u64,
    /// Table pages that wait for a flush.
    pub dirty_tables: u64,
    /// Table lookups answered from memory.
    pub cache_hits: u64,
    /// Table lookups that read the image.
    pub cache_misses: u64,
    /// For how many seconds something that was asked of it has not been answered, if that is long.
    pub silent_seconds: Option<u64>,
    /// "deleted" or "replaced": what became of the image's name while the image is open.
    pub displaced: Option<String>,
}

/// The directory for sockets, and whatever else must not outlive the machine's uptime: private to
/// this process's user, made if need be.
pub fn runtime_dir() -> Result<PathBuf> {
    let user = geteuid().as_raw();
    let dir = socket_dir(user);
    let made = fs::DirBuilder::new().mode(0o700).recursive(true).create(&dir);
    made.map_err(|e| Error::io("create", &e).in_file(&dir))?;
    check_dir(&dir, user)?;
    Ok(dir)
}

/// The directory of a user's sockets.
fn socket_dir(user: u32) -> PathBuf {
    if user == 0 {
        return PathBuf::from("/run/flatdisk");
    }
    if user == geteuid().as_raw()
        && let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty())
    {
        return Path::new(&dir).join("flatdisk");
    }
    let run = PathBuf::from(format!("/run/user/{user}"));
    if run.is_dir() {
        return run.join("flatdisk");
    }
    PathBuf::from(format!("/tmp/flatdisk-{user}"))
}

fn socket_name(device: &str) -> String {
    format!("{}.sock", device.replace(':', "-"))
}

/// Refuses a directory that others could have prepared.
fn check_dir(dir: &Path, user: u32) -> Result<()> {
    let meta = fs::symlink_metadata(dir).map_err(|e| Error::io("open", &e).in_file(dir))?;
    if meta.is_dir() && meta.uid() == user && meta.mode() & 0o077 == 0 {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Denied, format!("not a private directory of user {user}"))
        .in_file(dir))
}

/// Keeps other daemons from making or removing sockets for as long as the answer lives.
fn lock_dir(dir: &Path) -> Result<Flock<File>> {
    let file = File::open(dir).map_err(|e| Error::io("open", &e).in_file(dir))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, e)| Error::io("lock", &e.into()).in_file(dir))
}

fn send(stream: &mut UnixStream, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// [`send`], with a file.
fn send_file(stream: &mut UnixStream, value: &impl Serialize, file: &File) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&files));
    let sent = sendmsg(&*stream, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL)?;
    stream.write_all(&line[sent..])
}

/// Reads what comes next, and the file that comes with it, if one does.
fn read_with_file(stream: &UnixStream, part: &mut [u8]) -> io::Result<(usize, Option<File>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(stream, &mut [IoSliceMut::new(part)], &mut control, flags)?;
    let mut file = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            file = files.map(File::from).last();
        }
    }
    Ok((received.bytes, file))
}

fn receive<T: for<'a> Deserialize<'a>>(stream: &UnixStream) -> io::Result<T> {
    let mut line = String::new();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&line)?)
}

// The daemon's side

/// What the socket gives access to.
pub struct Service {
    /// The tree.
    pub tree: Arc<Tree>,
    /// The mount.
    pub mounted: Mounted,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// What is mounted.
    pub source: String,
    /// Whether nothing can be written.
    pub read_only: bool,
    /// Whether the kernel has ended the session.
    pub ending: Arc<AtomicBool>,
}

/// A daemon's socket, removed by [`Server::finish`].
pub struct Server {
    path: PathBuf,
    identity: FileIdentity,
    /// Who waits for the images to be closed; `None` once they are.
    waiting: Arc<Mutex<Option<Vec<UnixStream>>>>,
}

impl Server {
    /// Listens for requests about the mount whose device number is `device`.
    pub fn start(device: &str, service: Service) -> Result<Self> {
        let dir = runtime_dir()?;
        let path = dir.join(socket_name(device));
        let (listener, identity) =
            listen(&dir, &path).map_err(|e| Error::io("listen", &e).in_file(&path))?;
        let waiting = Arc::new(Mutex::new(Some(Vec::new())));
        let server = Self { path, identity, waiting: waiting.clone() };
        let service = Arc::new(service);
        let serve = move || {
            for stream in listener.incoming() {
                let (service, waiting) = (service.clone(), waiting.clone());
                let served = stream.map(|stream| serve_apart(&service, stream, &waiting));
                if let Err(e) = served {
                    // Descriptors are used up, and will be for a moment.
                    log::warn!("control socket: {e}");
                    thread::sleep(PAUSE);
                }
            }
        };
        thread::Builder::new()
            .name("control".into())
            .spawn(serve)
            .map_err(|e| Error::io("starting a thread", &e))?;
        Ok(server)
    }

    /// Every image is closed: tells those who wait.
    pub fn finish(self, failures: Vec<String>) {
        self.remove();
        let answer = Answer { errors: failures, ..Answer::default() };
        for mut stream in self.waiting.lock().take().unwrap_or_default() {
            let _ = send(&mut stream, &answer);
        }
    }

    fn remove(&self) {
        let _locked = lock_dir(self.path.parent().unwrap_or(Path::new("/")));
        let own = fs::symlink_metadata(&self.path).map(|meta| identity(&meta) == self.identity);
        if own.unwrap_or(false) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Serves a caller by a thread of his own; here, if there is none to be had.
fn serve_apart(
    service: &Arc<Service>,
    stream: UnixStream,
    waiting: &Arc<Mutex<Option<Vec<UnixStream>>>>,
) {
    let stream = Arc::new(Mutex::new(Some(stream)));
    let (theirs, apart, waits) = (stream.clone(), service.clone(), waiting.clone());
    let begun = thread::Builder::new().spawn(move || {
        let stream = theirs.lock().take();
        stream.into_iter().for_each(|stream| apart.serve(stream, &waits));
    });
    if begun.is_err() {
        let stream = stream.lock().take();
        stream.into_iter().for_each(|stream| service.serve(stream, waiting));
    }
}

/// Makes the socket at `path` in `dir`.
fn listen(dir: &Path, path: &Path) -> io::Result<(UnixListener, FileIdentity)> {
    let _locked = lock_dir(dir);
    // The number belongs to a live mount of ours: who had a socket of that name has lost it.
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok((listener, identity(&fs::symlink_metadata(path)?)))
}

impl Service {
    fn serve(&self, mut stream: UnixStream, waiting: &Mutex<Option<Vec<UnixStream>>>) {
        let caller = getsockopt(&stream, sockopt::PeerCredentials).map(|peer| peer.uid());
        if !caller.is_ok_and(is_master) {
            let errors = vec!["only the daemon's user and root may do this".into()];
            let _ = send(&mut stream, &Answer { errors, ..Answer::default() });
            return;
        }
        // A caller that falls silent must not keep a thread.
        let limits = stream.set_read_timeout(Some(CALLER));
        let limits = limits.and_then(|()| stream.set_write_timeout(Some(CALLER)));
        if let Err(e) = limits {
            return log::warn!("control socket: {e}");
        }
        let request = match receive(&stream) {
            Ok(request) => request,
            Err(e) => {
                let errors = vec![format!("not a request: {e}")];
                let _ = send(&mut stream, &Answer { errors, ..Answer::default() });
                return;
            }
        };
        if let Request::Give { name, write } = &request {
            return self.give(stream, name.as_os_str(), *write);
        }
        let leaving = matches!(request, Request::Leave { .. });
        let answer = self.answer(request);
        // In the list before the caller can unmount, so that its second answer cannot be missed.
        let mut waiting = waiting.lock();
        if send(&mut stream, &answer).is_ok()
            && leaving
            && let Some(waiting) = &mut *waiting
        {
            waiting.push(stream);
        }
    }

    fn answer(&self, request: Request) -> Answer {
        let _work = self.tree.under_way.begin(NO_INODE);
        let mut answer = Answer::default();
        let mut note = |e: Error| answer.errors.push(e.to_string());
        match request {
            Request::Sync { patience } => {
                self.tree.flush_all(patience).into_iter().for_each(note);
            }
            Request::Leave { patience } => {
                self.tree.flush_all(patience).into_iter().for_each(note);
                self.tree.take_back();
            }
            // Answered by itself.
            Request::Give { .. } => {}
            Request::Status => answer.status = Some(self.status()),
            Request::Open { images, partitions, throw_away } => {
                for image in images {
                    match self.open(&image, partitions, throw_away.as_deref()) {
                        Ok(names) => answer.names.extend(names),
                        Err(e) => note(e),
                    }
                }
            }
            Request::Close { names, keep } => {
                for name in names {
                    let kept =
                        keep.as_deref().map(|path| self.tree.keep_layer(name.as_os_str(), path));
                    let kept = kept.unwrap_or(Ok(()));
                    let closed = kept.and_then(|()| self.tree.unpin(ROOT, name.as_os_str()));
                    match closed.in_file(&name) {
                        Ok(()) => self.mounted.name_changed(name.as_os_str()),
                        Err(e) => note(e),
                    }
                }
            }
        }
        answer
    }

    /// Gives an image's host file to the caller, who has bound it to a loop device when he hangs up.
    fn give(&self, mut stream: UnixStream, name: &OsStr, write: bool) {
        let given = {
            let _work = self.tree.under_way.begin(NO_INODE);
            self.tree.give(name, write)
        };
        let (ino, run) = match given {
            Ok(Some(given)) => given,
            Ok(None) => return drop(send(&mut stream, &Answer::default())),
            Err(e) => {
                let errors = vec![e.to_string()];
                return drop(send(&mut stream, &Answer { errors, ..Answer::default() }));
            }
        };
        let FixedRun { at, len, sector_size, file } = run;
        let answer = Answer { run: Some(Run { at, len, sector_size }), ..Answer::default() };
        if let Some(file) = file.host_file()
            && send_file(&mut stream, &answer, file).is_ok()
        {
            // However long he takes: as long as he may bind it, the image stays open.
            loop {
                match stream.read(&mut [0]) {
                    Err(e) if is_late(&e) => {}
                    Ok(1..) => {}
                    Ok(0) | Err(_) => break,
                }
            }
        }
        drop(file);
        self.tree.settle(ino);
    }

    /// Shows an image in the root, and returns its files. With `partitions` it may be there already.
    fn open(&self, image: &Path, partitions: bool, throw_away: Option<&Path>) -> Result<Vec<Name>> {
        let pinned = match throw_away {
            Some(dir) => self.tree.pin_throw_away(image, dir.to_owned()),
            None => self.tree.pin(image, None),
        };
        let mut names = match pinned {
            // Its disks show in it, and partitions of those beside them only in a mount that shows all.
            Ok(name) if archive::has_name(image) => {
                return Ok(vec![self.mountpoint.join(name).into()]);
            }
            Ok(name) => vec![name],
            Err(e) if partitions && e.kind() == ErrorKind::Exists => {
                vec![self.tree.pinned_name(image).ok_or(e)?]
            }
            Err(e) => return Err(e),
        };
        if partitions {
            names.extend(self.tree.show_partitions(&names[0])?);
        }
        names.iter().for_each(|name| self.mounted.name_changed(name));
        Ok(names.into_iter().map(|name| self.mountpoint.join(name).into()).collect())
    }

    fn status(&self) -> MountStatus {
        let images = self.tree.usage().into_iter().map(|image| ImageStatus {
            image: image.path,
            sector_size: image.usage.sector_size,
            readers: image.usage.readers,
            writers: image.usage.writers,
            unflushed: image.usage.unflushed,
            read_only: image.read_only,
            parents: image.parents.into_iter().map(Name).collect(),
            throw_away: image.usage.throw_away,
            table_pages: image.usage.cache.pages,
            dirty_tables: image.usage.cache.dirty,
            cache_hits: image.usage.cache.hits,
            cache_misses: image.usage.cache.misses,
            silent_seconds: image.silent.map(|time| time.as_secs()),
            displaced: image.usage.displaced.map(|how| how.to_string()),
        });
        MountStatus {
            mountpoint: self.mountpoint.clone(),
            source: self.source.clone(),
            pid: std::process::id(),
            read_only: self.read_only,
            ending: self.ending.load(Ordering::Relaxed),
            images: images.collect(),
            failures: self.tree.failures(),
        }
    }
}

/// Whether nothing has come yet.
fn is_late(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

// The caller's side

/// A connection to a mount's daemon. `NotFound` if there is no daemon any more.
pub struct Connection {
    stream: UnixStream,
    target: PathBuf,
    /// What has come of an answer so far.
    received: Vec<u8>,
    /// Whether a file may come with it. One that nobody asked for is not taken: closing it could hang.
    wants_file: bool,
    file: Option<File>,
}

impl Connection {
    /// Connects to the daemon of a mount.
    pub fn to(mount: &MountEntry) -> Result<Self> {
        let user = mount.user.unwrap_or(0);
        let dir = socket_dir(user);
        let path = dir.join(socket_name(&mount.device));
        let failed = |e: &io::Error| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                Error::new(ErrorKind::NotFound, "the daemon is gone").in_file(&mount.target)
            }
            io::ErrorKind::PermissionDenied => {
                let what = format!("the mount belongs to user {user}");
                Error::new(ErrorKind::Denied, what).in_file(&mount.target)
            }
            io::ErrorKind::WouldBlock => {
                let what = format!("its daemon has taken no call for {} s", ANSWER.as_secs());
                Error::new(ErrorKind::Io, what).in_file(&mount.target)
            }
            _ => Error::io("connect", e).in_file(&path),
        };
        refuse_foreign_file_system(&dir, user)?;
        let begun = Instant::now();
        let stream = loop {
            match connect(&dir, &path, user) {
                Ok(stream) => break stream,
                // A mount is live a moment before its socket is. Only one's own is looked into.
                Err(e)
                    if failed(&e).kind() == ErrorKind::NotFound
                        && begun.elapsed() < SOCKET_DELAY
                        && (user != geteuid().as_raw() || !mounts::is_dead(&mount.target)) =>
                {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(e) => return Err(failed(&e)),
            }
        };
        let target = mount.target.clone();
        Ok(Self { stream, target, received: Vec::new(), wants_file: false, file: None })
    }

    /// Asks for the host's file in which the disk of the flat file `name` lies in one piece, to bind a loop
    /// device to it as long as the connection is open; `None` if it lies in none, or cannot be had. The file
    /// carries the image's locks.
    pub fn borrow_file(&mut self, name: &OsStr, write: bool) -> Result<Option<(File, Run)>> {
        self.wants_file = true;
        let answer = self.ask(&Request::Give { name: Name(name.into()), write })?;
        answer.errors.iter().for_each(|e| log::debug!("{e}"));
        Ok(self.file.take().zip(answer.run))
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// Also if none comes in the time that the request allows.
    pub fn ask(&mut self, request: &Request) -> Result<Answer> {
        send(&mut self.stream, request)
            .map_err(|e| Error::io("asking the daemon", &e).in_file(&self.target))?;
        let patience = request.patience();
        match self.answer_within(patience)? {
            Some(answer) => Ok(answer),
            None => {
                let seconds = patience.as_secs();
                let what =
                    format!("its daemon ({}) did not answer within {seconds} s", self.named());
                Err(Error::new(ErrorKind::Io, what).in_file(&self.target))
            }
        }
    }

    /// Waits for an answer for a limited time; `None` if there is none yet.
    ///
    /// # Errors
    /// At once if the daemon is dead or was stopped.
    pub fn answer_within(&mut self, time: Duration) -> Result<Option<Answer>> {
        let failed = |e: &io::Error| Error::io("waiting for the daemon", e);
        let begun = Instant::now();
        loop {
            if let Some(end) = self.received.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                let answer = serde_json::from_slice(&line);
                return answer.map(Some).map_err(|e| failed(&e.into()).in_file(&self.target));
            }
            let Some(left) = time.checked_sub(begun.elapsed()).filter(|left| !left.is_zero())
            else {
                return Ok(None);
            };
            let limited = self.stream.set_read_timeout(Some(left.min(LOOK)));
            limited.map_err(|e| failed(&e).in_file(&self.target))?;
            let mut part = [0; 4096];
            match self.read_part(&mut part) {
                Ok(len) if len > 0 && self.received.len() as u64 <= MAX_LINE => {
                    self.received.extend_from_slice(&part[..len]);
                }
                Ok(_) => return Err(self.died()),
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(self.died()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.refuse_stopped()?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(failed(&e).in_file(&self.target)),
            }
        }
    }

    fn read_part(&mut self, part: &mut [u8]) -> io::Result<usize> {
        if !self.wants_file {
            return self.stream.read(part);
        }
        let (len, file) = read_with_file(&self.stream, part)?;
        self.file = file.or(self.file.take());
        Ok(len)
    }

    fn died(&self) -> Error {
        Error::new(ErrorKind::Io, "the daemon died before it answered").in_file(&self.target)
    }

    /// Fails if somebody stopped the daemon, which then answers nobody.
    fn refuse_stopped(&self) -> Result<()> {
        let Some(process) = self.process() else { return Ok(()) };
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        // The name of the program, in brackets, may hold anything.
        let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
        if !state.starts_with(['T', 't']) {
            return Ok(());
        }
        let what = format!("its daemon ({}) is stopped", self.named());
        let hint = format!("`kill -CONT {process}` lets it go on");
        Err(Error::new(ErrorKind::Io, what).in_file(&self.target).hint(hint))
    }

    fn named(&self) -> String {
        self.process().map_or("process unknown".into(), |process| format!("process {process}"))
    }

    /// The daemon's process id.
    pub fn process(&self) -> Option<i32> {
        getsockopt(&self.stream, sockopt::PeerCredentials).ok().map(|peer| peer.pid())
    }

    /// Waits until the daemon is gone, as it will be in a moment.
    pub fn end(mut self) {
        let _ = self.answer_within(ANSWER);
    }
}

/// Refuses the socket directory of another user where a file system of his own lies in the way: what
/// is asked of that he may leave unanswered for ever.
fn refuse_foreign_file_system(dir: &Path, user: u32) -> Result<()> {
    if user == 0 || user == geteuid().as_raw() {
        return Ok(());
    }
    let under = mounts::mount_table()?.into_iter().filter(|mount| dir.starts_with(&mount.target));
    let lowest = under.max_by_key(|mount| mount.target.components().count());
    match lowest.filter(|mount| mount.fs_type.starts_with("fuse")) {
        None => Ok(()),
        Some(mount) => {
            let what = format!(
                "the runtime directory of user {user} is a mount of type {}",
                mount.fs_type
            );
            Err(Error::new(ErrorKind::Denied, what).in_file(dir))
        }
    }
}

/// Connects to the socket at `path` in `dir`, which must be private to `user`, and neither of them a
/// symlink. Waits no longer than [`ANSWER`] for a daemon that takes no calls.
fn connect(dir: &Path, path: &Path, user: u32) -> io::Result<UnixStream> {
    check_dir(dir, user).map_err(|e| match e.errno() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::other(e.to_string()),
    })?;
    let socket = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)?;
    if !socket.metadata()?.file_type().is_socket() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let flags = SockFlag::SOCK_CLOEXEC;
    let stream = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // It holds for connecting and for sending.
    setsockopt(&stream, sockopt::SendTimeout, &TimeVal::seconds(ANSWER.as_secs() as i64))?;
    let address = UnixAddr::new(&*PathBuf::from(format!("/proc/self/fd/{}", socket.as_raw_fd())))?;
    nix::sys::socket::connect(stream.as_raw_fd(), &address)?;
    Ok(UnixStream::from(stream))
}
