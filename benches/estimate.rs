//! CPU time of the prompt estimate.
//!
//! `cargo bench --bench estimate -- [--quick]`
//!
//! 1. Chats of 2 KB and 32 KB in three kinds of text, including parsing: not cached, cached, cached except for one new
//!    message, and with one new message after a request whose prompt tokens were reported.
//! 2. One megabyte of each text that is slow to tokenise. Exits with 1 if one takes longer than `--bound`
//!    milliseconds (default 150).
//! 3. Hostile files of one megabyte. Exits with 1 if reading one takes longer than `--file-bound` milliseconds
//!    (default 10).

#![allow(clippy::unwrap_used, clippy::panic)] // a benchmark may panic
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // the figures are for display

#[path = "../tests/common/documents.rs"]
mod documents;

use std::hint::black_box;
use std::process::ExitCode;
use std::time::Duration;
use tollgate::api::Api;
use tollgate::body::{Body, BodyText};
use tollgate::calibrations::Calibrations;
use tollgate::estimate::{Models, warm};
use tollgate::learned::{CorrectedPrompt, EstimateScope, Learned, ReportedAnswer};

const MODEL: &str = "gpt-4o";
const MEGABYTE: usize = 1 << 20;
const BATCH: usize = 10;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let quick = arguments.iter().any(|a| a == "--quick");
    let bound = |flag: &str, default: u64| {
        let given = arguments.iter().skip_while(|a| *a != flag).nth(1);
        Duration::from_millis(given.map_or(default, |ms| ms.parse().unwrap()))
    };
    let rounds = if quick { 1 } else { 3 };
    warm();
    chats(if quick { 40 } else { 400 });
    if slow_texts(rounds, bound("--bound", 150)) & slow_files(3 * rounds, bound("--file-bound", 10)) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn chats(rounds: usize) {
    println!("### a chat, parsed and counted: us of CPU of one thread, mean of {rounds}\n");
    println!(
        "| text | size | not cached | on a new thread | cached | cached except for the last message | after a known request |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let (mut random, mut random_known) = (Random(7), Random(8));
    for kind in [TextKind::English, TextKind::Code, TextKind::ChineseAndJapanese] {
        for size in [2 * 1024, 32 * 1024] {
            let [first, alone, again, next] = stateless_us(kind, size, rounds, &mut random);
            // Separate, because the memory that it uses would leave the CPU cache cold for the others.
            let known = after_a_known_request_us(kind, size, rounds, &mut random_known);
            println!(
                "| {} | {} KB | {first:.0} | {alone:.0} | {again:.1} | {next:.1} | {known:.1} |",
                kind.name(),
                size / 1024
            );
        }
    }
}

/// Not cached, on a new thread, cached, and cached except for the last message.
fn stateless_us(kind: TextKind, size: usize, rounds: usize, random: &mut Random) -> [f64; 4] {
    let [mut first, mut alone, mut again, mut next] = [0.0; 4];
    // Small batches keep the bodies in the CPU cache, like a body that has just arrived.
    for _ in 0..rounds / BATCH {
        let mut some = || (0..BATCH).map(|_| Chat::of(kind, size, random)).collect::<Vec<_>>();
        let (mut chats, others) = (some(), some());
        first += mean_us(&bodies(&chats));
        again += mean_us(&bodies(&chats));
        chats.iter_mut().for_each(|chat| chat.add(kind, random));
        next += mean_us(&bodies(&chats));
        for body in bodies(&others) {
            alone += std::thread::spawn(move || mean_us(&[body])).join().unwrap() / BATCH as f64;
        }
    }
    [first, alone, again, next].map(|sum| sum * BATCH as f64 / rounds as f64)
}

/// With one new message after a request whose prompt tokens were reported.
fn after_a_known_request_us(kind: TextKind, size: usize, rounds: usize, random: &mut Random) -> f64 {
    let learned = Learned::new(Calibrations::new(["upstream"]));
    let mut known = Duration::ZERO;
    for _ in 0..rounds / BATCH {
        let mut chats: Vec<_> = (0..BATCH).map(|_| Chat::of(kind, size, random)).collect();
        bodies(&chats).iter().for_each(|body| {
            learn(&learned, body, Some(500));
        });
        chats.iter_mut().for_each(|chat| chat.add(kind, random));
        let bodies_after = bodies(&chats);
        let started = cpu_time();
        bodies_after.iter().for_each(|body| {
            black_box(learn(&learned, body, None));
        });
        known += cpu_time().saturating_sub(started);
    }
    known.as_secs_f64() * 1e6 / rounds as f64
}

fn bodies(chats: &[Chat]) -> Vec<String> {
    chats.iter().map(Chat::body).collect()
}

/// Mean CPU time to parse and count one of these bodies, in microseconds.
fn mean_us(bodies: &[String]) -> f64 {
    let started = cpu_time();
    for body in bodies {
        let text = BodyText::of(body.as_bytes()).unwrap();
        let read = Body::read(Api::Chat, &text).unwrap();
        black_box(read.prompt.estimate(&Models::default().named(MODEL)));
    }
    cpu_time().saturating_sub(started).as_secs_f64() * 1e6 / bodies.len() as f64
}

/// Parses and counts a body as the gateway does, and learns from its answer if it reports prompt tokens.
fn learn(learned: &Learned, body: &str, reported: Option<u64>) -> CorrectedPrompt {
    let text = BodyText::of(body.as_bytes()).unwrap();
    let mut read = Body::read(Api::Chat, &text).unwrap();
    let recall = learned.recall(EstimateScope::default(), Api::Chat, MODEL, &mut read.prompt);
    let estimate = read.prompt.estimate(&Models::default().named(MODEL));
    let corrected = learned.correct(&recall, MODEL, &estimate);
    if let Some(prompt) = reported {
        learned.learn(&recall, MODEL, &estimate, ReportedAnswer { prompt, ..Default::default() });
    }
    corrected
}

/// CPU time of this thread. Yields first, because the kernel updates the figure then.
fn cpu_time() -> Duration {
    std::thread::yield_now();
    let all = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(all.split(' ').next().unwrap().parse().unwrap())
}

#[derive(Clone, Copy)]
enum TextKind {
    English,
    Code,
    ChineseAndJapanese,
}

impl TextKind {
    fn name(self) -> &'static str {
        match self {
            Self::English => "English",
            Self::Code => "code",
            Self::ChineseAndJapanese => "Chinese and Japanese",
        }
    }

    /// A new text: pieces of real text in random order.
    fn text(self, bytes: usize, random: &mut Random) -> String {
        let (source, separator) = match self {
            Self::English => (PROSE, ' '),
            Self::Code => (CODE, '\n'),
            Self::ChineseAndJapanese => (PHRASES, ' '),
        };
        let pieces: Vec<&str> = source.split([separator, '\n']).filter(|piece| !piece.is_empty()).collect();
        let mut text = String::new();
        while text.len() < bytes {
            text.push_str(pieces[random.below(pieces.len())]);
            if !matches!(self, Self::ChineseAndJapanese) {
                text.push(separator);
            }
        }
        text
    }
}

/// Words of English prose, and code. The texts never change, so that figures of different commits can be compared.
const PROSE: &str = include_str!("texts/prose.txt");
const CODE: &str = include_str!("texts/code.txt");

const PHRASES: &str = "今天天气很好， 我们去公园散步吧。 请用两句话解释 为什么天空是蓝色的？ 网关在转发请求之前 会计算提示词的数量， 然后预留配额。 \
    この文章を要約してください。 応答が終わると、 実際に使われたトークン数で 精算されます。 明日の会議は 午後三時からです。 数据库 服务器 错误 日志 \
    環境ごとに 上限を設定 できます。 谢谢你的帮助！ よろしくお願いします。 机器学习模型 的训练需要 大量的数据 和计算资源。";

struct Chat(Vec<String>);

impl Chat {
    /// Six messages of about this size in total.
    fn of(kind: TextKind, bytes: usize, random: &mut Random) -> Self {
        Self((0..6).map(|_| kind.text(bytes / 6, random)).collect())
    }

    fn add(&mut self, kind: TextKind, random: &mut Random) {
        self.0.push(kind.text(200, random));
    }

    fn body(&self) -> String {
        let message = |(at, text): (usize, &String)| {
            let role = ["system", "user", "assistant"][if at == 0 { 0 } else { 1 + (at + 1) % 2 }];
            serde_json::json!({"role": role, "content": text})
        };
        let messages: Vec<_> = self.0.iter().enumerate().map(message).collect();
        serde_json::json!({"model": MODEL, "messages": messages}).to_string()
    }
}

/// Prints the CPU time of each text. Returns whether all took at most `bound`.
fn slow_texts(rounds: usize, bound: Duration) -> bool {
    println!(
        "\n### a megabyte of one text: ms, minimum of {rounds}\n\n| text | o200k | cl100k |\n| --- | --- | --- |"
    );
    let mut worst = Duration::ZERO;
    for (name, text) in slow_inputs() {
        let of = |model: &str| {
            let took = (0..rounds).map(|round| {
                // A different text each time, because the same one would be cached.
                let text = format!("{round} {text}");
                let body =
                    serde_json::json!({"model": model, "messages": [{"role": "user", "content": text}]})
                        .to_string();
                let started = cpu_time();
                let text = BodyText::of(body.as_bytes()).unwrap();
                let read = Body::read(Api::Chat, &text).unwrap();
                black_box(read.prompt.estimate(&Models::default().named(model)));
                cpu_time().saturating_sub(started)
            });
            took.min().unwrap()
        };
        let [o200k, cl100k] = ["gpt-4o", "gpt-4"].map(of);
        worst = worst.max(o200k).max(cl100k);
        println!("| {name} | {:.0} | {:.0} |", o200k.as_secs_f64() * 1e3, cl100k.as_secs_f64() * 1e3);
    }
    println!(
        "\nThe slowest text took {:.0} ms; the limit is {} ms.",
        worst.as_secs_f64() * 1e3,
        bound.as_millis()
    );
    worst <= bound
}

/// Prints the CPU time to read each file. Returns whether all took at most `bound`.
fn slow_files(rounds: usize, bound: Duration) -> bool {
    println!(
        "\n### a hostile file of a megabyte: ms to read the request, minimum of {rounds}\n\n| file | ms |\n| --- | --- |"
    );
    let mut worst = Duration::ZERO;
    for document in documents::hostile() {
        let request = document.request();
        let took = (0..rounds).map(|_| {
            let started = cpu_time();
            let text = BodyText::of(request.as_bytes()).unwrap();
            black_box(Body::read(Api::Chat, &text).unwrap());
            cpu_time().saturating_sub(started)
        });
        let took = took.min().unwrap();
        worst = worst.max(took);
        println!("| {} | {:.1} |", document.name, took.as_secs_f64() * 1e3);
    }
    println!(
        "\nThe slowest file took {:.1} ms; the limit is {} ms.",
        worst.as_secs_f64() * 1e3,
        bound.as_millis()
    );
    worst <= bound
}

/// Texts of one megabyte that are slow to tokenise.
fn slow_inputs() -> impl Iterator<Item = (&'static str, String)> {
    random_inputs().into_iter().chain(repeated_inputs())
}

/// Random letters of several alphabets.
fn random_inputs() -> Vec<(&'static str, String)> {
    let mut random = Random(11);
    let mut of = |letters: &str| {
        let letters: Vec<char> = letters.chars().collect();
        let mut text = String::new();
        while text.len() < MEGABYTE {
            text.push(letters[random.below(letters.len())]);
        }
        text
    };
    let lower = "abcdefghijklmnopqrstuvwxyz";
    vec![
        ("random small letters", of(lower)),
        ("random letters", of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")),
        ("base64", of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")),
        ("random digits", of("0123456789")),
        ("hexadecimal", of("0123456789abcdef")),
        ("random marks", of("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")),
        ("dashes with some equals signs", of(&("-".repeat(500) + "="))),
        ("dashes and equals signs", of("-=")),
        ("dashes, stars and rules", of("-*_=#~")),
        ("a and b", of("ab")),
        ("vowels", of("aeiou")),
        ("random white space", of(" \t\n\r")),
        ("spaces with some tabs", of(&(" ".repeat(300) + "\t"))),
        ("spaces with some letters", of(&(" ".repeat(3_000) + "x"))),
        (
            "Chinese",
            of(
                "的一是不了在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可",
            ),
        ),
        (
            "Korean",
            of("가나다라마바사아자차카타파하거너더러머버서어저처커터퍼허고노도로모보소오조초코토포호"),
        ),
        ("Thai", of("กขคงจฉชซญฐณดตถทธนบปผพฟภมยรลวศษสหอฮะาิีึืุูเแโใไ")),
        ("Georgian", of("აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ")),
        ("emoji", of("😀😁😂🤣😃😄😅😆😉😊😋😎😍😘🥰😗😙😚🙂🤗🤩🤔🤨😐😑😶🙄😏😣😥😮🤐😯")),
        ("combining marks", of("a\u{300}\u{301}\u{302}\u{303}\u{308}")),
        ("private use", of("\u{e000}\u{e001}\u{f8ff}\u{10ffff}")),
    ]
}

/// Repetitions of one unit.
fn repeated_inputs() -> [(&'static str, String); 22] {
    let units = [
        ("a", "a"),
        ("A", "A"),
        ("spaces", " "),
        ("tabs", "\t"),
        ("line feeds", "\n"),
        ("CR LF", "\r\n"),
        ("no-break spaces", "\u{a0}"),
        ("zero width joiners", "\u{200d}"),
        ("dashes", "-"),
        ("equals signs", "="),
        ("stars", "*"),
        ("slashes", "/"),
        ("underscores", "_"),
        ("carets", "^"),
        ("quotation marks", "\""),
        ("NUL", "\0"),
        ("zeros", "0"),
        ("apostrophes and s", "'s"),
        ("<|endoftext|>", "<|endoftext|>"),
        ("the same Chinese character", "中"),
        ("families", "👨‍👩‍👧‍👦"),
        ("a long word", "pneumonoultramicroscopicsilicovolcanoconiosis"),
    ];
    units.map(|(name, unit)| (name, unit.repeat(MEGABYTE / unit.len())))
}

/// A linear congruential generator with a fixed seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}
