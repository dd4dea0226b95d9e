//! The sink that writes a stream-optimised VMDK.

use std::io::Write;
use std::ops::Range;

use parking_lot::Mutex;

use super::pipeline::Sink;
use crate::codec::is_zero;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::vmdk::{GRAIN, Packer, StreamWriter};

/// Compresses the grains of each chunk as the workers bring them, and writes them in order.
pub struct StreamSink<W> {
    writer: Mutex<Option<StreamWriter<W>>>,
    level: u32,
}

impl<W: Write + Send> StreamSink<W> {
    /// Everything goes to a stream that has begun.
    pub fn new(writer: StreamWriter<W>, level: u32) -> Self {
        Self { writer: Mutex::new(Some(writer)), level }
    }

    /// Completes the stream; gives back what it went to.
    pub fn finish(self) -> Result<W> {
        let writer = self.writer.into_inner();
        writer.map_or_else(|| Err(Error::new(ErrorKind::Failed, "no stream")), StreamWriter::finish)
    }
}

/// What a worker has of its chunk.
#[derive(Default)]
pub struct Packed {
    packer: Option<Packer>,
    /// Number and length of each grain that is not zero.
    grains: Vec<(u64, usize)>,
    bytes: Vec<u8>,
}

impl<W: Write + Send> Sink for StreamSink<W> {
    type Work = Packed;

    fn ordered(&self) -> bool {
        true
    }

    fn prepare(&self, at: u64, data: &[u8], work: &mut Packed) -> Result<()> {
        let Packed { packer, grains, bytes } = work;
        let packer = packer.get_or_insert_with(|| Packer::new(self.level));
        grains.clear();
        bytes.clear();
        for (grain, number) in data.chunks(GRAIN as usize).zip(at / GRAIN..) {
            if !is_zero(grain) {
                grains.push((number, packer.pack(number, grain, bytes)?));
            }
        }
        Ok(())
    }

    fn put(&self, _at: u64, _data: &[u8], work: &mut Packed) -> Result<()> {
        let mut writer = self.writer.lock();
        let Some(writer) = &mut *writer else { return Ok(()) };
        let mut rest = &work.bytes[..];
        for (number, len) in &work.grains {
            let (packed, behind) = rest.split_at(*len);
            writer.grain(*number, packed)?;
            rest = behind;
        }
        Ok(())
    }

    fn skip(&self, _range: Range<u64>) -> Result<()> {
        Ok(())
    }
}
