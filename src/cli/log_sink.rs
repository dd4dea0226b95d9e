//! Where log lines go: standard error, and the system log once a daemon has let go of it.

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};

use env_logger::{Builder, Target};
use log::{Level, LevelFilter};

use crate::names::printable;

static DETACHED: AtomicBool = AtomicBool::new(false);

/// Starts logging: warnings, with `verbose` 1 also what happens, with 2 every request.
/// The environment variable `FLATDISK_LOG` overrides that.
pub fn start(verbose: u8) {
    let own = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        _ => LevelFilter::Debug,
    };
    let mut builder = Builder::new();
    // fuser calls it an error when a program gives up on a request before it is answered.
    let fuser = if verbose > 1 { LevelFilter::Debug } else { LevelFilter::Off };
    builder.filter_level(LevelFilter::Error);
    builder.filter_module("flatdisk", own).filter_module("fuser", fuser);
    builder
        .parse_env("FLATDISK_LOG")
        .format(|out, record| {
            // syslog's numbers, facility "daemon".
            let severity = match record.level() {
                Level::Error => 3,
                Level::Warn => 4,
                Level::Info => 6,
                Level::Debug | Level::Trace => 7,
            };
            let text = printable(record.args());
            match DETACHED.load(Ordering::Relaxed) {
                true => write!(out, "<{}>flatdisk[{}]: {text}", 24 + severity, std::process::id()),
                false => writeln!(out, "flatdisk: {text}"),
            }
        })
        .target(Target::Pipe(Box::new(Sink { system_log: None })));
    let _ = builder.try_init();
}

/// From now on lines go to the system log.
pub fn detach() {
    DETACHED.store(true, Ordering::Relaxed);
}

/// Gets each line in one call.
struct Sink {
    system_log: Option<UnixDatagram>,
}

impl Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !DETACHED.load(Ordering::Relaxed) {
            return io::stderr().write(line);
        }
        // Without a system log, or while it is away, lines are lost: there is nobody to tell.
        let socket = match self.system_log.take() {
            Some(socket) => socket,
            None => UnixDatagram::unbound()?,
        };
        if socket.send_to(line, "/dev/log").is_ok() {
            self.system_log = Some(socket);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
