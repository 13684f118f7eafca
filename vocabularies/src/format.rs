//! The format of the tables, for the library and for `build.rs`.
//!
//! - The trie of all tokens is a double array. The child of a node for a byte is at the node's base XOR the byte.
//! - The tokens that end at nodes are in the order of the nodes' places. A token's index is the number of tokens that end
//!   before the block of its place, and its rank: the number of those that end before it within the block.
//! - Each token has a record: the two tokens that it is merged from, its longest proper prefix, and its length.
//! - A hash table maps two tokens to the token that they merge into.

/// A node has: the byte that leads to it (9 bits), whether a token ends here, and the base of its children.
const LABEL: u32 = 0x1ff;
const BASE_SHIFT: u32 = 10;
pub(crate) const ENDS_TOKEN: u32 = 1 << 9;
/// A place without a node: no byte leads to it.
#[allow(dead_code, reason = "only build.rs uses it")]
pub(crate) const UNUSED: u32 = 256;
/// Places of a block: so many that a byte can hold each rank.
pub(crate) const RANK_BLOCK: usize = 256;
/// The base of the root's children.
pub(crate) const ROOT_BASE: u32 = 256;
/// The base of nodes without children. No child has this base.
#[allow(dead_code, reason = "only build.rs uses it")]
pub(crate) const LEAF_BASE: u32 = 0;

#[allow(dead_code, reason = "only build.rs uses it")]
pub(crate) fn node(byte: u8, base: u32) -> u32 {
    (base << BASE_SHIFT) | u32::from(byte)
}

#[allow(dead_code, reason = "only build.rs uses it")]
pub(crate) fn label_of(node: u32) -> u32 {
    node & LABEL
}

/// The place of the node where the longest token at the start of the text ends. Every byte is a token, so only an
/// empty text has none.
#[inline]
pub(crate) fn longest_token(text: &[u8], node: impl Fn(usize) -> u32) -> Option<usize> {
    let (mut base, mut longest) = (ROOT_BASE, None);
    for byte in text {
        let place = (base ^ u32::from(*byte)) as usize;
        let node = node(place);
        if node & LABEL != u32::from(*byte) {
            break;
        }
        if node & ENDS_TOKEN != 0 {
            longest = Some(place);
        }
        base = node >> BASE_SHIFT;
    }
    longest
}

/// Bits of a token's id.
const ID_BITS: u32 = 18;
const ID: u64 = (1 << ID_BITS) - 1;
/// No token has this id.
pub(crate) const NO_TOKEN: u32 = (1 << ID_BITS) - 1;

/// What is recorded of a token, in 62 bits.
#[derive(Clone, Copy)]
pub(crate) struct Record(pub(crate) u64);

#[allow(clippy::cast_possible_truncation, reason = "the fields have 18 and 8 bits")]
impl Record {
    #[allow(dead_code, reason = "only build.rs uses it")]
    pub(crate) fn new(left: u32, right: u32, prefix: u32, length: u32) -> Self {
        let [left, right, prefix, length] = [left, right, prefix, length].map(u64::from);
        Self(left | (right << ID_BITS) | (prefix << (2 * ID_BITS)) | (length << (3 * ID_BITS)))
    }

    /// The tokens that this token is merged from. A single byte is not merged: both are the token itself.
    #[inline]
    pub(crate) fn left(self) -> u32 {
        (self.0 & ID) as u32
    }

    #[inline]
    pub(crate) fn right(self) -> u32 {
        ((self.0 >> ID_BITS) & ID) as u32
    }

    /// The longest token that is a proper prefix of this one.
    #[inline]
    #[allow(dead_code, reason = "build.rs does not use it")]
    pub(crate) fn prefix(self) -> Option<u32> {
        let prefix = ((self.0 >> (2 * ID_BITS)) & ID) as u32;
        (prefix != NO_TOKEN).then_some(prefix)
    }

    /// Bytes of the token.
    #[inline]
    #[allow(dead_code, reason = "build.rs does not use it")]
    pub(crate) fn length(self) -> usize {
        (self.0 >> (3 * ID_BITS)) as usize
    }
}

/// Entries per bucket of the table of merges. All are compared at once, and a bucket is within one cache line.
pub(crate) const BUCKET: usize = 8;
/// An unused entry. In a bucket these come last.
pub(crate) const FREE: u32 = 0;
const CHECK_BITS: u32 = 32 - ID_BITS;
const CHECK: u32 = (1 << CHECK_BITS) - 1;
/// Distinguishes entries from `FREE`.
const USED: u32 = 1;

/// The key of a pair in the table of merges. An entry has the merged token and some bits of the key, so that most other
/// pairs are recognised without a look at the token's record.
#[derive(Clone, Copy)]
pub(crate) struct PairKey(u64);

#[allow(clippy::cast_possible_truncation, reason = "the shifts leave what the types hold")]
impl PairKey {
    #[inline]
    pub(crate) fn of(left: u32, right: u32) -> Self {
        let key = u128::from((u64::from(left) << ID_BITS) | u64::from(right)) * 0x9e37_79b9_7f4a_7c15;
        Self(key as u64 ^ (key >> 64) as u64)
    }

    /// The bucket where the search for the pair begins. It continues while buckets are full.
    #[inline]
    pub(crate) fn bucket(self, buckets: usize) -> usize {
        (((self.0 >> 32) * buckets as u64) >> 32) as usize
    }

    #[allow(dead_code, reason = "only build.rs uses it")]
    pub(crate) fn entry(self, token: u32) -> u32 {
        (token << CHECK_BITS) | self.check()
    }

    /// The token of an entry, if the entry can be of this pair.
    #[inline]
    #[allow(dead_code, reason = "build.rs does not use it")]
    pub(crate) fn token(self, entry: u32) -> Option<u32> {
        (entry & CHECK == self.check()).then_some(entry >> CHECK_BITS)
    }

    #[inline]
    fn check(self) -> u32 {
        (self.0 as u32 & CHECK) | USED
    }
}

/// The merges of a vocabulary.
pub(crate) trait Merges {
    fn merged(&self, left: u32, right: u32) -> Option<u32>;
    fn record(&self, token: u32) -> Record;
}

/// Whether byte-pair encoding of the bytes of both tokens gives these two tokens.
///
/// Undoes the merges of both tokens at their common border, the latest one first. A merge across the border that comes
/// earlier than the undone ones would have been done instead.
#[inline]
pub(crate) fn can_follow(merges: &impl Merges, mut left: u32, mut right: u32) -> bool {
    let mut earliest = u32::MAX;
    loop {
        if merges.merged(left, right).is_some_and(|merged| merged < earliest) {
            return false;
        }
        let (inner_left, inner_right) = (merges.record(left).right(), merges.record(right).left());
        // Of two equal tokens, byte-pair encoding merges the left one first.
        let undo_left =
            if left > right { inner_left != left } else { inner_right == right && inner_left != left };
        if undo_left {
            (earliest, left) = (left, inner_left);
        } else if inner_right != right {
            (earliest, right) = (right + 1, inner_right);
        } else {
            return true;
        }
    }
}
