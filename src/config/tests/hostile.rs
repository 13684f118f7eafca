//! Hostile and broken files: the parser refuses them in bounded time and memory.

use super::*;
use crate::clock::Stopwatch;
use proptest::prelude::*;

/// More than any of these texts needs, and less than a parser with quadratic run time would take.
const MAX_TIME: Duration = Duration::from_secs(20);

fn entries(count: usize, entry: impl Fn(usize) -> String) -> String {
    (0..count).map(entry).collect()
}

#[test]
fn hostile_files_are_refused_in_bounded_time_and_memory() {
    let laughs =
        entries(9, |n| format!("a{}: &a{} [{}]\n", n + 1, n + 1, vec![format!("*a{n}"); 9].join(",")));
    let chain = entries(10_000, |n| format!("a{}: &a{} [*a{n}]\n", n + 1, n + 1));
    let big = "x".repeat(1 << 20);
    for text in [
        "[".repeat(1 << 20),
        "{a: ".repeat(100_000),
        "- ".repeat(100_000),
        entries(1_000, |n| format!("{}a:\n", " ".repeat(n))),
        format!("a0: &a0 x\n{laughs}"),
        format!("a0: &a0 x\n{chain}"),
        format!("a: &a {big}\nb: [{}]", "*a, ".repeat(100_000)),
        format!("b: {}", "&a [".repeat(30) + &big + &"]".repeat(30)),
        "a: &a [*a]".to_owned(),
        "a: &a { <<: *a }".to_owned(),
        "\0\0\0".to_owned(),
        format!("{MINIMAL}#\0"),
        "\u{feff}".to_owned(),
        "\t".to_owned(),
        format!("x: '{}'", "${".repeat(1 << 20)),
        format!("x: '{}'", "${a}".repeat(1 << 20)),
        format!("x: '{}'", "${KEY}".repeat(500_000)),
        format!("{MINIMAL}x: \u{f0041}\n"),
        entries(300_000, |n| format!("{n}: 1\n")),
        format!("upstreams: {{ {} }}", entries(40_000, |n| format!("u{n}: {{ base_url: 'http://u' }}, "))),
        format!("? {big}\n: [{}]", "[], ".repeat(100_000)),
        with(&format!("upstrem: {big}")).replace("upstream: up", &format!("upstream: {big}")),
        with_quota(&format!("[{}]", entries(50_000, |n| format!("{{ limit: {n}, per: minute }},\n")))),
        with(&format!("keys: [{}]", entries(30_000, |n| format!("{{ name: a, secret: '{n}' }},\n")))),
        MINIMAL.to_owned() + &entries(40_000, |n| format!("  e{n}: {{ upstream: wrong-{n} }}\n")),
    ] {
        let watch = Stopwatch::start();
        assert!(read(&text).is_err(), "{text:.40}");
        assert!(watch.elapsed() < MAX_TIME, "{text:.40}: {:?}", watch.elapsed());
    }
}

#[test]
fn five_thousand_callers_are_allowed() {
    let keys = entries(5_000, |n| {
        format!(
            "\n      - {{ name: caller-{n}, secret: a-long-key-{n:08}, quotas: {{ requests: {{ limit: 1, per: second }} }} }}"
        )
    });
    assert_eq!(config(&with(&format!("keys: {keys}"))).environments[0].callers.len(), 5_000);
}

#[test]
fn files_that_are_not_text_or_too_large_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.yaml");
    let fault_of = |content: &[u8]| {
        std::fs::write(&path, content).unwrap();
        load(&path).unwrap_err().to_string()
    };
    assert!(fault_of(b"a: 1\nb: \xff\xfe").contains("not UTF-8 (line 2)"));
    assert!(fault_of(&vec![b' '; 5 << 20]).contains("larger than 4 MiB"));
    let load = |path: &str| load(Path::new(path)).unwrap_err().to_string();
    assert!(load("/nowhere.yaml").starts_with("/nowhere.yaml:1:1: the file cannot be read"));
    assert!(load("/").contains("this is a directory"));
    assert!(load("/dev/zero").contains("larger than 4 MiB"));
}

#[test]
fn byte_order_marks_and_crlf_line_ends_are_accepted() {
    config(&format!("\u{feff}{MINIMAL}"));
    config(&MINIMAL.replace('\n', "\r\n"));
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "[ -~\n\té${}]{0,200}") {
        let _ = read(&text);
    }

    #[test]
    fn no_typo_makes_the_parser_panic(
        at in 0..500_usize,
        cut in 0..40_usize,
        put in "[ -~\n${}&*<>!|é]{0,8}",
        example in 0..3_usize,
    ) {
        let examples = [
            with("keys: [{ name: a, secret: ${KEY} }]"),
            with_quota("&a [{ limit: 1.5k, per: 1d, timezone: Europe/Berlin }]") + "    <<: { enforce: false }\n",
            include_str!("../../../config/minimal.yaml").to_owned(),
        ];
        let mut text = examples[example].clone();
        let start = text.floor_char_boundary(at);
        let end = text.floor_char_boundary(start + cut);
        text.replace_range(start..end, &put);
        let _ = read(&text);
    }

    #[test]
    fn no_override_makes_the_parser_panic(path in "[A-Za-z0-9_-]{0,40}", value in ".{0,20}") {
        let _ = overridden(MINIMAL, &format!("TOLLGATE__{path}"), &value);
    }
}
