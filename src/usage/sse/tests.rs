use super::*;
use proptest::prelude::*;

const EXTRA: &str =
    r#"data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}"#;
const HI: &str = r#"data: {"id":"c","choices":[{"index":0,"delta":{"content":"Hi"}}],"usage":null}"#;
const LAST: &str = r#"data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":2}}"#;

/// Feeds a stream cut at the given places; returns the caller's bytes and the reader.
fn follow(stream: &str, withholds: bool, cuts: &[usize]) -> (String, SseReader) {
    let mut reader = SseReader::new(withholds);
    let mut out: Vec<Bytes> = Vec::new();
    let bytes = Bytes::copy_from_slice(stream.as_bytes());
    let mut from = 0;
    for cut in cuts.iter().copied().chain([bytes.len()]) {
        let cut = cut.clamp(from, bytes.len());
        reader.feed(&bytes.slice(from..cut), &mut out);
        from = cut;
    }
    reader.finish(&mut out);
    (String::from_utf8(out.concat()).unwrap(), reader)
}

fn every_byte(stream: &str) -> Vec<usize> {
    (0..stream.len()).collect()
}

#[test]
fn only_the_usage_chunk_is_withheld() {
    for nl in ["\n", "\r\n", "\r"] {
        let e = |s: &str| format!("{s}{nl}{nl}");
        let before = e(": keepalive") + &e(HI) + &e(LAST);
        let extra = format!(": of it{nl}id: 3{nl}") + &e(EXTRA);
        let after = e("data: [DONE]");
        let stream = before.clone() + &extra + &after;
        for cuts in [vec![], every_byte(&stream), vec![stream.len() - after.len() - 3]] {
            let (got, reader) = follow(&stream, true, &cuts);
            assert_eq!(got, before.clone() + &after, "{nl:?} {cuts:?}");
            assert_eq!(reader.withheld(), 1);
            let (got, reader) = follow(&stream, false, &cuts);
            assert_eq!(got, stream);
            assert_eq!((reader.reported().prompt(), reader.reported().completion()), (Some(7), Some(2)));
        }
    }
}

#[test]
fn tokens_so_far_are_those_reported_and_those_delivered_since() {
    let event = |content: &str, usage: &str| {
        format!(r#"data: {{"choices":[{{"index":0,"delta":{{"content":"{content}"}}}}]{usage}}}"#) + "\n\n"
    };
    let (_, none) = follow(&event("a", "").repeat(30), false, &[]);
    assert_eq!((none.tokens_so_far(u64::MAX), none.tokens_so_far(5)), (30, 30));
    // Some upstreams report usage in every event; one token may arrive in two events.
    let reported = event("a", "") + &event("b", r#","usage":{"completion_tokens":1}"#);
    let (_, running) = follow(&reported, false, &[]);
    assert_eq!(running.tokens_so_far(u64::MAX), 1);
    let (_, running) = follow(&(reported + &event("c", "")), false, &[]);
    assert_eq!(running.tokens_so_far(u64::MAX), 2);
    // Long texts in few events are estimated by length, but not beyond the request's cap.
    let (_, long) = follow(&event(&"a".repeat(40_000), "").repeat(2), false, &[]);
    assert_eq!((long.tokens_so_far(u64::MAX), long.tokens_so_far(5_000)), (20_000, 5_000));
}

#[test]
fn the_next_sequence_number_follows_the_last_complete_event() {
    for (stream, next) in [
        ("", None),
        ("data: {\"sequence_number\":0}\n\n", Some(1)),
        ("data: {\"sequence_number\":4,\"usage\":{\"output_tokens\":1}}\n\n", Some(5)),
        ("data: {\"sequence_number\":4}\n\ndata: {\"sequence_number\":5", Some(5)),
        ("data: {\"sequence_number\":-4}\n\n", None),
    ] {
        let mut reader = SseReader::new(false);
        reader.feed(&Bytes::from(stream), &mut Vec::<Bytes>::new());
        reader.break_off();
        assert_eq!(reader.next_sequence_number(), next, "{stream}");
    }
}

#[test]
fn usage_is_found_without_a_final_blank_line_and_after_a_byte_order_mark() {
    let (got, reader) = follow(EXTRA, true, &[]);
    assert_eq!((got.as_str(), reader.reported().completion()), ("", Some(2)));
    let (_, reader) = follow(&format!("\u{feff}{EXTRA}\n\n"), false, &[]);
    assert_eq!(reader.reported().completion(), Some(2));
    let (_, reader) =
        follow("data: {\"choices\":[],\ndata: \"usage\":{\"completion_tokens\":4}}\n\n", false, &[]);
    assert_eq!(reader.reported().completion(), Some(4));
}

#[test]
fn a_partial_event_is_held_back_only_while_it_may_be_the_usage_chunk() {
    let mut reader = SseReader::new(true);
    let mut out: Vec<Bytes> = Vec::new();
    let piece = |s: &'static str| Bytes::from_static(s.as_bytes());
    reader.feed(&piece("data: {\"id\":1,"), &mut out);
    assert!(out.is_empty());
    reader.feed(&piece("\"choices\":[{\"delta\":"), &mut out);
    assert_eq!(out.concat(), b"data: {\"id\":1,\"choices\":[{\"delta\":");
    reader.feed(&piece("{}}]}\n\nda"), &mut out);
    assert_eq!(out.concat(), b"data: {\"id\":1,\"choices\":[{\"delta\":{}}]}\n\n");
    reader.finish(&mut out);
    assert!(out.concat().ends_with(b"\n\nda"));
}

#[test]
fn nested_choices_do_not_prevent_withholding_a_cut_usage_chunk() {
    let usage = r#""choices":[],"usage":{"completion_tokens":2}}"#;
    for before in [r#""id":"choices","#, r#""a":{"choices":[1]},"#, r#""a":[{"choices":["b"]}],"#] {
        let stream = format!("data: {{{before}{usage}\n\n");
        for cuts in [vec![], every_byte(&stream)] {
            let (got, reader) = follow(&stream, true, &cuts);
            assert_eq!((got.as_str(), reader.withheld()), ("", 1), "{stream}");
        }
    }
}

#[test]
fn text_is_collected_if_usage_never_arrives() {
    let (_, mut reader) = follow(&format!("{HI}\n\n{HI}\n\ndata: [DONE]\n\n"), true, &[]);
    assert_eq!(reader.take_text().texts, ["HiHi"]);
    assert!(!reader.reported().has_any());
}

#[test]
fn an_endless_event_passes_unread_in_bounded_memory() {
    let mut reader = SseReader::new(true);
    let mut passed = 0;
    let piece = Bytes::from(vec![b'x'; 64 * 1024]);
    for _ in 0..200 {
        let mut out: Vec<Bytes> = Vec::new();
        reader.feed(&piece, &mut out);
        passed += out.iter().map(Bytes::len).sum::<usize>();
        assert!(reader.partial.len() <= MAX_EVENT_BYTES);
    }
    let mut out: Vec<Bytes> = Vec::new();
    reader.feed(&Bytes::from(format!("\n\n{HI}\n\n{EXTRA}\n\n")), &mut out);
    assert_eq!((passed, out.concat()), (200 * 64 * 1024, format!("\n\n{HI}\n\n").into_bytes()));
    assert_eq!(reader.reported().completion(), Some(2));
    // The usage covers everything.
    assert_eq!(reader.take_text(), TextToCount::default());
    let cuts: Vec<usize> = (0..=passed).step_by(64 * 1024).collect();
    let (_, mut silent) = follow(&format!("{}\n\n{HI}\n\n", "x".repeat(passed)), false, &cuts);
    let counted = silent.take_text();
    assert_eq!(
        (counted.known_tokens, counted.texts),
        ((passed as u64 + 2).div_ceil(4), vec!["Hi".to_owned()])
    );
}

fn line() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(EXTRA.to_owned()),
        Just(HI.to_owned()),
        Just(LAST.to_owned()),
        Just("data: [DONE]".to_owned()),
        Just(String::new()),
        Just(": comment".to_owned()),
        "[a-z]{0,5}:? ?[ -~é]{0,20}",
    ]
}

proptest! {
    #[test]
    fn results_do_not_depend_on_cuts(
        lines in prop::collection::vec((line(), prop_oneof![Just("\n"), Just("\r\n"), Just("\r")]), 0..16),
        cuts in prop::collection::vec(0usize..1200, 0..12),
        withholds in any::<bool>(),
    ) {
        let stream: String = lines.into_iter().map(|(l, nl)| l + nl).collect();
        let mut cuts = cuts;
        cuts.sort_unstable();
        let (whole, mut a) = follow(&stream, withholds, &[]);
        let (cut, mut b) = follow(&stream, withholds, &cuts);
        let (single, mut c) = follow(&stream, withholds, &every_byte(&stream));
        prop_assert_eq!(&whole, &cut);
        prop_assert_eq!(&whole, &single);
        prop_assert_eq!(a.reported(), b.reported());
        prop_assert_eq!(a.reported(), c.reported());
        let texts = a.take_text();
        prop_assert_eq!(&texts, &b.take_text());
        prop_assert_eq!(&texts, &c.take_text());
        if !withholds {
            prop_assert_eq!(whole, stream);
        }
    }
}
