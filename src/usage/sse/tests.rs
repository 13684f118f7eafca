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
            assert_eq!(got, before.clone() + &format!(": of it{nl}") + &after, "{nl:?} {cuts:?}");
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
fn a_running_usage_of_one_of_several_choices_does_not_lower_the_tokens_so_far() {
    let event = |index: u64, tokens: u64| {
        format!(
            r#"data: {{"choices":[{{"index":{index},"delta":{{"content":"a"}}}}],"usage":{{"completion_tokens":{tokens}}}}}"#
        ) + "\n\n"
    };
    let stream = [event(0, 1), event(0, 2), event(0, 3), event(1, 1), event(1, 2)].concat();
    for (choices, tokens) in [(1, 2), (2, 5)] {
        let mut reader = SseReader::new(false).with_choices(choices);
        reader.feed(&Bytes::from(stream.clone()), &mut Vec::<Bytes>::new());
        assert_eq!(reader.tokens_so_far(u64::MAX), tokens, "{choices}");
        assert!(!reader.has_final_report() && !reader.has_last_event());
    }
}

#[test]
fn text_stays_until_the_final_report_and_is_bounded() {
    let event = |text: &str, rest: &str| {
        format!(
            r#"data: {{"choices":[{{"index":0,"delta":{{"content":"{text}"}}{rest}}}],"usage":{{"completion_tokens":3}}}}"#
        ) + "\n\n"
    };
    let running = event("a", "").repeat(3);
    let (_, mut reader) = follow(&running, false, &[]);
    assert_eq!(reader.take_text().texts, ["aaa"]);
    let (_, mut reader) = follow(&(running.clone() + &event("b", r#","finish_reason":"stop""#)), false, &[]);
    assert!(reader.has_final_report() && reader.take_text() == TextToCount::default());
    // Usage in every event does not let the text grow without bound.
    let long = event(&"a".repeat(1_000), "");
    let mut reader = SseReader::new(false);
    for _ in 0..3_000 {
        reader.feed(&Bytes::from(long.clone()), &mut Discard);
        assert!(reader.buffered_bytes() < 1_200_000);
    }
    let text = reader.take_text();
    assert_eq!(text.bytes() as u64 + 4 * text.known_tokens, 3_000_000);
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

/// The chunk that LiteLLM sends after all choices have ended.
const EMPTY_CHOICE: &str = r#"data: {"id":"c","choices":[{"index":0,"delta":{}}],"usage":{"prompt_tokens":7,"completion_tokens":2}}"#;

#[test]
fn usage_beside_choices_that_carry_nothing_is_withheld_after_all_choices_have_ended() {
    let end = |index: u64| {
        format!(r#"data: {{"choices":[{{"index":{index},"delta":{{}},"finish_reason":"stop"}}]}}"#)
    };
    let (ended, other) = (end(0), HI.replace(r#""index":0"#, r#""index":1"#));
    let with = |from: &str, to: &str| EMPTY_CHOICE.replace(from, to);
    for (before, chunk, is_withheld) in [
        (vec![HI, &ended], EMPTY_CHOICE.to_owned(), true),
        (vec![HI, &ended, "data: [DONE]"], EMPTY_CHOICE.to_owned(), true),
        (vec![HI, LAST], EMPTY_CHOICE.to_owned(), true),
        (vec![HI, &other, &ended, &end(1)], EMPTY_CHOICE.to_owned(), true),
        (vec![HI, HI, HI, HI, HI, &ended], with("{}", r#"{"content":null}"#), true),
        (vec![HI, &ended], with(r#""delta":{}"#, r#""text":"""#), true),
        (vec![HI, &ended], with(r#","delta":{}"#, ""), true),
        (vec![], EMPTY_CHOICE.to_owned(), false),
        (vec![HI], EMPTY_CHOICE.to_owned(), false),
        (vec![HI, &other, &ended], EMPTY_CHOICE.to_owned(), false),
        (vec![HI, &other, &other, &other, &ended], with(r#""index":0"#, r#""index":1"#), false),
        (vec![HI, &ended], with(r#""index":0"#, r#""index":1"#), false),
        (vec![HI, &ended], with("{}", r#"{"content":"more"}"#), false),
        (vec![HI, &ended], with("{}", r#"{"tool_calls":[{"index":0,"function":{"name":"f"}}]}"#), false),
        (vec![HI, &ended], with("{}}", r#"{},"finish_reason":"stop"}"#), false),
        (vec![HI, &ended], with(r#"{"prompt_tokens":7,"completion_tokens":2}"#, "null"), false),
    ] {
        let before = before.iter().map(|event| format!("{event}\n\n")).collect::<Vec<_>>().concat();
        let stream = format!("{before}{chunk}\n\ndata: [DONE]\n\n");
        let want = if is_withheld { format!("{before}data: [DONE]\n\n") } else { stream.clone() };
        for cuts in [vec![], every_byte(&stream), vec![before.len() + 30]] {
            let (got, reader) = follow(&stream, true, &cuts);
            assert_eq!((got, reader.withheld()), (want.clone(), u32::from(is_withheld)), "{stream}");
            // The caller requested usage itself.
            assert_eq!(follow(&stream, false, &cuts).0, stream);
        }
    }
}

#[test]
fn a_choice_in_a_field_that_is_not_data_does_not_prevent_withholding() {
    for field in ["data,data", "d", "date"] {
        let stream = format!("{}\n{EXTRA}\n\ndata: [DONE]\n\n", HI.replacen("data", field, 1));
        for cuts in [vec![], every_byte(&stream), vec![3], vec![80], vec![stream.len() - 40]] {
            assert_eq!(follow(&stream, true, &cuts).0, "data: [DONE]\n\n", "{cuts:?}");
        }
    }
}

#[test]
fn a_comment_line_passes_when_it_is_complete() {
    for nl in ["\n", "\r\n", "\r"] {
        for (before, after) in [
            ("", EXTRA),
            ("id: 3\nevent: e\n", EXTRA),
            ("data: {\"choices\":[],\n", "data: \"usage\":{\"completion_tokens\":2}}"),
            ("\u{feff}", EXTRA),
        ] {
            let (before, comment) = (before.replace('\n', nl), format!(": ping{nl}"));
            let mut reader = SseReader::new(true);
            let mut out: Vec<Bytes> = Vec::new();
            let mut feed = |bytes: &str| {
                reader.feed(&Bytes::copy_from_slice(bytes.as_bytes()), &mut out);
                String::from_utf8(std::mem::take(&mut out).concat()).unwrap()
            };
            let head = feed(&before) + &feed(&comment[..3]) + &feed(&comment[3..6]) + &feed(&comment[6..]);
            assert_eq!(head.trim_start_matches('\u{feff}'), comment, "{before}");
            assert_eq!(feed(&format!("{after}{nl}{nl}")), "", "{before}");
            assert_eq!(feed(&format!("{HI}{nl}{nl}")), format!("{HI}{nl}{nl}"));
            assert_eq!(reader.withheld(), 1);
        }
    }
}

#[test]
fn an_interrupted_comment_needs_a_separator_before_the_next_event() {
    for (stream, withholds, is_passed_on) in [
        (": pi", true, true),
        (": pi", false, true),
        ("id: 3\n: pi", true, false),
        (": ping\n", true, false),
        (": ping\nid: 3", true, false),
    ] {
        let mut reader = SseReader::new(withholds);
        reader.feed(&Bytes::from(stream), &mut Vec::<Bytes>::new());
        assert_eq!(reader.break_off(), is_passed_on, "{stream}");
        let mut rest: Vec<Bytes> = Vec::new();
        reader.finish(&mut rest);
        assert!(rest.is_empty(), "{stream}");
    }
}

#[test]
fn the_size_limit_of_held_back_events_includes_a_partial_comment() {
    let long = format!(": {}\n", "x".repeat(MAX_WITHHELD_BYTES));
    let stream = format!("id: 3\n{long}{EXTRA}\n\n{EXTRA}\n\n");
    let cuts: Vec<usize> = (0..stream.len()).step_by(4_099).collect();
    for cuts in [vec![], vec![6], cuts] {
        let (got, reader) = follow(&stream, true, &cuts);
        assert_eq!((got, reader.withheld()), (format!("id: 3\n{long}{EXTRA}\n\n"), 1));
    }
}

#[test]
fn text_is_collected_if_usage_never_arrives() {
    let (_, mut reader) = follow(&format!("{HI}\n\n{HI}\n\ndata: [DONE]\n\n"), true, &[]);
    assert_eq!(reader.take_text().texts, ["HiHi"]);
    assert!(!reader.reported().has_any());
}

#[test]
fn the_data_of_an_event_are_its_data_lines() {
    assert_eq!(data_of(b"data\nid: 1\r\ndata: a\ndata:b\rdatas: c\n\n").as_deref(), Some(&b"\na\nb"[..]));
    assert_eq!(data_of(b"event: data\n\n"), None);
}

#[test]
fn the_name_of_an_event_is_in_any_of_its_lines_and_the_last_one_counts() {
    for (event, is_error) in [
        ("event: error\ndata: x\n", true),
        ("event:error\r\ndata: x\r\n", true),
        ("data: x\nevent: error\n", true),
        ("data: x\revent: error", true),
        ("id: 1\nretry: 5\nevent: error\ndata: x\n", true),
        ("event: a\nevent: error\ndata: x\n", true),
        ("event: \nerror\ndata: x\n", false),
        ("event: errors\ndata: x\n", false),
        ("event:  error\ndata: x\n", false),
        ("events: error\ndata: x\n", false),
        ("event: error\nevent\ndata: x\n", false),
        ("event: error\nevent: a\ndata: x\n", false),
        ("data: event: error\n", false),
    ] {
        assert_eq!(data_of(event.as_bytes()).is_none(), is_error, "{event:?}");
    }
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
        Just(EMPTY_CHOICE.to_owned()),
        Just("data: [DONE]".to_owned()),
        Just(String::new()),
        Just(": comment".to_owned()),
        // A field with another name, whose value looks like a choice.
        Just(HI.replacen("data", "date", 1)),
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

    #[test]
    fn comments_pass_at_once_and_all_else_in_order(
        lines in prop::collection::vec((any::<bool>(), line()), 0..16),
        nl in prop_oneof![Just("\n"), Just("\r\n"), Just("\r")],
        mut cuts in prop::collection::vec(0usize..1200, 0..40),
        has_mark in any::<bool>(),
    ) {
        let mark = if has_mark { "\u{feff}" } else { "" };
        let (mut stream, mut fields, mut ends) = (mark.to_owned(), mark.to_owned(), Vec::new());
        for (n, (is_comment, line)) in lines.into_iter().enumerate() {
            if is_comment || line.starts_with(':') {
                stream += &format!(": comment {n}.");
                ends.push((stream.len(), format!(": comment {n}.")));
            } else {
                stream += &line;
                fields += &line;
                fields += nl;
            }
            stream += nl;
        }
        let (fields_passed, _) = follow(&fields, true, &[]);
        cuts.push(stream.len());
        cuts.sort_unstable();
        let mut reader = SseReader::new(true);
        let (mut out, mut from): (Vec<Bytes>, usize) = (Vec::new(), 0);
        for cut in cuts {
            let cut = cut.clamp(from, stream.len());
            reader.feed(&Bytes::copy_from_slice(&stream.as_bytes()[from..cut]), &mut out);
            from = cut;
            let passed = String::from_utf8_lossy(&out.concat()).into_owned();
            for (end, comment) in &ends {
                // The first byte of the line end completes the line.
                prop_assert!(*end >= cut || passed.contains(comment), "{comment} of {stream:?} at {cut}");
            }
        }
        reader.finish(&mut out);
        let passed = String::from_utf8(out.concat()).unwrap();
        let mut rest = passed.as_str();
        let mut without_comments = String::new();
        for (_, comment) in &ends {
            let at = rest.find(comment);
            prop_assert!(at.is_some(), "{comment} of {stream:?}");
            let (before, after) = rest.split_at(at.unwrap_or(0));
            without_comments += before;
            let after = &after[comment.len()..];
            rest = after.strip_prefix("\r\n").or(after.strip_prefix(['\r', '\n'])).unwrap_or(after);
        }
        prop_assert_eq!(without_comments + rest, fields_passed);
    }
}
