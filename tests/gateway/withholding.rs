//! The usage chunk that the gateway requests where the caller did not, and withholds from the caller.

use crate::support::*;
use proptest::prelude::*;
use std::io::Write as _;

const LARGE_QUOTAS: &str = "{ requests: { limit: 1000000, per: minute } }";
const COMPLETIONS: &str = "/v1/completions";

fn completion(fields: &str) -> String {
    format!(r#"{{{fields},"model":"gpt-3.5-turbo-instruct","prompt":"hello"}}"#)
}

#[tokio::test]
async fn usage_is_requested_and_withheld_in_streams_of_completions() {
    let text = |t: &str| {
        format!(
            "data: {{\"id\":\"c\",\"object\":\"text_completion\",\"choices\":[{{\"index\":0,\"text\":\"{t}\"}}],\"usage\":null}}\n\n"
        )
    };
    let events = [text("Hel"), text("lo"), usage_event(1, 2), DONE.to_owned()];
    let upstream = Upstream::always(Answer::stream().events(&events).end()).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let reply = gateway.post(COMPLETIONS, &completion(r#""stream":true"#)).await;
    assert_eq!(reply.text(), [&events[..2], &events[3..]].concat().concat());
    assert!(upstream.only().text().contains(r#""stream_options":{"include_usage":true}"#));
    let with_usage_request = completion(r#""stream":true,"stream_options":{"include_usage":true}"#);
    assert_eq!(gateway.post(COMPLETIONS, &with_usage_request).await.text(), events.concat());
    assert_eq!(gateway.settled_charges().await, [2, 2, 4, 6]);
}

#[tokio::test]
async fn a_compressed_answer_passes_unchanged() {
    let events = [delta("Hi"), usage_event(8, 1), DONE.to_owned()].concat();
    let json = chat_answer(&usage(8, 1));
    for (kind, text) in [("text/event-stream", &events), ("application/json", &json)] {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(text.as_bytes()).unwrap();
        let compressed = gzip.finish().unwrap();
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-encoding: gzip\r\ncontent-length: {}\r\n\r\n",
            compressed.len()
        );
        let answer = Answer::of(vec![Step::Send([head.as_bytes(), &compressed].concat())]);
        let upstream = Upstream::always(answer).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "accept-encoding: gzip\r\n", hello(r#""stream":true"#).as_bytes()).await;
        let reply = caller.reply().await;
        assert_eq!(reply.body, compressed, "{kind}");
        assert_eq!(reply.header("content-encoding"), Some("gzip"));
        assert_eq!(reply.header("content-length"), Some(&*compressed.len().to_string()));
        assert_eq!(upstream.only().header("accept-encoding"), Some("identity"));
        assert_eq!(gateway.settled_charges().await[0], 1);
    }
}

/// LiteLLM sends usage in an event with a choice that carries nothing.
#[tokio::test]
async fn usage_beside_an_empty_choice_is_withheld_unless_the_caller_requested_it() {
    let chunk = |choice: &str| format!("data: {{\"id\":\"c\",\"choices\":[{choice}]}}\n\n");
    let usage_of =
        |choice: &str| format!("data: {{\"id\":\"c\",\"choices\":[{choice}],\"usage\":{}}}\n\n", usage(9, 2));
    for (path, begin, end, empty) in [
        (
            CHAT,
            r#"{"index":0,"delta":{"content":"Hi"}}"#,
            r#"{"index":0,"delta":{},"finish_reason":"stop"}"#,
            r#"{"index":0,"delta":{}}"#,
        ),
        (
            COMPLETIONS,
            r#"{"index":0,"text":"Hi"}"#,
            r#"{"index":0,"text":"","finish_reason":"stop"}"#,
            r#"{"index":0,"text":""}"#,
        ),
    ] {
        let whole = [chunk(begin), chunk(end), usage_of(empty), DONE.to_owned()];
        let unfinished = [chunk(begin), usage_of(empty), chunk(end), DONE.to_owned()];
        let other_choice = [chunk(begin), chunk(end), usage_of(&empty.replace('0', "1")), DONE.to_owned()];
        for (events, withheld) in [(whole, Some(2)), (unfinished, None), (other_choice, None)] {
            let text = events.concat();
            for answer in [
                Answer::stream().events(&events).end(),
                text.bytes()
                    .fold(Answer::stream(), |answer, byte| answer.event(&char::from(byte).to_string()))
                    .end(),
            ] {
                let upstream = Upstream::always(answer).await;
                let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
                for (options, is_requested) in
                    [("", false), (r#","stream_options":{"include_usage":true}"#, true)]
                {
                    let fields = format!(r#""stream":true{options}"#);
                    let body = if path == CHAT { hello(&fields) } else { completion(&fields) };
                    let expected = match withheld {
                        Some(at) if !is_requested => text.replace(&events[at], ""),
                        _ => text.clone(),
                    };
                    assert_eq!(gateway.post(path, &body).await.text(), expected, "{path} {options}");
                }
                assert_eq!(gateway.settled_charges().await, [2, 18, 4, 22]);
            }
        }
    }
}

#[tokio::test]
async fn a_comment_line_passes_before_the_rest_of_its_event_arrives() {
    for end in ["\n", "\r\n", "\r"] {
        let comment = format!(": ping{end}");
        let extra = usage_event(8, 1).replace('\n', end);
        for (before, after, withheld) in
            [("", delta("Hi"), ""), ("", format!("id: 7{end}{extra}"), "rest"), ("id: 7\n", extra, "rest")]
        {
            let answer = Answer::stream()
                .event(&format!("{before}: pi"))
                .event(&comment[4..])
                .then(Step::Gate)
                .event(&after)
                .event(DONE)
                .end();
            let upstream = Upstream::always(answer).await;
            let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
            let mut caller = gateway.caller().await;
            caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
            caller.head().await;
            let mut received = Vec::new();
            while received.len() < comment.len() {
                received.extend(caller.chunk().await.unwrap());
            }
            assert_eq!(String::from_utf8(received).unwrap(), comment, "{before}");
            upstream.open_gate();
            let mut rest = Vec::new();
            while let Some(chunk) = caller.chunk().await.filter(|chunk| !chunk.is_empty()) {
                rest.extend(chunk);
            }
            let expected = if withheld.is_empty() { after + DONE } else { DONE.to_owned() };
            assert_eq!(String::from_utf8(rest).unwrap(), expected, "{before}");
        }
    }
}

/// The lines of an event, and whether it is a usage chunk.
fn event() -> impl Strategy<Value = (Vec<String>, bool)> {
    let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
    let report = r#""usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}"#;
    let extra = [
        lines(&[&format!(r#"data: {{"id":"c","choices":[],{report}}}"#)]),
        lines(&[&format!(r#"data:{{ {report} , "choices" : [ ] }}"#)]),
        lines(&[": of it", "id: 7", &format!(r#"data: {{"choices":[],{report}}}"#), "retry: 9"]),
        lines(&["id: 7", ": of it", &format!(r#"data: {{"choices":[],{report}}}"#), ": too"]),
        lines(&[r#"data: {"choices":[],"#, &format!("data: {report}}}")]),
        lines(&["event: usage", &format!(r#"data: {{"note":"\"choices\":[{{","choices":[],{report}}}"#)]),
    ];
    let other = [
        lines(&[r#"data: {"id":"c","choices":[{"index":0,"delta":{"content":"Hi"}}],"usage":null}"#]),
        lines(&[&format!(r#"data: {{"choices":[{{"index":0,"delta":{{}}}}],{report}}}"#)]),
        // Azure's first event.
        lines(&[r#"data: {"choices":[],"prompt_filter_results":[{"prompt_index":0}]}"#]),
        lines(&[r#"data: {"choices":[],"usage":null}"#]),
        lines(&[&format!("data: {{{report}}}")]),
        lines(&[r#"data: {"choices":[{"delta":{"content":"\"choices\":[],\"usage\":{}"}}]}"#]),
        lines(&[&format!(r#": {{"choices":[],{report}}}"#)]),
        lines(&["data: [DONE]"]),
        lines(&[": ping"]),
        lines(&["data"]),
        lines(&["data: é\u{1f600}"]),
    ];
    prop_oneof![
        1 => proptest::sample::select(extra.to_vec()).prop_map(|e| (e, true)),
        3 => proptest::sample::select(other.to_vec()).prop_map(|e| (e, false)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]
    #[test]
    fn the_caller_receives_all_bytes_except_the_usage_chunk(
        events in prop::collection::vec((event(), prop_oneof![Just("\n"), Just("\r\n"), Just("\r")]), 0..12),
        cuts in prop::collection::vec(0usize..1500, 0..8),
        framing in prop_oneof![Just(Framing::Chunks), Just(Framing::UntilClosed)],
        is_slow in any::<bool>(),
        of_chat in any::<bool>(),
    ) {
        let text = |withheld: bool| -> String {
            let expected = events.iter().map(|((lines, is_extra), end)| {
                if withheld && *is_extra {
                    lines.iter().filter(|line| line.starts_with(':')).map(|line| format!("{line}{end}")).collect::<Vec<_>>().concat()
                } else {
                    lines.join(end) + end + end
                }
            });
            expected.collect()
        };
        let all_events = text(false);
        let answer = framed(200, &of_type("text/event-stream"), all_events.as_bytes(), framing, cuts);
        let slowly = |step| [step, Step::Wait(std::time::Duration::from_micros(300))];
        let steps = answer.steps();
        let answer = Answer::of(if is_slow { steps.into_iter().flat_map(slowly).collect() } else { steps });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let upstream = Upstream::always(answer).await;
            let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
            for (options, withholds) in [
                ("", true),
                (r#","stream_options":{"include_usage":false}"#, true),
                (r#","stream_options":{"include_usage":true}"#, false),
            ] {
                let fields = format!(r#""stream":true{options}"#);
                let reply = if of_chat {
                    gateway.chat(&hello(&fields)).await
                } else {
                    gateway.post(COMPLETIONS, &completion(&fields)).await
                };
                assert_eq!(reply.text(), text(withholds), "{options}");
                assert!(!reply.is_incomplete);
            }
            gateway.settled().await;
        });
    }
}
