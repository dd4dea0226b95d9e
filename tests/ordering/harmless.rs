//! Syncs and orders whose absence no crash shows, and why.

/// What nothing shows: the sync, the earlier and the later write (`*` for any end; neither for all that
/// the sync does), and why.
pub const HARMLESS: &[(&str, &str, &str, &str)] = &[
    // What only promises: no tables changed, so no order is needed.
    ("payload", "*", "*", PROMISE),
    ("vhd/blocks.rs flush", "*", "*", PROMISE),
    ("vhdx/session.rs flush_session 1", "payload", "payload", PROMISE),
    ("vmdk/write.rs flush_all by sync_written", "payload", "payload", PROMISE),
    // VHD.
    ("vhd/blocks.rs close", "", "", "the copy opens the image; others read the last footer only"),
    ("vhd/blocks.rs close", "*", "*", FOOTER),
    ("*", "vhd/blocks.rs close", "*", FOOTER),
    ("*", "vhd/space.rs move_footer", "*", FOOTER),
    ("*", "*", "vhd/space.rs move_footer", FOOTER),
    ("vhd/blocks.rs write_out 1", "vhd/blocks.rs plan_blocks", "vhd/bat.rs write", UNREAD),
    ("vhd/blocks.rs write_out 2", "*", "vhd/blocks.rs plan_blocks", UNREAD),
    (
        "vhd/blocks.rs write_out 1",
        "vhd/differencing.rs new_block",
        "vhd/bitmaps.rs write",
        "the later goes over the whole of the earlier",
    ),
    (
        "vhd/blocks.rs write_out 2",
        "*",
        "vhd/differencing.rs new_block",
        "children never free a block, so no table in the file leads there",
    ),
    ("vhd/blocks.rs write_out 2", "vhd/bitmaps.rs write", "payload", "as for new blocks"),
    ("vhd/blocks.rs write_out 2", "*", "vhd/blocks.rs release", DISCARDED),
    (
        "vhd/blocks.rs write_out 2",
        "*",
        "vhd/blocks.rs close",
        "the footer goes where a freed block had its bitmap, which nobody reads",
    ),
    ("vhd/create.rs create_sparse", "vhd/create.rs create_sparse", "*", NO_IMAGE),
    ("vhd/relink.rs relink 3", "", "", "not both footers at once, should the host tear a sector"),
    ("vhd/relink.rs relink 3", "*", "*", "either footer leads to a whole header"),
    // VHDX.
    ("vhdx/create.rs write 1", "vhdx/create.rs write_bat", "*", "no table reads as zeroes, too"),
    (
        "vhdx/session.rs begin_session by update 1",
        "",
        "",
        "the format asks for it; nobody can tell",
    ),
    ("*", "vhdx/session.rs begin_session by update", "*", OTHER_HEADER),
    ("*", "vhdx/session.rs start_log by update", "*", OTHER_HEADER),
    ("*", "vhdx/session.rs end_session by update", "*", OTHER_HEADER),
    ("*", "vhdx/session.rs end_session", "*", "an unused end that is not cut off"),
    ("*", "vhdx/session.rs reuse", "*", "what is punched is not in use"),
    ("*", "*", "vhdx/session.rs reuse", DISCARDED),
    ("*", "*", "vhdx/space.rs extend", LONGER),
    ("*", "vhdx/session.rs repair_region_tables", "*", "the other copy is intact"),
    (
        "vhdx/session.rs flush_session 1",
        "vhdx/session.rs flush_session by apply",
        "payload",
        "the log has the pages",
    ),
    (
        "vhdx/session.rs flush_session 1",
        "vhdx/writes.rs add_bitmap",
        "vhdx/session.rs flush_session by append",
        "the log has all bits that mean something",
    ),
    // VMDK.
    (
        "vmdk/write.rs begin by sync_written",
        "vmdk/walk.rs renew_redundant",
        "*",
        "the mark is there still, so they are renewed again",
    ),
    (
        "vmdk/write.rs begin by sync_written",
        "vmdk/write.rs mark_unclean",
        "*",
        "the mark is for changed tables, which wait for one more sync",
    ),
    (
        "vmdk/write.rs begin by sync_written",
        "vmdk/write.rs complete_last_sector",
        "*",
        "what is written there makes the file as long",
    ),
    ("vmdk/write.rs begin by sync_written", "vmdk/write.rs begin", "vmdk/write.rs *", NO_CONTENTS),
    (
        "vmdk/write.rs finish by sync_written",
        "",
        "",
        "a mark that stays, or an end that does, costs the next writer a walk",
    ),
    ("vmdk/write.rs finish by sync_written", "*", "*", "as without the sync"),
    ("*", "vmdk/write.rs reclaim", "*", "what is punched is not in use"),
    ("*", "*", "vmdk/write.rs reclaim", DISCARDED),
    ("*", "*", "vmdk/space.rs grow", LONGER),
    ("*", "vmdk/write.rs plan", "*", BEHIND),
    ("*", "*", "vmdk/write.rs plan", BEHIND),
    ("*", "*", "vmdk/cowd.rs write_free_sector", "a hint for other programs"),
    (
        "vmdk/write.rs flush_all by sync_written",
        "vmdk/write.rs write_tables",
        "vmdk/write.rs finish",
        "where something was freed, punching it brings one more sync",
    ),
    (
        "vmdk/write.rs flush_all by sync_written",
        "vmdk/write.rs write_tables",
        "vmdk/write.rs write_tables",
        "tables that change without payload only free",
    ),
    ("vmdk/write.rs flush_all by sync_written", "payload", "vmdk/write.rs finish", TRIM),
    (
        "vmdk/write.rs flush_all by sync_written",
        "payload",
        "vmdk/write.rs mark_unclean",
        NO_CONTENTS,
    ),
];

const PROMISE: &str = "a promise only: where no table changes there is no order to keep";
const FOOTER: &str = "the copy of the footer at the beginning is intact";
const UNREAD: &str = "dynamic disks are read without their bitmaps";
const DISCARDED: &str = "what is punched was discarded: zeroes are as good as what was there";
const LONGER: &str = "a longer file changes nothing";
const NO_IMAGE: &str = "what has no header does not open, and is not there yet";
const OTHER_HEADER: &str = "the header in the other slot says the same, or what was true before";
const NO_CONTENTS: &str = "the contents of the disk stay as they are";
const BEHIND: &str = "zeroes behind the end of the disk";
const TRIM: &str = "what is cut off is not in use";
