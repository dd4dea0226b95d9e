//! Contents that say where and when they were written: every 16 bytes hold the number of the write
//! and their own place on the disk, so that a byte in the wrong place betrays where it is from.

const CELL: u64 = 16;
const MARK: [u8; 4] = *b"\xf1at\xd1";

fn cell(stamp: u32, index: u64) -> [u8; CELL as usize] {
    let mut bytes = [0; CELL as usize];
    bytes[..4].copy_from_slice(&MARK);
    bytes[4..8].copy_from_slice(&stamp.to_be_bytes());
    bytes[8..].copy_from_slice(&index.to_be_bytes());
    bytes
}

/// Fills `buf`, which lies at byte `at` of the disk, with the contents of write number `stamp`.
pub fn fill(stamp: u32, at: u64, buf: &mut [u8]) {
    let mut done = 0;
    while done < buf.len() {
        let pos = at + done as u64;
        let cell = &cell(stamp, pos / CELL)[(pos % CELL) as usize..];
        let part = cell.len().min(buf.len() - done);
        buf[done..done + part].copy_from_slice(&cell[..part]);
        done += part;
    }
}

/// `len` bytes of write number `stamp` at byte `at` of the disk.
pub fn bytes(stamp: u32, at: u64, len: u64) -> Vec<u8> {
    let mut buf = vec![0; len as usize];
    fill(stamp, at, &mut buf);
    buf
}

/// What some bytes are, for people. They begin at a multiple of 16 on the disk.
pub fn describe(bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut last = String::new();
    for (index, cell) in bytes.chunks(CELL as usize).enumerate() {
        let now = if cell.iter().all(|byte| *byte == 0) {
            "zeroes".to_owned()
        } else if cell.len() == 16 && cell[..4] == MARK {
            let stamp = u32::from_be_bytes(cell[4..8].try_into().unwrap());
            let place = u64::from_be_bytes(cell[8..].try_into().unwrap()) * CELL;
            format!("write {stamp} of sector {}", place / 512)
        } else {
            "other bytes".to_owned()
        };
        if now != last {
            if !text.is_empty() {
                text += &format!(" until byte {}, then ", index * CELL as usize);
            }
            text += &now;
            last = now;
        }
    }
    text
}
