//! The VHD driver.

use std::path::Path;
use std::sync::Arc;

use super::{CreateSpec, Format, OpenContext, Opened, Probe, Report};
use crate::error::{Error, Result};
use crate::storage::{Host, Storage};

/// The VHD format.
pub struct Vhd;

impl Format for Vhd {
    fn name(&self) -> &'static str {
        "vhd"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["vhd", "avhd", "vud"]
    }

    fn subformats(&self) -> &'static [&'static str] {
        &[]
    }

    fn probe(&self, _probe: &Probe) -> bool {
        false
    }

    fn open(&self, _file: Arc<dyn Storage>, _ctx: &OpenContext) -> Result<Opened> {
        Err(Error::unsupported("not yet"))
    }

    fn create(&self, _host: &dyn Host, _path: &Path, _spec: &CreateSpec) -> Result<()> {
        Err(Error::unsupported("not yet"))
    }

    fn check(
        &self,
        _file: Arc<dyn Storage>,
        _ctx: &OpenContext,
        _report: &mut Report,
    ) -> Result<()> {
        Err(Error::unsupported("not yet"))
    }
}
