//! Planned changes of tables, by way of the log: each [`Logged::commit`] happens as a whole or not at
//! all, whatever a crash leaves.
//!
//! # Order
//!
//! As in a writing session: an empty entry under a new GUID; headers that name it, with a new
//! `FileWriteGuid`. Then for each commit everything before it is made durable, an entry with its pages
//! is, and the pages go to their places. At last those are made durable, and headers name no log any
//! more. Only behind that the file may get shorter: entries state a length.

use std::collections::BTreeMap;
use std::sync::Arc;

use uuid::Uuid;

use super::headers::Headers;
use super::layout::{LOG_SECTOR, MIB};
use super::log::entry::Page;
use super::log::ring::{FileLengths, Ring};
use super::open::Parts;
use super::repair::replace_headers;
use crate::codec::read_exact;
use crate::error::{Error, Result};
use crate::formats::plan::Steps;
use crate::storage::Storage;

/// A log in use by a plan.
pub(super) struct Logged {
    file: Arc<dyn Storage>,
    headers: Headers,
    ring: Ring,
    lengths: FileLengths,
}

impl Logged {
    /// Plans the beginning. `data_write` is the disk's identity from now on. The file holds everything
    /// in use in its first `used_end` bytes.
    pub(super) fn begin(
        parts: &Parts,
        data_write: Uuid,
        used_end: u64,
        plan: &mut Steps,
    ) -> Result<Self> {
        let file = parts.file.clone();
        let mut headers = parts.headers.clone();
        let (at, length) = (headers.header().log_offset, headers.header().log_length);
        let mut ring = Ring::new(&file, at, length.into());
        let lengths = FileLengths { durable: parts.file_len / MIB * MIB, needed: used_end };
        ring.plan(&[], lengths, plan);
        let (log, file_write) = (ring.guid(), Uuid::new_v4());
        replace_headers(&file, &mut headers, plan, "a header that names the log", |h| {
            (h.log, h.log_version) = (log, 0);
            (h.file_write, h.data_write) = (file_write, data_write);
        })?;
        plan.sync(&file);
        Ok(Self { file, headers, ring, lengths })
    }

    /// Plans that the file has `len` bytes at least, all of them in use.
    pub(super) fn extend(&mut self, len: u64, plan: &mut Steps) {
        if len > self.lengths.durable {
            plan.set_len(&self.file, len, "room for what is new");
            // The next entry follows a sync.
            self.lengths.durable = len;
        }
        self.lengths.needed = self.lengths.needed.max(len);
    }

    /// Most pages of one commit.
    pub(super) fn max_pages(&self) -> usize {
        self.ring.max_pages()
    }

    /// Plans that pages, by their byte offsets, all change at once; everything planned before happens
    /// before, durably.
    pub(super) fn commit(
        &mut self,
        pages: Vec<(u64, Vec<u8>)>,
        what: &str,
        plan: &mut Steps,
    ) -> Result<()> {
        if pages.len() > self.max_pages() {
            return Err(Error::unsupported("the log is too small for the change"));
        }
        plan.sync(&self.file);
        let images: Vec<_> = pages.iter().map(|(at, data)| Page { at: *at, data }).collect();
        self.ring.plan(&images, self.lengths, plan);
        for (at, data) in pages {
            plan.write(&self.file, at, data, what);
        }
        Ok(())
    }

    /// Plans the end.
    pub(super) fn end(mut self, plan: &mut Steps) -> Result<()> {
        plan.sync(&self.file);
        let what = "a header that names no log any more";
        replace_headers(&self.file, &mut self.headers, plan, what, |h| h.log = Uuid::nil())?;
        plan.sync(&self.file);
        Ok(())
    }
}

/// Pages of the file while they are changed.
pub(super) struct Pages<'a> {
    file: &'a dyn Storage,
    pages: BTreeMap<u64, Vec<u8>>,
}

impl<'a> Pages<'a> {
    /// No pages of `file` yet.
    pub(super) fn new(file: &'a dyn Storage) -> Self {
        Self { file, pages: BTreeMap::new() }
    }

    /// Changes the bytes from `at` on.
    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let pos = at + done as u64;
            let (page, skip) = (pos / LOG_SECTOR, (pos % LOG_SECTOR) as usize);
            if !self.pages.contains_key(&page) {
                let mut contents = vec![0; LOG_SECTOR as usize];
                read_exact(self.file, page * LOG_SECTOR, &mut contents, "metadata")?;
                self.pages.insert(page, contents);
            }
            let part = (bytes.len() - done).min(LOG_SECTOR as usize - skip);
            if let Some(contents) = self.pages.get_mut(&page) {
                contents[skip..skip + part].copy_from_slice(&bytes[done..done + part]);
            }
            done += part;
        }
        Ok(())
    }

    /// The changed pages, by byte offset.
    pub(super) fn into_pages(self) -> impl Iterator<Item = (u64, Vec<u8>)> {
        self.pages.into_iter().map(|(page, bytes)| (page * LOG_SECTOR, bytes))
    }
}
