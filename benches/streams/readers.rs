//! Measures the usage readers alone, on one thread.

use crate::is_within;
use bytes::Bytes;
use std::hint::black_box;
use std::time::Duration;
use tollgate::usage::{JsonReader, SseReader};

const MB: f64 = 1e6;
const MIB: usize = 1 << 20;
const PIECES: [(&str, usize); 5] =
    [("1 B", 1), ("64 B", 64), ("16 KiB", 16 * 1024), ("1 MiB", MIB), ("16 MiB", 16 * MIB)];
/// Indexes into `PIECES` of the sizes that a short run measures: the smallest, that of sockets, the largest.
const QUICK_PIECES: [usize; 3] = [0, 2, 4];
/// Minimum MB per second for streams of one choice without escapes, in pieces of the size that sockets deliver.
const MIN_SPEED: f64 = 500.0;
/// Minimum MB per second for other input, in the same pieces.
const MIN_SPEED_OTHER: f64 = 300.0;
/// A build with debug assertions has fewer optimisations, and must reach this part of the minimum.
const CHECKED_BUILD_SHARE: f64 = 0.5;
/// Maximum ratio of the time for twice the input to the time for the input.
const MAX_RATIO_FOR_TWICE: f64 = 2.2;
const ATTEMPTS: usize = 8;

#[derive(Clone, Copy)]
enum Kind {
    /// Events without a `usage` field.
    Silent,
    /// Events with `usage: null`, and usage at the end.
    Usual,
    Withholding,
    /// Two alternating choices, with an escape in each text.
    Escaped,
    /// One event of one line.
    Long,
    JsonText,
    JsonNumbers,
    /// Short strings in small objects.
    JsonProbabilities,
}

const KINDS: [(&str, Kind); 8] = [
    ("events without usage", Kind::Silent),
    ("usual chat events", Kind::Usual),
    ("usual chat events, withholding", Kind::Withholding),
    ("events with escapes", Kind::Escaped),
    ("one long event", Kind::Long),
    ("JSON, one long text", Kind::JsonText),
    ("JSON, numbers", Kind::JsonNumbers),
    ("JSON, log probabilities", Kind::JsonProbabilities),
];

/// Prints the table. Returns whether all bounds are met.
pub(crate) fn measure(is_quick: bool) -> bool {
    let rounds = if is_quick { 3 } else { 7 };
    println!(
        "### readers of usage: MB a second of CPU, best of {rounds} or more; in brackets: how much longer twice the input takes, median\n"
    );
    let pieces: Vec<_> = if is_quick { QUICK_PIECES.map(|at| PIECES[at]).into() } else { PIECES.into() };
    println!("| input | {} |", pieces.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" | "));
    println!("| --- |{}", " --- |".repeat(pieces.len()));
    let mut is_fine = true;
    for (name, kind) in KINDS {
        let mut cells = Vec::new();
        let min_speed = if matches!(kind, Kind::Silent | Kind::Usual | Kind::Withholding | Kind::Long) {
            MIN_SPEED
        } else {
            MIN_SPEED_OTHER
        };
        let min_speed = if cfg!(debug_assertions) { min_speed * CHECKED_BUILD_SHARE } else { min_speed };
        for &(pieces, size) in &pieces {
            // At several GB/s, memory bandwidth is the limit. Both inputs exceed all caches, so that they are
            // comparable.
            let length = match size {
                1 => MIB / 2,
                // The JSON reader has a shorter way for an answer that arrives whole.
                _ if size > MIB => 2 * size,
                _ if matches!(kind, Kind::Long | Kind::JsonText | Kind::JsonNumbers) => 32 * MIB,
                64 => 4 * MIB,
                _ if is_quick => 8 * MIB,
                _ => 16 * MIB,
            };
            let (once, twice) = (input(kind, length), input(kind, 2 * length));
            let mut runs = Runs::default();
            // Repeated in case the machine was busy.
            for _ in 0..ATTEMPTS {
                (0..rounds).for_each(|_| runs.add(read(kind, size, &once), read(kind, size, &twice)));
                if runs.ratio() <= MAX_RATIO_FOR_TWICE && once.len() as f64 / MB / runs.best >= min_speed {
                    break;
                }
            }
            let (speed, ratio) = (once.len() as f64 / MB / runs.best, runs.ratio());
            is_fine &=
                is_within(&format!("{name}, pieces: {pieces}, twice the input"), ratio, MAX_RATIO_FOR_TWICE);
            if size == 16 * 1024 {
                is_fine &= is_within(&format!("{name}: ns per byte"), 1_000.0 / speed, 1_000.0 / min_speed);
            }
            cells.push(format!("{speed:.0} ({ratio:.2})"));
        }
        println!("| {name} | {} |", cells.join(" | "));
    }
    println!();
    is_fine
}

/// Alternating runs of an input and of twice as much.
struct Runs {
    /// The shortest time of the input, in seconds.
    best: f64,
    /// Sorted ratios of the time for twice the input to the time for the input, measured right before it.
    ratios: Vec<f64>,
}

impl Default for Runs {
    fn default() -> Self {
        Self { best: f64::MAX, ratios: Vec::new() }
    }
}

impl Runs {
    fn add(&mut self, once: f64, twice: f64) {
        self.best = self.best.min(once);
        self.ratios.push(twice / once);
        self.ratios.sort_by(f64::total_cmp);
    }

    /// The median, because the speed of a core changes during the measurement.
    fn ratio(&self) -> f64 {
        self.ratios[self.ratios.len() / 2]
    }
}

/// CPU time of this thread. The kernel updates the figure when the thread yields.
fn cpu() -> Duration {
    std::thread::yield_now();
    let all = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(all.split(' ').next().unwrap().parse().unwrap())
}

/// Seconds of CPU to read an input in pieces.
fn read(kind: Kind, size: usize, input: &Bytes) -> f64 {
    let pieces = (0..input.len()).step_by(size).map(|at| input.slice(at..input.len().min(at + size)));
    let started = cpu();
    match kind {
        Kind::JsonText | Kind::JsonNumbers | Kind::JsonProbabilities => {
            let mut reader = JsonReader::default();
            pieces.for_each(|piece| reader.feed(&piece));
            assert_eq!(reader.reported().completion(), Some(3));
        }
        Kind::Silent | Kind::Usual | Kind::Withholding | Kind::Escaped | Kind::Long => {
            let mut reader = SseReader::new(matches!(kind, Kind::Withholding));
            let mut passed = Vec::<Bytes>::new();
            for piece in pieces {
                reader.feed(&piece, &mut passed);
                black_box(&passed);
                passed.clear();
            }
            reader.finish(&mut passed);
            let reports = matches!(kind, Kind::Usual | Kind::Withholding);
            assert_eq!(reader.reported().completion(), reports.then_some(3));
        }
    }
    cpu().saturating_sub(started).as_secs_f64()
}

const REPORT: &str = r#""usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}"#;

fn input(kind: Kind, length: usize) -> Bytes {
    let head = r#"data: {"id":"chatcmpl-AAAAAAAAAAAAAAAAAAAAAAAAAAAAA","object":"chat.completion.chunk","created":1700000000,"model":"gpt-4o-mini","#;
    let delta = r#""choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]"#;
    let fill = |piece: &str| piece.repeat(length / piece.len() + 1);
    match kind {
        Kind::Silent => fill(&format!("{head}{delta}}}\n\n")),
        Kind::Usual | Kind::Withholding => {
            fill(&format!("{head}{delta},\"usage\":null}}\n\n"))
                + &format!("{head}\"choices\":[],{REPORT}}}\n\ndata: [DONE]\n\n")
        }
        Kind::Escaped => {
            let delta = delta.replace(" token", r"\n token");
            let other = delta.replace("\"index\":0", "\"index\":1");
            fill(&format!("{head}{delta},\"usage\":null}}\n\n{head}{other},\"usage\":null}}\n\n"))
        }
        Kind::Long => {
            format!("{head}\"choices\":[{{\"delta\":{{\"content\":\"{}\"}}}}]}}\n\n", fill("a word "))
        }
        Kind::JsonText => {
            format!(r#"{{"choices":[{{"message":{{"content":"{}"}}}}],{REPORT}}}"#, fill("a word "))
        }
        Kind::JsonProbabilities => {
            let token = r#"{"token":" word","logprob":-0.0123456789,"bytes":[32,119,111,114,100],"top_logprobs":[]},"#;
            format!(r#"{{"choices":[{{"logprobs":{{"content":[{}null]}}}}],{REPORT}}}"#, fill(token))
        }
        Kind::JsonNumbers => format!(r#"{{"data":[{}0],{REPORT}}}"#, fill("-0.0123456789,")),
    }
    .into()
}
