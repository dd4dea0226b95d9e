//! Syncs and orders whose absence no crash shows, and why.

/// What nothing shows: the sync, the earlier and the later write (`*` for any end; neither for all that
/// the sync does), and why.
pub const HARMLESS: &[(&str, &str, &str, &str)] = &[
    // What only promises: no tables changed, so no order is needed.
    ("payload", "payload", "payload", PROMISE),
    ("vhd sync: payload", "payload", "payload", PROMISE),
    ("vhd sync: payload", "vhd/blocks.rs close", "payload", PROMISE),
    ("vhd sync: payload", "vhd/space.rs move_footer", "payload", PROMISE),
    ("vhd sync: payload", "*", "vhd/blocks.rs close", PROMISE),
    ("vhd sync: payload", "*", "vhd/blocks.rs plan_blocks", PROMISE),
    ("vhd sync: payload", "*", "vhd/differencing.rs new_block", PROMISE),
    ("vhd sync: payload", "*", "vhd/space.rs move_footer", PROMISE),
    ("vhdx sync: payload", "payload", "payload", PROMISE),
    ("vmdk sync: payload", "payload", "payload", PROMISE),
    // VHD.
    ("vhd sync: closing", "", "", "the copy opens the image; others read the last footer only"),
    ("vhd sync: closing", "*", "*", FOOTER),
    ("vhd sync: renewed footer", "vhd/blocks.rs close", "vhd/blocks.rs repair_head", FOOTER),
    ("vhd sync: payload", "vhd/blocks.rs close", "vhd/bitmaps.rs write", FOOTER),
    ("vhd sync: payload", "vhd/space.rs move_footer", "vhd/bitmaps.rs write", FOOTER),
    ("vhd sync: tables", "vhd/bat.rs write", "vhd/space.rs move_footer", FOOTER),
    ("vhd sync: tables", "vhd/bitmaps.rs write", "vhd/space.rs move_footer", FOOTER),
    ("vhd sync: payload", "vhd/blocks.rs plan_blocks", "vhd/bat.rs write", UNREAD),
    ("vhd sync: tables", "vhd/bat.rs write", "vhd/blocks.rs plan_blocks", UNREAD),
    (
        "vhd sync: payload",
        "vhd/differencing.rs new_block",
        "vhd/bitmaps.rs write",
        "the later goes over the whole of the earlier",
    ),
    (
        "vhd sync: tables",
        "vhd/bat.rs write",
        "vhd/differencing.rs new_block",
        "children never free a block, so no table in the file leads there",
    ),
    (
        "vhd sync: tables",
        "vhd/bitmaps.rs write",
        "vhd/differencing.rs new_block",
        "children never free a block, so no table in the file leads there",
    ),
    ("vhd sync: tables", "vhd/bitmaps.rs write", "payload", "as for new blocks"),
    ("vhd sync: tables", "vhd/bat.rs write", "vhd reclaim", DISCARDED),
    (
        "vhd sync: tables",
        "vhd/bat.rs write",
        "vhd/blocks.rs close",
        "the footer goes where a freed block had its bitmap, which nobody reads",
    ),
    (
        "vhd sync: tables",
        "vhd/bitmaps.rs write",
        "vhd/blocks.rs close",
        "the footer goes where a freed block had its bitmap, which nobody reads",
    ),
    (
        "vhd/create.rs create_sparse",
        "vhd/create.rs create_sparse",
        "vhd/create.rs create_sparse",
        NO_IMAGE,
    ),
    (
        "vhd/create.rs create_sparse",
        "vhd/create.rs create_sparse",
        "vhd/create.rs finish",
        NO_IMAGE,
    ),
    ("vhd/relink.rs relink 3", "", "", TORN_FOOTERS),
    (
        "vhd/relink.rs relink 3",
        "vhd/relink.rs relink",
        "vhd/relink.rs relink",
        "either footer leads to a whole header",
    ),
    // VHDX.
    (
        "vhdx/create.rs write 1",
        "vhdx/create.rs write_bat",
        "vhdx/create.rs write",
        "no table reads as zeroes, too",
    ),
    ("vhdx/create.rs write 1", "vhdx/create.rs write", "vhdx/create.rs write", NO_IMAGE),
    (
        "vhdx/session.rs begin_session by update 1",
        "",
        "",
        "the format asks for it; nobody can tell",
    ),
    (
        "vhdx/session.rs begin_session by update 1",
        "vhdx/session.rs begin_session by update",
        "vhdx/session.rs begin_session by apply",
        OTHER_HEADER,
    ),
    (
        "vhdx/session.rs begin_session by update 1",
        "vhdx/session.rs begin_session by update",
        "vhdx/session.rs begin_session by update",
        OTHER_HEADER,
    ),
    (
        "vhdx/session.rs begin_session by update 2",
        "vhdx/session.rs begin_session by update",
        "vhdx/log/ring.rs start by append",
        OTHER_HEADER,
    ),
    (
        "vhdx/session.rs begin_session by update 2",
        "vhdx/session.rs begin_session by update",
        "vhdx/session.rs begin_session by update",
        OTHER_HEADER,
    ),
    ("*", "vhdx/session.rs start_log by update", "*", OTHER_HEADER),
    (
        "vhdx/session.rs end_session by update",
        "vhdx/session.rs end_session by update",
        "vhdx/log/ring.rs start by append",
        OTHER_HEADER,
    ),
    (
        "vhdx/session.rs end_session by update",
        "vhdx/session.rs end_session by update",
        "vhdx/session.rs end_session",
        OTHER_HEADER,
    ),
    (
        "vhdx/session.rs end_session by update",
        "vhdx/session.rs end_session by update",
        "vhdx/session.rs end_session by update",
        OTHER_HEADER,
    ),
    (
        "vhdx/log/ring.rs start by append",
        "vhdx/session.rs end_session",
        "vhdx/session.rs start_log by update",
        "an unused end that is not cut off",
    ),
    (
        "vhdx sync: closing",
        "vhdx reclaim",
        "vhdx/session.rs end_session by update",
        "what is punched is not in use",
    ),
    (
        "vhdx/session.rs publish by append",
        "vhdx/session.rs publish by append",
        "vhdx reclaim",
        DISCARDED,
    ),
    ("vhdx sync: payload", "payload", "vhdx grow", LONGER),
    ("vhdx sync: payload", "vhdx/session.rs publish by apply", "vhdx grow", LONGER),
    ("vhdx sync: payload", "vhdx/session.rs repair_region_tables", "vhdx grow", LONGER),
    ("vhdx/session.rs publish by append", "vhdx/session.rs publish by append", "vhdx grow", LONGER),
    (
        "vhdx sync: payload",
        "vhdx/session.rs repair_region_tables",
        "payload",
        "the other copy is intact",
    ),
    (
        "vhdx sync: payload",
        "vhdx/session.rs repair_region_tables",
        "vhdx/session.rs publish by append",
        "the other copy is intact",
    ),
    ("vhdx sync: payload", "vhdx/session.rs publish by apply", "payload", "the log has the pages"),
    (
        "vhdx sync: payload",
        "vhdx/writes.rs add_bitmap",
        "vhdx/session.rs publish by append",
        "the log has all bits that mean something",
    ),
    // VMDK.
    (
        "vmdk sync: begin",
        "vmdk/walk.rs renew_redundant",
        "payload",
        "the mark is there still, so they are renewed again",
    ),
    (
        "vmdk sync: begin",
        "vmdk/walk.rs renew_redundant",
        "vmdk/write.rs plan",
        "the mark is there still, so they are renewed again",
    ),
    (
        "vmdk sync: begin",
        "vmdk/write.rs mark_unclean",
        "*",
        "the mark is for changed tables, which wait for one more sync",
    ),
    (
        "vmdk sync: begin",
        "vmdk/write.rs complete_last_sector",
        "payload",
        "what is written there makes the file as long",
    ),
    (
        "vmdk sync: begin",
        "vmdk/write.rs complete_last_sector",
        "vmdk/cowd.rs write_free_sector",
        "what is written there makes the file as long",
    ),
    (
        "vmdk sync: begin",
        "vmdk/write.rs complete_last_sector",
        "vmdk grow",
        "what is written there makes the file as long",
    ),
    ("vmdk sync: begin", "vmdk/write.rs begin", "vmdk/write.rs mark_unclean", NO_CONTENTS),
    ("vmdk sync: begin", "vmdk/write.rs begin", "vmdk/write.rs plan", NO_CONTENTS),
    (
        "vmdk sync: closing",
        "",
        "",
        "a mark that stays, or an end that does, costs the next writer a walk",
    ),
    ("vmdk sync: closing", "*", "*", "as without the sync"),
    ("vmdk sync: payload", "vmdk reclaim", "payload", "what is punched is not in use"),
    (
        "vmdk sync: payload",
        "vmdk reclaim",
        "vmdk/cowd.rs write_free_sector",
        "what is punched is not in use",
    ),
    ("vmdk sync: payload", "vmdk reclaim", "vmdk/write.rs finish", "what is punched is not in use"),
    (
        "vmdk sync: payload",
        "vmdk reclaim",
        "vmdk/write.rs mark_unclean",
        "what is punched is not in use",
    ),
    ("vmdk sync: tables", "vmdk/write.rs publish", "vmdk reclaim", DISCARDED),
    ("vmdk sync: begin", "vmdk/write.rs begin", "vmdk grow", LONGER),
    ("vmdk sync: payload", "payload", "vmdk grow", LONGER),
    ("vmdk sync: tables", "vmdk/write.rs publish", "vmdk grow", LONGER),
    ("vmdk sync: payload", "vmdk/write.rs plan", "vmdk/write.rs publish", BEHIND),
    ("vmdk sync: payload", "payload", "vmdk/write.rs plan", BEHIND),
    (
        "vmdk sync: payload",
        "payload",
        "vmdk/cowd.rs write_free_sector",
        "a hint for other programs",
    ),
    (
        "vmdk sync: tables",
        "vmdk/write.rs publish",
        "vmdk/cowd.rs write_free_sector",
        "a hint for other programs",
    ),
    (
        "vmdk sync: tables",
        "vmdk/write.rs publish",
        "vmdk/write.rs finish",
        "where something was freed, punching it brings one more sync",
    ),
    (
        "vmdk sync: tables",
        "vmdk/write.rs publish",
        "vmdk/write.rs publish",
        "tables that change without payload only free",
    ),
    ("vmdk sync: payload", "payload", "vmdk/write.rs finish", TRIM),
    ("vmdk sync: payload", "payload", "vmdk/write.rs mark_unclean", NO_CONTENTS),
    // Repairs of VHD.
    (MOVED, "vhd repair: nothing uses this space", CUT_OFF, "what is punched is not in use"),
    ("vhd repair: the footer's checksum // *", "", "", OTHER_FOOTER),
    (
        "vhd repair: the footer's checksum // *",
        "vhd repair: the footer's checksum",
        "vhd repair: the footer copy from the footer",
        OTHER_FOOTER,
    ),
    ("vhd repair: the footer's geometry // *", "", "", OTHER_FOOTER),
    (
        "vhd repair: the footer's geometry // *",
        "vhd repair: the footer's geometry",
        "vhd repair: the footer copy from the footer",
        OTHER_FOOTER,
    ),
    ("vhd repair: block is given up*", "", "", LED_NOWHERE),
    (
        "vhd repair: block is given up // *",
        "vhd repair: block is given up",
        "vhd repair: nothing uses this space",
        LED_NOWHERE,
    ),
    (
        "vhd repair: block is given up // *",
        "vhd repair: block is given up",
        "vhd repair: the footer behind the copies",
        "a sync follows before anything is put where the file grows",
    ),
    ("vhd repair: blocks to are given up*", "", "", LED_NOWHERE),
    (
        "vhd repair: blocks to are given up // *",
        "vhd repair: blocks to are given up",
        "vhd repair: nothing uses this space",
        LED_NOWHERE,
    ),
    (
        "vhd repair: blocks to are given up // *",
        "vhd repair: blocks to are given up",
        "vhd repair: the footer behind the last block",
        LED_NOWHERE,
    ),
    (COPIES, "", "", FOOTER),
    ("vhd repair: the footer behind the copies, all syncs behind", "", "", FOOTER),
    (
        COPIES,
        "vhd repair: the footer behind the copies",
        "vhd repair: a place of its own for block",
        FOOTER,
    ),
    ("vhd repair: block which shared its place*", "", "", SHARED),
    (
        "vhd repair: block which shared its place // *",
        "vhd repair: block which shared its place",
        "vhd repair: nothing uses this space",
        SHARED,
    ),
    (
        "vhd repair: block which shared its place // *",
        "vhd repair: block which shared its place",
        "vhd repair: the sector bitmap of block",
        UNREAD,
    ),
    ("vhd repair: the sector bitmap of block // *", "", "", UNREAD),
    (
        "vhd repair: the sector bitmap of block // *",
        "vhd repair: the sector bitmap of block",
        "vhd repair: nothing uses this space",
        UNREAD,
    ),
    // Repairs of VHDX.
    (PLAUSIBLE_TWICE, "", "", PLAUSIBLE),
    (PLAUSIBLE_TWICE, PLAUSIBLE_HEADER, PLAUSIBLE_HEADER, PLAUSIBLE),
    (PLAUSIBLE_ROUND, "", "", PLAUSIBLE),
    (
        PLAUSIBLE_ROUND,
        PLAUSIBLE_HEADER,
        "vhdx repair: a header that says the file was changed",
        PLAUSIBLE,
    ),
    ("vhdx repair: room for a log*", "", "", LOG_PAST_END),
    (
        "vhdx repair: room for a log / a header that names this log",
        "vhdx repair: room for a log",
        "vhdx repair: a header that names this log",
        LOG_PAST_END,
    ),
    ("vhdx repair: a header that names this log*", "", "", OTHER_HEADER),
    (
        "vhdx repair: a header that names this log / *",
        "vhdx repair: a header that names this log",
        "vhdx repair: a header that names this log",
        OTHER_HEADER,
    ),
    ("vhdx repair: block is given up*", "", "", HEADERS_FOLLOW),
    (
        "vhdx repair: block is given up // *",
        "*",
        "vhdx repair: a header that says the file was changed",
        HEADERS_FOLLOW,
    ),
    ("vhdx repair: block which shared its place*", "", "", HEADERS_FOLLOW),
    (
        "vhdx repair: block which shared its place // *",
        "vhdx repair: block which shared its place",
        "vhdx repair: a header that says the file was changed",
        HEADERS_FOLLOW,
    ),
    (
        "vhdx repair: a place of its own for block / block which shared its place",
        "vhdx repair: room for copies",
        "vhdx repair: block which shared its place",
        "the copies reach as far",
    ),
    ("vhdx repair: a header that says the file was changed / *", "", "", OTHER_HEADER),
    (
        "vhdx repair: a header that says the file was changed / *",
        "vhdx repair: a header that says the file was changed",
        "*",
        OTHER_HEADER,
    ),
    ("vhdx repair: a header that says the file was changed //", "", "", OTHER_HEADER),
    ("vhdx repair: a header that names no log any more //", "", "", OTHER_HEADER),
    (NO_LOG_TWICE, "", "", OTHER_HEADER),
    (NO_LOG_TWICE, NO_LOG, NO_LOG, OTHER_HEADER),
    // Repairs of VMDK.
    ("vmdk repair: grains of grain table are given up // nothing*", "", "", LED_NOWHERE),
    (
        "vmdk repair: grains of grain table are given up // nothing*",
        "vmdk repair: grains of grain table are given up",
        "vmdk repair: nothing uses this space",
        LED_NOWHERE,
    ),
    ("vmdk repair: a grain is cut short // *", "", "", LONGER),
    (
        "vmdk repair: a grain is cut short // *",
        "vmdk repair: a grain is cut short",
        "vmdk repair: nothing uses this space",
        LONGER,
    ),
    (GD_MARK, "", "", ONE_SECTOR),
    (GD_MARK, "vmdk repair: the place of the grain directory", MARK, ONE_SECTOR),
    // What only changes of chains do.
    ("vhd sync: renewed footer", "", "", TORN_FOOTERS),
    (
        "vhd sync: renewed footer",
        "vhd/blocks.rs begin_writes",
        "vhd/blocks.rs repair_head",
        "either footer leads to all of the parent, and the child is still there",
    ),
    (
        "vhd sync: tables",
        "vhd/bitmaps.rs write",
        "vhd/relink.rs relink",
        "the footer copy is written as it was",
    ),
    ("vmdk/relink.rs place", "vmdk/relink.rs place", "vmdk/write.rs begin", OLD_TEXT),
    ("vmdk/relink.rs place", "vmdk/relink.rs place", "vmdk/write.rs mark_unclean", OLD_TEXT),
    // The order of their stages.
    ("vhd merge*", "close of parent.vhd", "*", CLOSED),
    ("vhdx merge*", "close of parent.vhdx", "*", CLOSED),
    ("vmdk merge*", "close of parent*", "*", CLOSED),
    ("vmdk merge*", "close 2 of parent*", "*", CLOSED),
    ("vmdk rebase", "close of child-delta.vmdk", "relink", CLOSED),
    ("vhd merge and keep", "copy_own of parent.vhd", "relink", LINKED),
    ("vhd merge and keep", "flush of parent.vhd", "relink", LINKED),
    ("vhdx merge and keep", "flush of parent.vhdx", "relink", LINKED),
    ("vmdk merge and keep", "copy_own of parent-*", "relink", LINKED),
    ("vmdk merge and keep", "flush of parent-*", "relink", LINKED),
    ("vhdx merge*", "announce of child.vhdx", "close", HAS_ALL),
    ("vmdk merge and keep", "begin_writes of parent*", "relink", HAS_ALL),
    ("vmdk merge and keep", "begin_writes of parent*", "empty", HAS_ALL),
    ("vmdk merge and keep", "relink of child.vmdk", "empty", HAS_ALL),
    ("vmdk merge", "begin_writes of parent*", "remove", "nobody is left who knows the parent's id"),
    ("vmdk merge over siblings", "begin_writes of parent-*", "remove", "a mark only"),
    ("vmdk merge*", "begin_writes of parent.vmdk", "close 2", "merging again renews the id"),
    ("vmdk merge*", "copy_own of parent.vmdk", "begin_writes", SAME_TEXT),
    ("vmdk merge*", "copy_own of parent.vmdk", "close*", SAME_TEXT),
    ("vmdk merge*", "copy_own of parent.vmdk", "flush", SAME_TEXT),
    ("vmdk rebase", "copy_differences of child.vmdk", "close", SAME_TEXT),
    ("vmdk rebase", "copy_differences of child.vmdk", "flush", SAME_TEXT),
];

const MOVED: &str = "vhd repair: the footer behind the last block / nothing uses the space behind \
                     the last block";
const CUT_OFF: &str = "vhd repair: nothing uses the space behind the last block";
const NO_LOG: &str = "vhdx repair: a header that names no log any more";
const NO_LOG_TWICE: &str =
    "vhdx repair: a header that names no log any more / a header that names no log any more";
const MARK: &str = "vmdk repair: the mark of an extent not closed";
const GD_MARK: &str =
    "vmdk repair: the place of the grain directory // the mark of an extent not closed";

const COPIES: &str = "vhd repair: the footer behind the copies / a place of its own for block";
const PLAUSIBLE_HEADER: &str = "vhdx repair: a header from one whose checksum does not match";
const PLAUSIBLE_TWICE: &str = "vhdx repair: a header from one whose checksum does not match / a \
                               header from one whose checksum does not match";
const PLAUSIBLE_ROUND: &str = "vhdx repair: a header from one whose checksum does not match // a \
                               header that says the file was changed";

const LED_NOWHERE: &str = "what was given up led to nothing of the disk before, either";
const SHARED: &str = "the other block keeps the place; what only this one used is given back later";
const OTHER_FOOTER: &str = "either footer alone opens the same disk";
const PLAUSIBLE: &str = "what a crash leaves of the headers is as plausible as before";
const LOG_PAST_END: &str = "a log past the end of the file is what was there before";
const HEADERS_FOLLOW: &str =
    "the headers of the next round, with their syncs, come before its changes";
const CLOSED: &str = "all is durable before: what is left is a mark, or an unused end";
const LINKED: &str = "linking takes nothing from the child, which still has all of its own";
const HAS_ALL: &str = "the parent has everything by then";
const SAME_TEXT: &str = "while it is written to, the disk's descriptor says what it said before";
const TORN_FOOTERS: &str = "not both footers at once, should the host tear a sector";
const OLD_TEXT: &str = "zeroes where the header does not lead any more";
const ONE_SECTOR: &str = "both are in the header's sector";

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
