//! The description of a machine: OVF envelopes, DSP0243 sections 7 to 9.

use std::fmt::Write;

/// A machine with one disk.
#[derive(Debug)]
pub struct Machine<'a> {
    /// What it is called.
    pub name: &'a str,
    /// The disk's file in the archive.
    pub file: &'a str,
    /// Bytes of that file.
    pub file_size: u64,
    /// Bytes of the disk.
    pub capacity: u64,
}

const DISK_FORMAT: &str =
    "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";

/// CIM's numbers of hardware, CIM_ResourceAllocationSettingData.ResourceType.
const PROCESSOR: u32 = 3;
const MEMORY: u32 = 4;
const SCSI: u32 = 6;
const DISK: u32 = 17;

/// The envelope of `machine`: two processors, 2 GiB of memory, and the disk at an LSI Logic controller, all of
/// which can be changed once it is imported.
pub fn envelope(machine: &Machine<'_>) -> String {
    let name = escaped(machine.name);
    let Machine { file_size, capacity, .. } = machine;
    let file = escaped(machine.file);
    let items = [
        (PROCESSOR, "2 virtual CPUs", "<rasd:VirtualQuantity>2</rasd:VirtualQuantity>", ""),
        (
            MEMORY,
            "2048 MB of memory",
            "<rasd:VirtualQuantity>2048</rasd:VirtualQuantity>",
            "<rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>",
        ),
        (SCSI, "SCSI controller 0", "<rasd:ResourceSubType>lsilogic</rasd:ResourceSubType>", ""),
        (
            DISK,
            "Hard disk 1",
            "<rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource>",
            "<rasd:AddressOnParent>0</rasd:AddressOnParent>",
        ),
    ];
    let mut hardware = String::new();
    for ((kind, element, what, more), id) in items.into_iter().zip(1..) {
        // Elements are in the order of their names, which some readers insist on.
        let (before, after) = match kind {
            SCSI => ("<rasd:Address>0</rasd:Address>", ""),
            DISK => (more, "<rasd:Parent>3</rasd:Parent>"),
            _ => (more, ""),
        };
        let (resource, quantity) = if kind == DISK { (what, "") } else { ("", what) };
        let (subtype, quantity) = if kind == SCSI { (quantity, "") } else { ("", quantity) };
        let _ = writeln!(
            hardware,
            "      <Item>{before}<rasd:ElementName>{element}</rasd:ElementName>{resource}\
             <rasd:InstanceID>{id}</rasd:InstanceID>{after}{subtype}\
             <rasd:ResourceType>{kind}</rasd:ResourceType>{quantity}</Item>",
        );
    }
    format!(
        r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
  <References>
    <File ovf:href="{file}" ovf:id="file1" ovf:size="{file_size}"/>
  </References>
  <DiskSection>
    <Info>Virtual disks</Info>
    <Disk ovf:capacity="{capacity}" ovf:capacityAllocationUnits="byte" ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:format="{DISK_FORMAT}"/>
  </DiskSection>
  <VirtualSystem ovf:id="{name}">
    <Info>A virtual machine</Info>
    <Name>{name}</Name>
    <OperatingSystemSection ovf:id="1">
      <Info>The kind of guest, not known</Info>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>Virtual hardware</Info>
      <System><vssd:ElementName>Virtual Hardware Family</vssd:ElementName><vssd:InstanceID>0</vssd:InstanceID><vssd:VirtualSystemIdentifier>{name}</vssd:VirtualSystemIdentifier><vssd:VirtualSystemType>vmx-10</vssd:VirtualSystemType></System>
{hardware}    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"#
    )
}

/// Text as it stands in XML; what XML cannot hold is left out.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_break_the_envelope() {
        let machine =
            Machine { name: "a\"><x>&\u{1}", file: "d.vmdk", file_size: 512, capacity: 1 << 20 };
        let text = envelope(&machine);
        assert!(text.contains("<Name>a&quot;&gt;&lt;x&gt;&amp;</Name>"), "{text}");
        assert!(text.contains("ovf:size=\"512\"") && text.contains("ovf:capacity=\"1048576\""));
        let (opened, closed) = (text.matches("<Item>").count(), text.matches("</Item>").count());
        assert_eq!((opened, closed), (4, 4));
    }
}
