//! What a program or cloud wants of an image: [`Profile`].

use super::{CreateSpec, Format, by_name};
use crate::error::{Error, Result};

/// Azure's unit of size, in bytes.
const AZURE_UNIT: u64 = 1 << 20;
/// Smallest and largest disk that Azure takes as an upload, in bytes.
const AZURE_SIZES: std::ops::RangeInclusive<u64> = 20 << 20..=32 << 40;

/// Who an image is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Profile {
    /// A fixed VHD of whole MiB.
    Azure,
    /// A dynamic VHDX with physical sectors of 4096 bytes.
    HyperV,
    /// A dynamic VHD.
    VirtualBox,
    /// A monolithicSparse VMDK.
    VMware,
    /// A streamOptimized VMDK.
    Esx,
}

impl Profile {
    /// Format and subformat.
    fn kind(self) -> (&'static str, &'static str) {
        match self {
            Self::Azure => ("vhd", "fixed"),
            Self::HyperV => ("vhdx", "dynamic"),
            Self::VirtualBox => ("vhd", "dynamic"),
            Self::VMware => ("vmdk", "monolithicSparse"),
            Self::Esx => ("vmdk", "streamOptimized"),
        }
    }

    /// Makes `spec` what the profile wants, its size rounded up where it must be, and says the format. A
    /// format or subformat that was asked for and is another one is refused.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) for a format, subformat or size that the profile excludes.
    pub fn apply(self, format: Option<&str>, spec: &mut CreateSpec) -> Result<&'static dyn Format> {
        let (wanted, subformat) = self.kind();
        let other = |asked: Option<&str>, is: &str| {
            asked.filter(|asked| !asked.eq_ignore_ascii_case(is)).map(|asked| {
                Error::invalid(format!("{asked} is not what this use wants"))
                    .hint(format!("{wanted} {subformat}"))
            })
        };
        if let Some(e) = other(format, wanted).or(other(spec.subformat.as_deref(), subformat)) {
            return Err(e);
        }
        spec.subformat = Some(subformat.to_owned());
        match self {
            Self::Azure => spec.size = azure_size(spec.size)?,
            Self::HyperV => {
                spec.physical_sector.get_or_insert(4096);
            }
            _ => {}
        }
        by_name(wanted)
    }
}

/// The size, at least `size`, that Azure takes.
fn azure_size(size: u64) -> Result<u64> {
    if size > *AZURE_SIZES.end() {
        return Err(
            Error::invalid(format!("Azure takes no disk of {size} bytes")).hint("32 TiB at most")
        );
    }
    Ok(size.next_multiple_of(AZURE_UNIT).max(*AZURE_SIZES.start()))
}

/// What keeps Azure from taking an image, one sentence each: nothing if it would take it. `file_len` is
/// the length of the image's file.
pub fn azure_objections(format: &str, subformat: &str, size: u64, file_len: u64) -> Vec<String> {
    let mut found = Vec::new();
    if (format, subformat) != ("vhd", "fixed") {
        found.push(format!("Azure takes fixed VHDs, not a {subformat} {}", format.to_uppercase()));
    }
    if let (true, Ok(good)) = (size <= *AZURE_SIZES.end(), azure_size(size)) {
        if good != size {
            let why = if size < *AZURE_SIZES.start() { "at least 20 MiB" } else { "whole MiB" };
            found.push(format!("{size} bytes are not {why}: the nearest good size is {good}"));
        }
    } else {
        found.push(format!("{size} bytes are more than 32 TiB"));
    }
    if (format, subformat) == ("vhd", "fixed") && file_len != size + 512 {
        found.push(format!(
            "the file has {file_len} bytes, not the disk's {size} and the footer's 512"
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn azure_wants_whole_mebibytes_in_a_fixed_vhd() {
        let mut spec = CreateSpec { size: 44_716_382_208, ..CreateSpec::default() };
        assert_eq!(Profile::Azure.apply(None, &mut spec).unwrap().name(), "vhd");
        assert_eq!((spec.size, spec.subformat.as_deref()), (42_645 << 20, Some("fixed")));
        let mut small = CreateSpec { size: 512, ..CreateSpec::default() };
        Profile::Azure.apply(Some("vhd"), &mut small).unwrap();
        assert_eq!(small.size, 20 << 20);
        assert!(Profile::Azure.apply(Some("vmdk"), &mut small).is_err());
        let objections = |size, len| azure_objections("vhd", "fixed", size, len);
        assert_eq!(objections(42_645 << 20, (42_645 << 20) + 512), Vec::<String>::new());
        let odd = objections(44_716_382_208, 44_716_382_720);
        assert!(odd[0].ends_with("the nearest good size is 44716523520"), "{odd:?}");
        assert_eq!(objections(20 << 20, (22 << 20) + 512).len(), 1);
        assert_eq!(azure_objections("vhd", "dynamic", 64 << 20, 4096).len(), 1);
    }
}
