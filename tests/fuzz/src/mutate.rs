//! Mutations that leave JSON valid, and mutations of whole lines. With random changes of single bytes, most inputs are
//! rejected by the parser.

use std::ops::Range;

/// Returns an input of at most `most` bytes; `None`: the mutation does not apply.
pub(crate) type Mutate = fn(input: &[u8], most: usize, seed: u32) -> Option<Vec<u8>>;

const LINE_ENDS: [&[u8]; 4] = [b"\r\n", b"\n", b"\r", b""];

/// Replacement values: one of each kind, and numbers at bounds.
const VALUES: [&str; 16] = [
    "null",
    "{}",
    "[]",
    "\"\"",
    "true",
    "false",
    "0",
    "1",
    "-1",
    "1.5",
    "1e999",
    "2147483648",
    "18446744073709551616",
    "\"\\ud800\"",
    "\"a b\"",
    "[[1],{\"a\":{}}]",
];

/// Replaces, moves, wraps, removes or repeats one value of the input; `None`: the input has no value.
pub(crate) fn json(input: &[u8], most: usize, seed: u32) -> Option<Vec<u8>> {
    let mut random = Random(u64::from(seed) | 1 << 40);
    let values = values(input);
    let at = values.get(random.below(values.len()))?.clone();
    let value = &input[at.clone()];
    let other = &input[values[random.below(values.len())].clone()];
    let (open, close) = [("[", "]"), ("{\"type\":", "}"), ("{\"a\":", "}")][random.below(3)];
    let room = most.saturating_sub(input.len()) / (value.len() + 1);
    let with = match random.below(8) {
        0..3 => VALUES[random.below(VALUES.len())].into(),
        3 | 4 => other.to_vec(),
        5 => [open.as_bytes(), value, close.as_bytes()].concat(),
        // An element, or a member with its own name.
        6 => {
            let most = 4 << random.below(12);
            let times = 1 + random.below(room.min(most));
            let is_member = input[..at.start].trim_ascii_end().ends_with(b":");
            let mut with = value.to_vec();
            for n in 0..times {
                let name = if is_member { format!(",\"p{n}\":") } else { ",".to_owned() };
                with.extend_from_slice(name.as_bytes());
                with.extend_from_slice(value);
            }
            with
        }
        // Removes the value with the comma after it, if any.
        _ => {
            let comma = usize::from(input.get(at.end) == Some(&b','));
            return Some([&input[..at.start], &input[at.end + comma..]].concat());
        }
    };
    let output = [&input[..at.start], &with, &input[at.end..]].concat();
    (output.len() <= most).then_some(output)
}

/// Mutates the lines of an event stream, or the JSON in it.
pub(crate) fn events(input: &[u8], most: usize, seed: u32) -> Option<Vec<u8>> {
    let mutate: Mutate = if seed & 2 == 0 { json } else { lines };
    mutate(input, most, seed)
}

/// Removes, repeats, swaps, splits or ends differently one line of the input.
pub(crate) fn lines(input: &[u8], most: usize, seed: u32) -> Option<Vec<u8>> {
    let mut random = Random(u64::from(seed) | 1 << 41);
    let mut lines: Vec<&[u8]> = input.split_inclusive(|byte| *byte == b'\n').collect();
    let (at, other) = (random.below(lines.len()), random.below(lines.len()));
    let line = *lines.get(at)?;
    let end_of_line = LINE_ENDS[random.below(LINE_ENDS.len())];
    match random.below(7) {
        0 => drop(lines.remove(at)),
        1 => lines.insert(other, line),
        2 => lines.swap(at, other),
        3 => {
            let room = most.saturating_sub(input.len()) / line.len();
            let most = 4 << random.below(10);
            let times = 1 + random.below(room.min(most));
            lines.splice(at..at, vec![line; times]);
        }
        4 => {
            lines[at] = line.trim_ascii_end();
            lines.insert(at + 1, end_of_line);
        }
        5 => {
            let (start, end) = line.split_at(random.below(line.len()));
            lines.splice(at..=at, [start, end_of_line, end]);
        }
        _ => lines[at] = &line[..random.below(line.len())],
    }
    let output = lines.concat();
    (output.len() <= most && output != input).then_some(output)
}

/// The ranges of values and names, found by brackets and quotes.
fn values(input: &[u8]) -> Vec<Range<usize>> {
    let (mut found, mut open, mut at) = (Vec::new(), Vec::new(), 0);
    while at < input.len() {
        let start = at;
        at += 1;
        match input[start] {
            b'"' => {
                while at < input.len() && input[at] != b'"' {
                    at += 1 + usize::from(input[at] == b'\\');
                }
                at = (at + 1).min(input.len());
                found.push(start..at);
            }
            b'{' | b'[' => open.push(start),
            b'}' | b']' => found.extend(open.pop().map(|start| start..at)),
            b'-' | b'0'..=b'9' | b'a'..=b'z' => {
                while input.get(at).is_some_and(|b| b.is_ascii_alphanumeric() || b"+-.".contains(b)) {
                    at += 1;
                }
                found.push(start..at);
            }
            _ => {}
        }
    }
    found
}

/// A SplitMix64 generator.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % (end.max(1) as u64)).unwrap()
    }
}
