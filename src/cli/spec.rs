//! What a new image is to be: the options that `create`, `convert` and `measure` have in common.

use clap::{Args, ValueEnum};

use super::output::parse_size;
use crate::error::Result;
use crate::formats::profile::Profile;
use crate::formats::{CreateSpec, Format, Preallocation};

/// Who an image is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProfileName {
    /// Fixed VHD, the size rounded up to whole MiB
    Azure,
    /// Dynamic VHDX, physical sectors of 4096 bytes
    Hyperv,
    /// Dynamic VHD
    Virtualbox,
    /// VMDK monolithicSparse
    Vmware,
    /// VMDK streamOptimized, for import
    Esx,
}

impl ProfileName {
    fn profile(self) -> Profile {
        match self {
            Self::Azure => Profile::Azure,
            Self::Hyperv => Profile::HyperV,
            Self::Virtualbox => Profile::VirtualBox,
            Self::Vmware => Profile::VMware,
            Self::Esx => Profile::Esx,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PreallocationName {
    /// Nothing: space is taken as the disk is written, and may run out then
    Off,
    /// All of it at once, without writing, where the host can
    Falloc,
    /// All of it, by writing zeroes
    Full,
}

/// What a new image is to be.
#[derive(Debug, Clone, Args)]
pub struct SpecArgs {
    /// Subformat [default: dynamic for vhd and vhdx, monolithicSparse for vmdk].
    #[arg(long)]
    pub subformat: Option<String>,
    /// Make what this program or cloud takes.
    #[arg(long = "for", value_name = "USE")]
    pub profile: Option<ProfileName>,
    /// Bytes per block [default: 2M for vhd; by size for vhdx; vmdk grains are always 64K].
    #[arg(long, value_parser = parse_size)]
    pub block_size: Option<u64>,
    /// Logical sector size in bytes, 512 or 4096 (vhdx) [default: 512].
    #[arg(long, value_name = "BYTES")]
    pub sector_size: Option<u32>,
    /// Physical sector size in bytes, 512 or 4096 (vhdx) [default: 4096].
    #[arg(long, value_name = "BYTES")]
    pub physical_sector_size: Option<u32>,
    /// Size of the log (vhdx), a multiple of 1M [default: 1M].
    #[arg(long, value_parser = parse_size)]
    pub log_size: Option<u64>,
    /// What is allocated of a fixed or flat disk when it is made.
    #[arg(long, value_name = "HOW")]
    preallocation: Option<PreallocationName>,
    /// Adapter type (vmdk): ide, buslogic, lsilogic or legacyESX [default: lsilogic].
    #[arg(long)]
    pub adapter: Option<String>,
    /// Version of the virtual hardware (vmdk) [default: 10].
    #[arg(long, value_name = "NUMBER")]
    hw_version: Option<u32>,
    /// Version of VMware's tools in the guest (vmdk), such as 2147483647 for open-vm-tools.
    #[arg(long, value_name = "NUMBER")]
    tools_version: Option<u32>,
    /// Size of each part of a twoGbMaxExtent disk (vmdk), a multiple of 1M [default: 2047M].
    #[arg(long, value_parser = parse_size)]
    split_size: Option<u64>,
    /// Let grains be marked as zero (vmdk, sparse) [default: yes for children, no otherwise].
    #[arg(long, value_name = "YES|NO", num_args = 0..=1, default_missing_value = "yes", value_parser = parse_yes)]
    zeroed_grain: Option<bool>,
}

fn parse_yes(text: &str) -> std::result::Result<bool, String> {
    match text {
        "yes" | "on" | "true" => Ok(true),
        "no" | "off" | "false" => Ok(false),
        _ => Err("yes or no".to_owned()),
    }
}

impl SpecArgs {
    /// What to create, for a disk of `size` bytes.
    pub fn spec(&self, size: u64, default: Preallocation) -> CreateSpec {
        CreateSpec {
            subformat: self.subformat.clone(),
            size,
            block_size: self.block_size,
            logical_sector: self.sector_size,
            physical_sector: self.physical_sector_size,
            log_size: self.log_size,
            adapter: self.adapter.clone(),
            preallocation: match self.preallocation {
                None => default,
                Some(PreallocationName::Off) => Preallocation::Off,
                Some(PreallocationName::Falloc) => Preallocation::Falloc,
                Some(PreallocationName::Full) => Preallocation::Full,
            },
            hw_version: self.hw_version,
            tools_version: self.tools_version,
            split_size: self.split_size,
            zeroed_grains: self.zeroed_grain,
            uuid: None,
        }
    }

    /// Whether it was said what to allocate.
    pub fn preallocation_given(&self) -> bool {
        self.preallocation.is_some()
    }

    /// Makes `spec` what the profile wants, if there is one, and says its format.
    pub fn apply_profile(
        &self,
        format: Option<&str>,
        spec: &mut CreateSpec,
    ) -> Result<Option<&'static dyn Format>> {
        self.profile.map(|name| name.profile().apply(format, spec)).transpose()
    }
}
