use super::*;
use crate::body::{Body, BodyText};
use crate::estimate::{Models, Provider};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::hash::Hasher as _;

const MODEL: &str = "gpt-4o";
const ONE: EstimateScope = EstimateScope { upstream: 0, principal: 1 };

fn learned() -> Learned {
    Learned::new(Calibrations::new(["a", "b"]))
}

fn chat(messages: &[String], settings: Value) -> String {
    let messages: Vec<Value> = messages
        .iter()
        .enumerate()
        .map(|(at, text)| {
            let role = if at % 2 == 0 { "user" } else { "assistant" };
            json!({"role": role, "content": text})
        })
        .collect();
    let mut body = settings;
    body["messages"] = json!(messages);
    body.to_string()
}

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

/// Estimates a chat and, with a reported number, learns from it. Returns the corrected and the counted tokens.
fn ask(learned: &Learned, scope: EstimateScope, body: &str, reported: Option<u64>) -> (CorrectedPrompt, u64) {
    let text = BodyText::of(body.as_bytes()).unwrap();
    let mut read = Body::read(Api::Chat, &text).unwrap();
    let recall = learned.recall(scope, Api::Chat, MODEL, &mut read.prompt);
    let estimate = read.prompt.estimate(&Models::default().named(MODEL));
    let corrected = learned.correct(&recall, MODEL, &estimate);
    if let Some(prompt) = reported {
        learned.learn(&recall, MODEL, &estimate, ReportedAnswer { prompt, ..Default::default() });
    }
    (corrected, estimate.tokens())
}

#[test]
fn a_known_prefix_counts_only_for_its_principal_upstream_settings_and_messages() {
    let (first, second) = (texts(&["hello"]), texts(&["hello", "Hi", "How are you?"]));
    let all = learned();
    let (_, counted) = ask(&all, ONE, &chat(&first, json!({})), Some(50));
    let body = chat(&second, json!({}));
    let (corrected, more) = ask(&all, ONE, &body, None);
    assert_eq!((corrected.tokens, corrected.source), (50 + more - counted, EstimateSource::Conversation));
    let others = [
        (EstimateScope { principal: 2, ..ONE }, body.clone()),
        (EstimateScope { upstream: 1, ..ONE }, body.clone()),
        (ONE, chat(&second, json!({"tools": [{"type": "function", "function": {"name": "f"}}]}))),
        (ONE, chat(&second, json!({"reasoning_effort": "none"}))),
        (ONE, chat(&texts(&["hallo", "Hi", "How are you?"]), json!({}))),
    ];
    for (scope, body) in others {
        let (corrected, counted) = ask(&all, scope, &body, None);
        assert_eq!(
            (corrected.tokens, corrected.source),
            (counted, EstimateSource::Rules),
            "{scope:?} {body}"
        );
    }
    // Another process has another key.
    assert_eq!(ask(&learned(), ONE, &body, None).0.source, EstimateSource::Rules);
}

#[test]
fn the_longest_known_prefix_counts() {
    let all = learned();
    ask(&all, ONE, &chat(&texts(&["a"]), json!({})), Some(10));
    let (_, counted) = ask(&all, ONE, &chat(&texts(&["a", "b", "c"]), json!({})), Some(40));
    let (corrected, more) = ask(&all, ONE, &chat(&texts(&["a", "b", "c", "d", "e"]), json!({})), None);
    assert_eq!(corrected.tokens, 40 + more - counted);
    let (corrected, _) = ask(&all, ONE, &chat(&texts(&["a", "b", "c"]), json!({})), None);
    assert_eq!(corrected.tokens, 40);
}

#[test]
fn completions_and_embeddings_have_neither_conversations_nor_set_ups() {
    let all = learned();
    for (api, body) in [
        (Api::Completions, r#"{"model":"gpt-4o","prompt":"hello","suffix":"you"}"#),
        (Api::Embeddings, r#"{"model":"gpt-4o","input":["hello"]}"#),
    ] {
        let text = BodyText::of(body.as_bytes()).unwrap();
        let recall = all.recall(ONE, api, MODEL, &mut Body::read(api, &text).unwrap().prompt);
        assert_eq!((recall.whole_key, recall.setup_key), (None, None), "{api:?}");
    }
}

#[test]
fn a_repeated_answer_counts_as_reported_if_it_is_recognised() {
    let prefix = |completion: u32| ReportedPrefix {
        reported: 0,
        estimated: 0,
        message_texts: 0,
        completion,
        reasoning: 0,
    };
    for (completion, counted, correction) in
        [(100, 90, 10), (100, 110, -10), (100, 74, 0), (100, 126, 0), (60, 59, 0), (0, 0, 0), (100, 0, 0)]
    {
        assert_eq!(prefix(completion).echo_correction(counted), correction, "{completion} {counted}");
    }
}

#[test]
fn repeated_reasoning_counts_as_reported_if_the_model_reads_it_and_it_is_recognised() {
    let correction = |reasoning: u32, echo_thinking: u64, recalls_reasoning: bool| {
        let prefix = ReportedPrefix { reported: 0, estimated: 0, message_texts: 0, completion: 0, reasoning };
        let mut estimate = PromptEstimate::default();
        (estimate.echo_thinking, estimate.recalls_reasoning) = (echo_thinking, recalls_reasoning);
        prefix.reasoning_correction(&estimate)
    };
    for (reasoning, counted, right) in
        [(100, 60, 40), (100, 140, -40), (100, 40, 0), (100, 160, 0), (100, 0, 0), (0, 50, 0), (128, 130, 0)]
    {
        assert_eq!(correction(reasoning, counted, false), right, "{reasoning} {counted}");
    }
    assert_eq!([correction(100, 0, true), correction(100, 10, true)], [100, 90]);
}

#[test]
fn reasoning_that_the_provider_keeps_counts_with_the_results_of_the_calls_it_led_to() {
    let user = |text: &str| json!({"role": "user", "content": text});
    let call = json!({"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}});
    let turn = [
        json!({"role": "assistant", "tool_calls": [call]}),
        json!({"role": "tool", "tool_call_id": "c", "content": "ok"}),
    ];
    let added = |model: &str, service: Provider, more: &[Value]| {
        let all = learned();
        let rules = Models::default().named(model).at(service);
        let estimate = |messages: Vec<Value>, answer: Option<ReportedAnswer>| {
            let body = json!({"messages": messages}).to_string();
            let text = BodyText::of(body.as_bytes()).unwrap();
            let mut read = Body::read(Api::Chat, &text).unwrap();
            let recall = all.recall(ONE, Api::Chat, model, &mut read.prompt);
            let estimate = read.prompt.estimate(&rules);
            if let Some(answer) = answer {
                let answer = ReportedAnswer { prompt: estimate.tokens(), ..answer };
                all.learn(&recall, model, &estimate, answer);
            }
            all.correct(&recall, model, &estimate).tokens - estimate.tokens()
        };
        estimate(vec![user("Look.")], Some(ReportedAnswer { prompt: 0, completion: 20, reasoning: 300 }));
        estimate([&[user("Look.")], more].concat(), None)
    };
    let asked = [&turn[..], &[user("And?")]].concat();
    assert_eq!(added("grok-4-fast", Provider::Unknown, &turn), 300);
    assert_eq!(added("grok-4-fast", Provider::Unknown, &asked), 0, "a new message of the user");
    assert_eq!(added("grok-4-fast", Provider::Router, &turn), 0);
    assert_eq!(added("grok-3-mini", Provider::Unknown, &turn), 0);
    let answer = [json!({"role": "assistant", "content": "No."})];
    assert_eq!(added("grok-4-fast", Provider::Unknown, &answer), 0, "no calls");
}

#[test]
fn an_offset_applies_in_full_once_two_answers_agree_and_not_if_it_changes() {
    let offset = |answers: &[(u64, u64)]| {
        let all = answers
            .iter()
            .fold(None, |all, &(counted, reported)| Some(SetupOffset::after(all, counted, reported)));
        all.unwrap()
    };
    assert_eq!(
        offset(&[(100, 140)]).apply(100, 110),
        Some(125),
        "half of the way from the calibrated estimate"
    );
    assert_eq!(offset(&[(100, 140), (120, 162)]).apply(100, 110), Some(142));
    assert_eq!(offset(&[(100, 140), (120, 190)]).apply(100, 110), None, "the offset changes");
    assert_eq!(offset(&[(900, 940), (900, 940)]).apply(100, 110), None, "a far larger prompt");
    assert_eq!(offset(&[(100, 9), (100, 9)]).apply(100, 110), Some(25), "at least a quarter");
    let largest = offset(&[(0, u64::MAX), (0, u64::MAX)]);
    assert_eq!((largest.last, largest.apply(100, 100)), (i32::MAX, None));
}

/// The last requests of many conversations are known after all of them have had ten turns at the same time.
#[test]
fn the_last_requests_of_a_hundred_thousand_conversations_fit() {
    let table = BoundedTable::new(MAX_ENTRIES);
    let key = |conversation: u64, turn: u64| {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(conversation << 8 | turn);
        hasher.finish()
    };
    for turn in 0..10 {
        (0..100_000).for_each(|conversation| table.update(key(conversation, turn), |_| [7; 5]));
    }
    let known = (0..100_000).filter(|&conversation| table.get(key(conversation, 9)).is_some()).count();
    assert!(known > 99_000, "{known}");
}

proptest! {
    #[test]
    fn any_order_of_requests_gives_estimates_within_bounds_that_do_not_depend_on_other_principals(
        requests in prop::collection::vec((0..3u64, 1..6usize, 0..3usize, prop::option::of(0..u64::MAX)), 1..30),
    ) {
        let words = ["hello", "what is the time?", "a longer text that is not in any cache"];
        let (shared, alone) = (learned(), learned());
        for (principal, length, word, reported) in requests {
            let messages: Vec<String> = (0..length).map(|at| words[(at * word + at) % 3].to_owned()).collect();
            let body = chat(&messages, json!({}));
            // All principals share the calibrations of an upstream.
            let reported = reported.map(|n| n >> (n % 60));
            let scope = EstimateScope { upstream: usize::from(principal != 0), principal };
            let (corrected, counted) = ask(&shared, scope, &body, reported);
            prop_assert!((counted / 4..=counted * 4 + 2_048).contains(&corrected.tokens));
            if principal == 0 {
                prop_assert_eq!(ask(&alone, scope, &body, reported), (corrected, counted));
            }
        }
    }

    #[test]
    fn the_estimate_of_a_continued_conversation_adds_up(
        messages in prop::collection::vec("[a-z ]{0,40}", 2..9),
        cut in 1..8usize,
        error in 0..100u64,
    ) {
        let cut = cut.min(messages.len() - 1);
        let all = learned();
        let (_, counted) = ask(&all, ONE, &chat(&messages[..cut], json!({})), None);
        ask(&all, ONE, &chat(&messages[..cut], json!({})), Some(counted + error));
        let whole = chat(&messages, json!({}));
        let (corrected, after) = ask(&all, ONE, &whole, None);
        let (plain, from_scratch) = ask(&learned(), ONE, &whole, None);
        prop_assert_eq!(after, from_scratch);
        prop_assert_eq!(corrected.tokens, plain.tokens + error);
    }
}

/// A chat with images by URL, and a question.
fn with_images(urls: &[&str], question: &str) -> Value {
    let image = |url: &&str| json!({"type": "image_url", "image_url": {"url": url}});
    let mut content: Vec<Value> = urls.iter().map(image).collect();
    content.push(json!({"type": "text", "text": question}));
    json!({"role": "user", "content": content})
}

#[test]
fn an_image_by_url_costs_what_its_first_answer_reported() {
    let all = learned();
    let send = |scope: EstimateScope, messages: Value, more: Option<i64>| {
        let body = json!({ "messages": messages }).to_string();
        let (_, counted) = ask(&learned(), scope, &body, None);
        let reported = more.map(|more| counted.checked_add_signed(more).unwrap());
        ask(&all, scope, &body, reported).0.tokens.cast_signed() - counted.cast_signed()
    };
    let (map, photo) = ("https://example.com/map.png", "https://example.com/photo.png");
    let asks = |urls: &[&str], question: &str| json!([with_images(urls, question)]);
    assert_eq!(send(ONE, asks(&[map], "What is it?"), Some(700)), 0, "unknown");
    assert_eq!(send(ONE, asks(&[map], "Which city is on the map?"), None), 700);
    assert_eq!(send(ONE, asks(&[map, map], "Are they the same?"), None), 1_400);
    let other = EstimateScope { principal: 2, ..ONE };
    assert_eq!(send(other, asks(&[map], "Which city is on the map?"), None), 0, "another caller");
    assert_eq!(send(ONE, asks(&["https://example.com/map.png?v=2"], "And this?"), None), 0, "another URL");
    // The rest of a report belongs to the unknown image, which can cost less than assumed.
    assert_eq!(send(ONE, asks(&[map, photo], "Compare them, please."), Some(600)), 700);
    assert_eq!(send(ONE, asks(&[photo], "Who is it?"), None), -100);
    // The report on the first request of a conversation includes its images.
    let first = with_images(&[map], "What is it?");
    let turn = |urls: &[&str]| json!([first, {"role": "assistant", "content": "Ulm"}, with_images(urls, "And this one?")]);
    assert_eq!(send(ONE, turn(&[]), None), 700);
    assert_eq!(send(ONE, turn(&[photo]), None), 600);
}

#[test]
fn several_unknown_images_share_what_their_prompt_cost_more() {
    let all = learned();
    let urls = ["https://example.com/a.png", "https://example.com/b.png"];
    let body = |urls: &[&str], question: &str| json!({"messages": [with_images(urls, question)]}).to_string();
    let (_, counted) = ask(&all, ONE, &body(&urls, "Compare them."), None);
    ask(&all, ONE, &body(&urls, "Compare them."), Some(counted + 500));
    let (corrected, counted) = ask(&all, ONE, &body(&urls[..1], "Look."), None);
    assert_eq!(corrected.tokens, counted + 250);
    // A report that is far too high has a bounded effect.
    let far = body(&["https://example.com/c.png"], "Look.");
    ask(&all, ONE, &far, Some(1 << 40));
    let (corrected, counted) = ask(&all, ONE, &body(&["https://example.com/c.png"], "And now?"), None);
    assert!(corrected.tokens <= 4 * (counted + 65_536) + 2_048, "{corrected:?}");
}
