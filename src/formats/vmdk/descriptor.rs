//! The descriptor: the text that says which extents make up a disk.
//!
//! Parsing keeps the text as it is, so that a change touches only the bytes of one value. Values are
//! replaced by ones of the same length ([`Descriptor::set_content_id`]): nothing else moves, and a write torn
//! by a crash leaves a text that still parses.
//!
//! Sections are told apart by the shape of their lines, their titles are comments. Lines of no known
//! shape are refused, for skipping an extent line would move everything behind it, but where the caller
//! knows that there is one extent only ([`Descriptor::broken`]).
//!
//! Text beyond ASCII is in the code page that the text itself names, as VMware writes it on the Windows
//! of many languages. All of them leave line ends, blanks, `=` and quotes to ASCII.

use std::ops::Range;

use encoding_rs::{Encoding, UTF_8, WINDOWS_1252};

use crate::error::{Error, Result};

/// Longest descriptor accepted, in bytes.
pub const MAX_BYTES: u64 = 1 << 20;
const MAX_LINES: usize = 65_536;
const MAX_EXTENTS: usize = 4096;

/// `parentCID` of a disk without parent.
pub const NO_PARENT: u32 = 0xffff_ffff;
/// CID of a disk that was never written.
pub const NEVER_WRITTEN: u32 = 0xffff_fffe;

/// What a guest may do with an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentAccess {
    /// Read and write.
    ReadWrite,
    /// Read only.
    ReadOnly,
    /// Nothing.
    None,
}

/// The type word of an extent line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentType {
    /// Raw bytes in a file.
    Flat,
    /// Raw bytes in a file, as ESX says it.
    Vmfs,
    /// A hosted sparse file.
    Sparse,
    /// An ESX copy-on-write file.
    VmfsSparse,
    /// A space-efficient sparse file.
    SeSparse,
    /// Zeroes stored nowhere.
    Zero,
    /// A mapping to a raw device.
    VmfsRdm,
    /// A raw device.
    VmfsRaw,
    /// An object of a vSAN.
    VsanSparse,
}

const TYPES: [(&str, ExtentType); 9] = [
    ("FLAT", ExtentType::Flat),
    ("VMFS", ExtentType::Vmfs),
    ("SPARSE", ExtentType::Sparse),
    ("VMFSSPARSE", ExtentType::VmfsSparse),
    ("SESPARSE", ExtentType::SeSparse),
    ("ZERO", ExtentType::Zero),
    ("VMFSRDM", ExtentType::VmfsRdm),
    ("VMFSRAW", ExtentType::VmfsRaw),
    ("VSANSPARSE", ExtentType::VsanSparse),
];

impl ExtentType {
    /// The word that stands for it.
    pub fn word(self) -> &'static str {
        TYPES.iter().find(|(_, t)| *t == self).map_or("", |(word, _)| word)
    }
}

/// One extent line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentLine {
    /// What a guest may do.
    pub access: ExtentAccess,
    /// Sectors of the disk, never 0.
    pub sectors: u64,
    /// What holds them.
    pub kind: ExtentType,
    /// The file, as written.
    pub name: Option<String>,
    /// The first sector in the file, if written.
    pub offset: Option<u64>,
    /// Line number, from 1.
    pub line: usize,
}

/// One `key=value` line.
#[derive(Debug, Clone)]
struct Setting {
    key: String,
    value: String,
    /// The value's bytes in the text, without quotes.
    at: Range<usize>,
}

/// A parsed descriptor.
#[derive(Debug, Clone)]
pub struct Descriptor {
    text: Vec<u8>,
    settings: Vec<Setting>,
    /// The extents, in disk order.
    pub extents: Vec<ExtentLine>,
    /// What is odd about the text.
    pub warnings: Vec<String>,
    /// A header key stands there twice with different values: which one counts is a guess.
    pub ambiguous: bool,
    /// What is wrong with lines that were left out.
    pub broken: Vec<String>,
    charset: Charset,
}

/// Whether a file begins like a descriptor: its first line that says anything is `version=`, or its
/// first line is the usual title.
pub fn looks_like(head: &[u8]) -> bool {
    if starts_with_ignoring_case(head, b"# Disk Descriptor")
        || starts_with_ignoring_case(head, b"#Disk Descriptor")
    {
        return true;
    }
    let first = head
        .split(|b| *b == b'\n')
        .map(<[u8]>::trim_ascii)
        .find(|line| !line.is_empty() && !line.starts_with(b"#"));
    first.is_some_and(|line| {
        starts_with_ignoring_case(line, b"version")
            && line[7..].trim_ascii_start().strip_prefix(b"=").is_some_and(|value| {
                let value = value.trim_ascii_start();
                value.first().is_some_and(|b| b.is_ascii_digit() || *b == b'"')
            })
    })
}

fn starts_with_ignoring_case(text: &[u8], prefix: &[u8]) -> bool {
    text.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

/// How bytes beyond ASCII are read; `None` where the code page is not known: such names cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Charset(Option<&'static Encoding>);

/// Names of code pages, by their number in Windows, that are no labels of the encoding standard.
const CODE_PAGES: [(&[u8], &[u8]); 5] = [
    (b"932", b"shift_jis"),
    (b"936", b"gbk"),
    (b"949", b"euc-kr"),
    (b"950", b"big5"),
    (b"874", b"windows-874"),
];

impl Charset {
    /// The code page that the text names in its header, or else in its disk database.
    fn of(text: &[u8]) -> Self {
        let named = [&b"encoding"[..], b"ddb.encoding"].into_iter().find_map(|key| {
            text.split(|b| *b == b'\n').find_map(|line| {
                let line = line.trim_ascii();
                let value = line.get(key.len()..)?;
                if !starts_with_ignoring_case(line, key) {
                    return None;
                }
                let value = value.trim_ascii_start().strip_prefix(b"=")?.trim_ascii();
                let value = value.strip_prefix(b"\"").unwrap_or(value);
                Some(value.strip_suffix(b"\"").unwrap_or(value).to_ascii_lowercase())
            })
        });
        Self(match named {
            Some(name) => Self::named(&name),
            None if std::str::from_utf8(text).is_ok() => Some(UTF_8),
            None => Some(WINDOWS_1252),
        })
    }

    fn named(name: &[u8]) -> Option<&'static Encoding> {
        let number = [&b"windows-"[..], b"cp", b"ms"]
            .into_iter()
            .find_map(|prefix| name.strip_prefix(prefix))
            .unwrap_or(name);
        let label = CODE_PAGES.iter().find(|(page, _)| *page == number).map_or(name, |(_, l)| l);
        Encoding::for_label(label).filter(|encoding| encoding.is_ascii_compatible())
    }

    /// The text of `bytes`; what cannot be read becomes replacement characters.
    fn decode(self, bytes: &[u8]) -> String {
        match self.0 {
            Some(encoding) => encoding.decode_without_bom_handling(bytes).0.into_owned(),
            None => bytes
                .iter()
                .map(|b| if b.is_ascii() { *b as char } else { char::REPLACEMENT_CHARACTER })
                .collect(),
        }
    }

    /// The bytes of a text, if it can be had back from them.
    fn encode(self, text: &str) -> Option<Vec<u8>> {
        let bytes = match self.0 {
            _ if text.is_ascii() => text.as_bytes().to_vec(),
            Some(encoding) => encoding.encode(text).0.into_owned(),
            None => return None,
        };
        (self.decode(&bytes) == text).then_some(bytes)
    }
}

impl Descriptor {
    /// Parses a descriptor, up to the first NUL. Lines that are broken, or cut off, and no extent lines,
    /// are left out and told in [`Self::broken`]: what they cost is for the caller to judge.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let text = &text[..text.iter().position(|b| *b == 0).unwrap_or(text.len())];
        if text.len() as u64 > MAX_BYTES {
            return Err(Error::corrupt("the descriptor is longer than 1 MiB"));
        }
        let charset = Charset::of(text);
        let mut parsed = Self {
            text: text.to_vec(),
            settings: Vec::new(),
            extents: Vec::new(),
            warnings: Vec::new(),
            ambiguous: false,
            broken: Vec::new(),
            charset,
        };
        let mut start = 0;
        for (index, line) in text.split(|b| *b == b'\n').enumerate() {
            let number = index + 1;
            if number > MAX_LINES {
                return Err(Error::corrupt("the descriptor has more than 65536 lines"));
            }
            if let Err(what) = parsed.line(number, start, line, charset) {
                let what = format!("descriptor line {number}: {what}");
                if access_word(line.trim_ascii()).is_some() {
                    return Err(Error::corrupt(what));
                }
                parsed.broken.push(what);
            }
            start += line.len() + 1;
        }
        parsed.find_duplicates();
        Ok(parsed)
    }

    /// Takes in one line, which begins at byte `start` of the text.
    fn line(
        &mut self,
        number: usize,
        start: usize,
        line: &[u8],
        charset: Charset,
    ) -> std::result::Result<(), String> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.contains(&b'\r') {
            return Err("a carriage return without line feed".into());
        }
        let trimmed = line.trim_ascii_start();
        let start = start + (line.len() - trimmed.len());
        let trimmed = trimmed.trim_ascii_end();
        if trimmed.is_empty() || trimmed[0] == b'#' {
            return Ok(());
        }
        if let Some(access) = access_word(trimmed) {
            return self.extent(number, access, &charset.decode(trimmed));
        }
        let Some(equals) = trimmed.iter().position(|b| *b == b'=') else {
            return Err("neither a comment, a setting nor an extent".into());
        };
        let key = trimmed[..equals].trim_ascii();
        if key.is_empty() || !key.iter().all(|b| b.is_ascii_alphanumeric() || b"._-:".contains(b)) {
            return Err("neither a comment, a setting nor an extent".into());
        }
        let after = &trimmed[equals + 1..];
        let mut value = after.trim_ascii_start();
        let mut at = start + equals + 1 + (after.len() - value.len());
        if let Some(inner) = value.strip_prefix(b"\"") {
            value = inner.strip_suffix(b"\"").ok_or("a quote is not closed")?;
            at += 1;
        }
        if value.contains(&b'"') {
            return Err("a quote inside a value".into());
        }
        self.settings.push(Setting {
            key: charset.decode(key),
            value: charset.decode(value),
            at: at..at + value.len(),
        });
        Ok(())
    }

    /// Takes in an extent line that begins with the word for `access`.
    fn extent(
        &mut self,
        number: usize,
        access: ExtentAccess,
        line: &str,
    ) -> std::result::Result<(), String> {
        let (_, rest) = next_word(line);
        let (size, rest) = next_word(rest);
        let sectors: u64 =
            size.parse().map_err(|_| format!("`{size}` is no size of an extent in sectors"))?;
        let (word, rest) = next_word(rest);
        let kind = TYPES
            .iter()
            .find(|(known, _)| word.eq_ignore_ascii_case(known))
            .map(|(_, kind)| *kind)
            .ok_or_else(|| format!("unknown extent type `{word}`"))?;
        let (name, rest) = match rest.strip_prefix('"') {
            None => (None, rest),
            Some(rest) => {
                let (name, rest) = rest.split_once('"').ok_or("a quote is not closed")?;
                (Some(name.to_owned()), rest.trim_start())
            }
        };
        if rest.starts_with('"') {
            return Err("two names for one extent".into());
        }
        let (offset, _) = next_word(rest);
        let offset = match offset {
            "" => None,
            digits => Some(
                digits.parse::<u64>().map_err(|_| format!("`{digits}` is no offset in sectors"))?,
            ),
        };
        if sectors == 0 {
            return Ok(());
        }
        if name.is_none() && kind != ExtentType::Zero && access != ExtentAccess::None {
            return Err(format!("a {} extent without a file name", kind.word()));
        }
        let sparse =
            matches!(kind, ExtentType::Sparse | ExtentType::VmfsSparse | ExtentType::SeSparse);
        if sparse && offset.unwrap_or(0) != 0 {
            return Err(format!("a {} extent at an offset", kind.word()));
        }
        if self.extents.len() == MAX_EXTENTS {
            return Err("more than 4096 extents".into());
        }
        self.extents.push(ExtentLine { access, sectors, kind, name, offset, line: number });
        Ok(())
    }

    fn find_duplicates(&mut self) {
        let mut first: std::collections::HashMap<String, &str> = Default::default();
        for setting in &self.settings {
            let key = setting.key.to_ascii_lowercase();
            match first.get(&key) {
                None => {
                    first.insert(key, &setting.value);
                }
                Some(value) if *value == setting.value => {}
                Some(_) => {
                    self.warnings.push(format!("the descriptor sets `{}` twice", setting.key));
                    self.ambiguous |= !key.starts_with("ddb.");
                }
            }
        }
    }

    fn setting(&self, key: &str) -> Option<&Setting> {
        self.settings.iter().find(|s| s.key.eq_ignore_ascii_case(key))
    }

    /// The value of a key, whatever its case; the first one if there are several.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.setting(key).map(|s| s.value.as_str())
    }

    /// All keys and values, in the order of the text.
    pub fn settings(&self) -> impl Iterator<Item = (&str, &str)> {
        self.settings.iter().map(|s| (s.key.as_str(), s.value.as_str()))
    }

    /// `createType`, empty if absent.
    pub fn create_type(&self) -> &str {
        self.get("createType").unwrap_or("")
    }

    /// The content id of this disk.
    pub fn cid(&self) -> Option<u32> {
        hex(self.get("CID")?)
    }

    /// The content id that the parent had, `None` for a disk without parent.
    pub fn parent_cid(&self) -> Result<Option<u32>> {
        match self.get("parentCID") {
            None => Ok(None),
            Some(text) => match hex(text) {
                Some(NO_PARENT) => Ok(None),
                Some(cid) => Ok(Some(cid)),
                None => Err(Error::corrupt(format!("parentCID `{text}` is no hex number"))),
            },
        }
    }

    /// The text as it is now.
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    /// Gives the disk the content id `wanted`, or a new random one, written with as many digits as the old one so that
    /// no other byte of the text moves. The long form, where there is one, ends with the same
    /// digits. Without a CID the text stays as it is.
    pub fn set_content_id(&mut self, wanted: Option<u32>) {
        let (Some(old), Some(digits)) = (self.cid(), self.setting("CID").map(|s| s.at.len()))
        else {
            return;
        };
        if digits > 8 || digits == 0 || wanted == Some(old) {
            return;
        }
        let mask = u32::MAX >> (32 - 4 * digits);
        let cid = wanted.filter(|cid| cid & !mask == 0).unwrap_or_else(|| {
            loop {
                let cid = fastrand::u32(..) & mask;
                if ![old, NO_PARENT, NEVER_WRITTEN].contains(&cid) {
                    break cid;
                }
            }
        });
        self.replace("CID", &format!("{cid:0digits$x}"));
        let long = self.setting("ddb.longContentID").map_or(0, |s| s.at.len());
        if long == 32 {
            let random = fastrand::u128(..) >> 32;
            self.replace("ddb.longContentID", &format!("{random:024x}{cid:08x}"));
        }
    }

    /// The text with another parent; everything else as it is.
    pub fn with_parent(&self, cid: u32, hint: &str) -> Result<Vec<u8>> {
        let Some(hint) = self.charset.encode(hint) else {
            return Err(Error::invalid("the descriptor's encoding cannot hold the parent's name"));
        };
        let cid = format!("{cid:08x}").into_bytes();
        let mut changes = Vec::new();
        for setting in &self.settings {
            if setting.key.eq_ignore_ascii_case("parentCID") {
                changes.push((setting.at.clone(), cid.clone()));
            } else if setting.key.eq_ignore_ascii_case("parentFileNameHint") {
                changes.push((setting.at.clone(), hint.clone()));
            }
        }
        if self.get("parentFileNameHint").is_none() {
            // A line of its own, in front of the one with the CID.
            let at = self.setting("parentCID").map_or(0, |s| s.at.start);
            let line = self.text[..at].iter().rposition(|b| *b == b'\n').map_or(0, |lf| lf + 1);
            let new = [&b"parentFileNameHint=\""[..], &hint, b"\"\n"].concat();
            changes.push((line..line, new));
        }
        Ok(self.changed(changes))
    }

    /// The text without a parent; everything else as it is.
    pub fn without_parent(&self) -> Vec<u8> {
        let mut changes = Vec::new();
        for setting in &self.settings {
            if setting.key.eq_ignore_ascii_case("parentCID") {
                changes.push((setting.at.clone(), format!("{NO_PARENT:08x}")));
            } else if setting.key.eq_ignore_ascii_case("parentFileNameHint") {
                let behind =
                    |at: usize| self.text[..at].iter().filter(|b| **b == b'\n').count() + 1;
                changes.push((self.line_range(behind(setting.at.start)), String::new()));
            }
        }
        self.changed(changes)
    }

    /// The text with other values; keys that are not there follow behind everything.
    pub fn with_settings(&self, settings: &[(&str, String)]) -> Result<Vec<u8>> {
        let (mut changes, mut more) = (Vec::new(), Vec::new());
        for (key, value) in settings {
            let what = "the descriptor's encoding cannot hold the value";
            let value = self.charset.encode(value).ok_or_else(|| Error::invalid(what))?;
            match self.setting(key) {
                Some(setting) => changes.push((setting.at.clone(), value)),
                None => more.push([key.as_bytes(), b" = \"", &value, b"\"\n"].concat()),
            }
        }
        let mut text = self.changed(changes);
        if !more.is_empty() && !text.ends_with(b"\n") {
            text.push(b'\n');
        }
        text.extend(more.concat());
        Ok(text)
    }

    /// The text with other names of files: of extents, by their index, and of the record of changes.
    pub fn with_names(&self, extents: &[(usize, String)], record: Option<&str>) -> Result<Vec<u8>> {
        let encode = |name: &str| {
            let what = "the descriptor's encoding cannot hold the name";
            self.charset.encode(name).ok_or_else(|| Error::invalid(what))
        };
        let mut changes = Vec::new();
        for (index, name) in extents {
            let Some(extent) = self.extents.get(*index) else { continue };
            let line = self.line_range(extent.line);
            let quotes = self.text[line.clone()].iter().enumerate().filter(|(_, b)| **b == b'"');
            let quotes: Vec<_> = quotes.map(|(at, _)| line.start + at).take(2).collect();
            if let [open, close] = quotes[..] {
                changes.push((open + 1..close, encode(name)?));
            }
        }
        if let (Some(name), Some(setting)) = (record, self.setting("changeTrackPath")) {
            changes.push((setting.at.clone(), encode(name)?));
        }
        Ok(self.changed(changes))
    }

    /// The text for extents of other sizes, in sectors: the first ones keep their lines, further lines
    /// follow the last of them, and those of the other extents go. `settings` are values to replace
    /// where there are such keys.
    pub fn with_extents(
        &self,
        sizes: &[u64],
        more: &[String],
        settings: &[(&str, String)],
    ) -> Vec<u8> {
        let mut changes = Vec::new();
        let mut behind = 0;
        for (index, extent) in self.extents.iter().enumerate() {
            let line = self.line_range(extent.line);
            let Some(size) = sizes.get(index) else {
                changes.push((line, String::new()));
                continue;
            };
            behind = line.end;
            let mut words = self.text[line.clone()].split(|b| b.is_ascii_whitespace());
            let blank = |word: &[u8]| word.is_empty();
            let mut at = line.start;
            // Over leading blanks, the word for the access, and the blanks behind it.
            let mut seen = 0;
            for word in &mut words {
                if !blank(word) {
                    seen += 1;
                }
                if seen == 2 {
                    changes.push((at..at + word.len(), size.to_string()));
                    break;
                }
                at += word.len() + 1;
            }
        }
        if !more.is_empty() {
            let end = if self.text[..behind].ends_with(b"\r\n") { "\r\n" } else { "\n" };
            let lone = !self.text[..behind].ends_with(b"\n");
            let mut lines = if lone { end.to_owned() } else { String::new() };
            for line in more {
                lines.push_str(line);
                lines.push_str(end);
            }
            changes.push((behind..behind, lines));
        }
        for (key, value) in settings {
            if let Some(setting) = self.setting(key) {
                changes.push((setting.at.clone(), value.clone()));
            }
        }
        self.changed(changes)
    }

    /// The bytes of line `number`, from 1, with its end.
    fn line_range(&self, number: usize) -> Range<usize> {
        let mut lines = self.text.split_inclusive(|b| *b == b'\n');
        let start = lines.by_ref().take(number - 1).map(<[u8]>::len).sum();
        start..start + lines.next().map_or(0, <[u8]>::len)
    }

    /// The text with parts of it replaced.
    fn changed<T: Into<Vec<u8>>>(&self, mut changes: Vec<(Range<usize>, T)>) -> Vec<u8> {
        changes.sort_by_key(|(at, _)| at.start);
        let mut text = self.text.clone();
        for (at, value) in changes.into_iter().rev() {
            text.splice(at, value.into());
        }
        text
    }

    /// Replaces a value by one of the same length.
    fn replace(&mut self, key: &str, value: &str) {
        let Some(setting) = self.settings.iter_mut().find(|s| s.key.eq_ignore_ascii_case(key))
        else {
            return;
        };
        debug_assert_eq!(setting.at.len(), value.len());
        self.text[setting.at.clone()].copy_from_slice(value.as_bytes());
        setting.value = value.to_owned();
    }
}

/// The access that a line's first word stands for, if it is such a word.
fn access_word(line: &[u8]) -> Option<ExtentAccess> {
    let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
    let words: [(&[u8], ExtentAccess); 3] = [
        (b"RW", ExtentAccess::ReadWrite),
        (b"RDONLY", ExtentAccess::ReadOnly),
        (b"NOACCESS", ExtentAccess::None),
    ];
    words.into_iter().find(|(word, _)| line[..end].eq_ignore_ascii_case(word)).map(|(_, a)| a)
}

/// The first word of `text`, and what follows it without leading blanks.
fn next_word(text: &str) -> (&str, &str) {
    let end = text.find([' ', '\t']).unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

/// A number of 1 to 8 hexadecimal digits.
fn hex(text: &str) -> Option<u32> {
    let digits = text.trim();
    let plain = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn parse(text: &str) -> Descriptor {
        Descriptor::parse(text.as_bytes()).unwrap()
    }

    /// What is wrong with the text: as a whole, or with one line.
    fn refused(text: &str) -> String {
        match Descriptor::parse(text.as_bytes()) {
            Ok(parsed) => parsed.broken.into_iter().next().expect(text),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt);
                error.what().to_owned()
            }
        }
    }

    const ESX: &str = "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=0172e8a4\n\
        parentCID=ffffffff\ncreateType=\"vmfs\"\n\n# Extent description\n\
        RW 4096 VMFS \"thick-flat.vmdk\"\n\n# The Disk Data Base \n#DDB\n\n\
        ddb.adapterType = \"lsilogic\"\n\
        ddb.longContentID = \"c493b057f416b9534001df440172e8a4\"\n";

    #[test]
    fn an_esx_descriptor() {
        let d = parse(ESX);
        assert_eq!((d.cid(), d.parent_cid().unwrap()), (Some(0x0172_e8a4), None));
        assert_eq!((d.create_type(), d.get("DDB.adaptertype")), ("vmfs", Some("lsilogic")));
        let line = ExtentLine {
            access: ExtentAccess::ReadWrite,
            sectors: 4096,
            kind: ExtentType::Vmfs,
            name: Some("thick-flat.vmdk".into()),
            offset: None,
            line: 9,
        };
        assert_eq!(d.extents, [line]);
        assert!(d.warnings.is_empty());
    }

    #[test]
    fn lines_of_extents_change_and_everything_else_stays() {
        let text = "version=1\r\nCID=1\r\n  RW  10 SPARSE \"a b 10.vmdk\"\r\nRW 7 ZERO\r\n\r\n\
            ddb.geometry.cylinders = \"1\"\r\n";
        let d = parse(text);
        let cylinders = [("ddb.geometry.cylinders", "12".to_owned()), ("ddb.other", String::new())];
        assert_eq!(
            String::from_utf8(d.with_extents(&[4], &[], &cylinders)).unwrap(),
            "version=1\r\nCID=1\r\n  RW  4 SPARSE \"a b 10.vmdk\"\r\n\r\n\
             ddb.geometry.cylinders = \"12\"\r\n"
        );
        let more = ["RW 3 SPARSE \"c\"".to_owned()];
        assert_eq!(
            String::from_utf8(d.with_extents(&[10, 1000], &more, &[])).unwrap(),
            text.replace("7 ZERO\r\n", "1000 ZERO\r\nRW 3 SPARSE \"c\"\r\n")
        );
        let bare = parse("version=1\nRW 10 FLAT \"x\" 0");
        assert_eq!(
            bare.with_extents(&[11], &more, &[]),
            b"version=1\nRW 11 FLAT \"x\" 0\nRW 3 SPARSE \"c\"\n"
        );
    }

    #[test]
    fn shapes_that_other_writers_use() {
        // CRLF, blanks around `=`, missing quotes, trailing blanks, odd case, no title.
        let d = parse(
            "\r\n#Disk Descriptor File\r\nVERSION = 1 \r\ncid=fbedfc5\r\nparentCID = \"FFFFFFFF\"\r\n\
             createtype = monolithicFlat \r\nrw\t63  flat \"a b=c.vmdk\" 0\r\n\
             NOACCESS 0 ZERO \r\nRDONLY 10 SPARSE \"x.vmdk\"\r\nRW 7 ZERO \r\n\
             RW 5 FLAT \"\\\\.\\PhysicalDrive0\" 63 uuid-1 dev-1\r\nddb.comment=\"\"",
        );
        assert_eq!((d.cid(), d.create_type()), (Some(0x0fbe_dfc5), "monolithicFlat"));
        assert_eq!(d.parent_cid().unwrap(), None);
        assert_eq!(d.get("ddb.comment"), Some(""));
        let seen: Vec<_> = d
            .extents
            .iter()
            .map(|e| (e.sectors, e.kind.word(), e.offset, e.name.as_deref()))
            .collect();
        assert_eq!(
            seen,
            [
                (63, "FLAT", Some(0), Some("a b=c.vmdk")),
                (10, "SPARSE", None, Some("x.vmdk")),
                (7, "ZERO", None, None),
                (5, "FLAT", Some(63), Some(r"\\.\PhysicalDrive0")),
            ]
        );
        assert_eq!(d.extents[1].access, ExtentAccess::ReadOnly);
    }

    #[test]
    fn whole_keys_are_matched() {
        let d = parse("version=1\nparentCID=12\nCID=34\n");
        assert_eq!((d.cid(), d.parent_cid().unwrap()), (Some(0x34), Some(0x12)));
    }

    #[test]
    fn text_after_the_first_nul_does_not_count() {
        let d = Descriptor::parse(b"version=1\nCID=1\n\0\0garbage \" \r x").unwrap();
        assert_eq!((d.cid(), d.text().len()), (Some(1), 16));
    }

    #[test]
    fn encodings() {
        let d = parse("version=1\nRW 1 FLAT \"ä.vmdk\" 0\n");
        assert_eq!(d.extents[0].name.as_deref(), Some("ä.vmdk"));
        let d = Descriptor::parse(
            b"version=1\nencoding=\"windows-1252\"\nRW 1 FLAT \"\xe4\x80.vmdk\" 0\n",
        );
        assert_eq!(d.unwrap().extents[0].name.as_deref(), Some("ä€.vmdk"));
        let d = Descriptor::parse(b"version=1\nRW 1 FLAT \"\xe4.vmdk\" 0\n").unwrap();
        assert_eq!(d.extents[0].name.as_deref(), Some("ä.vmdk"));
        let name = |text: &[u8]| Descriptor::parse(text).unwrap().extents[0].name.clone().unwrap();
        // The second byte of a character may be an ASCII letter, a backslash or a bracket.
        for (label, bytes, text) in [
            ("GBK", &b"\xc4\xe3\x81\x5c"[..], "你乗"),
            ("ms936", b"\xc4\xe3", "你"),
            ("Big5", b"\xb3\x5c\xa4\x40", "許一"),
            ("windows-950", b"\xa4\x40", "一"),
            ("Shift_JIS", b"\x83\x5c\x95\x5c", "ソ表"),
            ("cp932", b"\xb1", "ｱ"),
            ("EUC-KR", b"\xc7\xd1", "한"),
            ("windows-949", b"\xc7\xd1", "한"),
            ("windows-1250", b"\x9elu\x9d", "žluť"),
            ("windows-1251", b"\xc4\xe8\xf1\xea", "Диск"),
            ("windows-1253", b"\xc4", "Δ"),
        ] {
            for key in ["encoding=", "ddb.encoding = "] {
                let line = format!("{key}\"{label}\"\nRW 1 FLAT \"");
                let whole = [line.as_bytes(), bytes, b".vmdk\" 0\n"].concat();
                assert_eq!(name(&whole), format!("{text}.vmdk"), "{label}");
            }
        }
        let unknown = name(b"encoding=\"KLINGON\"\nRW 1 FLAT \"\xc4\xe3.vmdk\" 0\n");
        assert_eq!(unknown, "\u{fffd}\u{fffd}.vmdk");
        // Quotes and line ends are no ASCII there.
        assert_eq!(name(b"encoding=\"UTF-16LE\"\nRW 1 FLAT \"\xe4\" 0\n"), "\u{fffd}");
    }

    #[test]
    fn a_parent_is_named_in_the_descriptors_own_code_page() {
        let text = b"encoding=\"GBK\"\nparentCID=00000001\nRW 1 FLAT \"a\" 0\n";
        let child = Descriptor::parse(text).unwrap();
        let again = Descriptor::parse(&child.with_parent(2, "父.vmdk").unwrap()).unwrap();
        assert_eq!(again.get("parentFileNameHint"), Some("父.vmdk"));
        assert!(again.text().windows(2).any(|pair| pair == b"\xb8\xb8"));
        assert!(child.with_parent(2, "😀.vmdk").is_err());
    }

    #[test]
    fn lines_that_are_no_extents_can_be_left_out() {
        let text = b"version=1\nCID=1\nRW 5 SPARSE \"a\"\nddb.x = \"1\nddb.no";
        let d = Descriptor::parse(text).unwrap();
        assert_eq!((d.extents.len(), d.broken.len(), d.cid()), (1, 2, Some(1)));
        // What was an extent line moves everything behind it.
        assert!(Descriptor::parse(b"CID=1\nRW 5 SPARSE \"a\n").is_err());
    }

    #[test]
    fn lines_of_no_known_shape_are_refused() {
        assert!(refused("version=1\nRX 5 FLAT \"a=b\" 0\n").contains("line 2: neither"));
        assert!(refused("version=1\nhello\n").contains("line 2: neither"));
        assert!(refused("version=1\nRW 5 FLOT \"a\" 0\n").contains("unknown extent type `FLOT`"));
        assert!(refused("RW x FLAT \"a\" 0").contains("no size"));
        assert!(refused("RW -5 FLAT \"a\" 0").contains("no size"));
        assert!(refused("RW 5 FLAT \"a\" b").contains("no offset"));
        assert!(refused("RW 5 FLAT \"a").contains("not closed"));
        assert!(refused("RW 5 FLAT").contains("without a file name"));
        assert!(refused("RW 5 SPARSE \"a\" 1").contains("at an offset"));
        assert!(refused("CID=\"1").contains("not closed"));
        assert!(refused("CID=\"1\"2\"").contains("quote inside"));
        assert!(refused("a=1\rb=2\n").contains("carriage return"));
        assert!(refused(&"\n".repeat(65_536)).contains("65536 lines"));
        assert!(refused(&"RW 1 ZERO\n".repeat(4097)).contains("4096 extents"));
    }

    #[test]
    fn a_key_set_twice_is_noticed() {
        assert!(!parse("CID=1\nCID=1\n").ambiguous);
        assert!(parse("CID=1\ncid=2\n").ambiguous);
        let d = parse("ddb.a = \"1\"\nddb.a = \"2\"\n");
        assert_eq!((d.ambiguous, d.warnings.len(), d.get("ddb.a")), (false, 1, Some("1")));
    }

    #[test]
    fn a_new_content_id_moves_nothing() {
        let mut d = parse(ESX);
        d.set_content_id(None);
        let cid = d.cid().unwrap();
        assert!(cid != 0x0172_e8a4 && d.text().len() == ESX.len());
        let again = Descriptor::parse(d.text()).unwrap();
        assert_eq!(again.cid(), Some(cid));
        let long = again.get("ddb.longContentID").unwrap();
        assert!(long.ends_with(&format!("{cid:08x}")) && !long.starts_with("c493"));
        let others = |text: &[u8]| {
            let text = String::from_utf8(text.to_vec()).unwrap();
            text.lines()
                .filter(|l| !l.starts_with("CID=") && !l.starts_with("ddb.long"))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(others(again.text()), others(ESX.as_bytes()));
    }

    #[test]
    fn a_short_content_id_stays_short() {
        let mut d = parse("version=1\nCID=fbedfc5\nparentCID=ffffffff\n");
        d.set_content_id(None);
        assert_eq!(d.get("CID").map(str::len), Some(7));
        let mut none = parse("version=1\nparentCID=ffffffff\n");
        none.set_content_id(None);
        assert_eq!(none.text(), b"version=1\nparentCID=ffffffff\n");
    }

    #[test]
    fn descriptors_are_recognised_by_their_first_setting_or_title() {
        for text in [
            "# Disk DescriptorFile\nversion=1\n",
            "#disk descriptorfile\n",
            "\n  \n# x\nversion = 1\n",
            "version=3\r\n",
        ] {
            assert!(looks_like(text.as_bytes()), "{text}");
        }
        for text in ["", "\n", "# x\n", "versions=1", "version", "version=a", "CID=1\nversion=1\n"]
        {
            assert!(!looks_like(text.as_bytes()), "{text}");
        }
    }
}
