//! Builds the trie of all tokens as a double array.

use crate::format::{ENDS_TOKEN, LEAF_BASE, RANK_BLOCK, ROOT_BASE, UNUSED, label_of, longest_token, node};

/// How many free places are tried for the children of a node before the array grows.
const MAX_TRIES: usize = 100;
/// A node has at most one child per byte. The children of a node are in one block.
const BLOCK: usize = 256;

pub(crate) struct Trie {
    pub(crate) nodes: Vec<u32>,
    /// The token that ends at each node.
    pub(crate) ends: Vec<u32>,
}

impl Trie {
    pub(crate) fn longest_token(&self, text: &[u8]) -> Option<u32> {
        longest_token(text, |slot| self.nodes[slot]).map(|slot| self.ends[slot])
    }

    /// The tokens that end at nodes, without the places where none ends.
    pub(crate) fn ranked_ends(&self) -> RankedEnds {
        let mut ends = RankedEnds { tokens: Vec::new(), block_starts: Vec::new(), ranks: Vec::new() };
        for (nodes, tokens) in self.nodes.chunks(RANK_BLOCK).zip(self.ends.chunks(RANK_BLOCK)) {
            ends.block_starts.push(u32::try_from(ends.tokens.len()).unwrap_or(u32::MAX));
            let mut rank = 0;
            for (node, token) in nodes.iter().zip(tokens) {
                ends.ranks.push(rank);
                if node & ENDS_TOKEN != 0 {
                    ends.tokens.push(*token);
                    // Only the block's last place can overflow the rank, and no place follows it.
                    rank = rank.wrapping_add(1);
                }
            }
        }
        ends
    }
}

/// The tokens that end at nodes, and how to find them by their place (`format.rs`).
pub(crate) struct RankedEnds {
    pub(crate) tokens: Vec<u32>,
    pub(crate) block_starts: Vec<u32>,
    pub(crate) ranks: Vec<u8>,
}

/// A node while the trie is built.
#[derive(Default)]
struct Draft {
    /// Byte and number of each child.
    children: Vec<(u8, usize)>,
    token: Option<u32>,
}

pub(crate) fn build(tokens: &[&[u8]]) -> Trie {
    let drafts = drafts(tokens);
    let mut places = Places::default();
    let mut slots = vec![0; drafts.len()];
    let mut bases = vec![LEAF_BASE; drafts.len()];
    let mut order: Vec<usize> = (0..drafts.len()).filter(|n| !drafts[*n].children.is_empty()).collect();
    // The root's children fill the block at `ROOT_BASE`. Nodes with many children come first; those with one child
    // fill the gaps.
    order.sort_by_key(|n| (*n != 0, usize::MAX - drafts[*n].children.len()));
    for number in order {
        let children = &drafts[number].children;
        let base = if number == 0 { ROOT_BASE as usize } else { places.find(children) };
        places.take(base, children);
        bases[number] = u32::try_from(base).unwrap_or(LEAF_BASE);
        children.iter().for_each(|(byte, child)| slots[*child] = base ^ usize::from(*byte));
    }
    let mut trie = Trie { nodes: vec![UNUSED; places.used.len()], ends: vec![0; places.used.len()] };
    for draft in &drafts {
        for (byte, child) in &draft.children {
            let ends = drafts[*child].token.map_or(0, |_| ENDS_TOKEN);
            trie.nodes[slots[*child]] = node(*byte, bases[*child]) | ends;
            trie.ends[slots[*child]] = drafts[*child].token.unwrap_or(0);
        }
    }
    assert!(trie.nodes.iter().all(|node| *node == UNUSED || label_of(*node) < 256));
    trie
}

/// The nodes. The root has number 0.
fn drafts(tokens: &[&[u8]]) -> Vec<Draft> {
    let mut drafts = vec![Draft::default()];
    for (token, bytes) in (0..).zip(tokens) {
        let mut number = 0;
        for byte in *bytes {
            let known = drafts[number].children.iter().find(|child| child.0 == *byte).map(|child| child.1);
            number = known.unwrap_or_else(|| {
                let child = drafts.len();
                drafts.push(Draft::default());
                drafts[number].children.push((*byte, child));
                child
            });
        }
        drafts[number].token = Some(token);
    }
    drafts
}

/// The places of the array.
#[derive(Default)]
struct Places {
    used: Vec<bool>,
    /// No two nodes share a base, so a node's byte identifies its parent.
    used_bases: Vec<bool>,
    /// Where the search begins: the places before it are used, or were tried for as many children.
    from: usize,
    children: usize,
}

impl Places {
    fn find(&mut self, children: &[(u8, usize)]) -> usize {
        if self.children != children.len() {
            (self.from, self.children) = (0, children.len());
        }
        let mut tries = 0;
        loop {
            if self.from >= self.used.len() {
                self.grow(self.used.len() + BLOCK);
            }
            if !self.used[self.from] {
                let base = self.from ^ usize::from(children[0].0);
                if self.has_room(base, children) {
                    return base;
                }
                tries += 1;
                if tries > MAX_TRIES {
                    self.from = self.used.len();
                    continue;
                }
            }
            self.from += 1;
        }
    }

    fn has_room(&self, base: usize, children: &[(u8, usize)]) -> bool {
        base != LEAF_BASE as usize
            && !self.used_bases[base]
            && children.iter().all(|(byte, _)| !self.used[base ^ usize::from(*byte)])
    }

    fn take(&mut self, base: usize, children: &[(u8, usize)]) {
        self.grow(base / BLOCK * BLOCK + BLOCK);
        self.used_bases[base] = true;
        children.iter().for_each(|(byte, _)| self.used[base ^ usize::from(*byte)] = true);
    }

    fn grow(&mut self, length: usize) {
        if self.used.len() < length {
            self.used.resize(length, false);
            self.used_bases.resize(length, false);
        }
    }
}
