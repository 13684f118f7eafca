//! `tollgate count`, and prompts that are expensive or impossible to count exactly.

use crate::support::*;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tollgate::api::Api;
use tollgate::body::{Body, BodyFault, BodyText};
use tollgate::estimate::{Models, PromptEstimate, PromptPart};

#[test]
fn count_prints_the_estimate_and_its_parts() {
    let (code, output, _) = run(&["count", "--explain"], HELLO);
    assert_eq!(code, 0);
    assert!(output.contains("prompt tokens  8") && output.contains("o200k_base"), "{output}");
    let (code, lines, _) = run(
        &["count", "--jsonl"],
        &format!("{HELLO}\nnot json\n{{\"model\":\"text-embedding-3-small\",\"input\":\"hello\"}}\n"),
    );
    let lines: Vec<serde_json::Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!((code, lines.len()), (0, 3));
    assert_eq!(
        (lines[0]["prompt_tokens"].as_u64(), lines[0]["parts"]["messages"].as_u64()),
        (Some(8), Some(2))
    );
    assert!(lines[1]["error"].is_string());
    assert_eq!(
        (lines[2]["prompt_tokens"].as_u64(), lines[2]["encoding"].as_str()),
        (Some(1), Some("cl100k_base"))
    );
    assert_eq!(run(&["count"], "[]").0, 1);
}

#[test]
fn count_detects_the_api_from_the_fields_of_a_body() {
    for (body, api) in [
        (HELLO, "chat"),
        (r#"{"model":"gpt-4o","prompt":"a"}"#, "completions"),
        (r#"{"model":"gpt-4o","input":"a"}"#, "responses"),
        (r#"{"model":"gpt-5","instructions":"b"}"#, "responses"),
        (r#"{"model":"text-embedding-3-small","input":"a"}"#, "embeddings"),
        (
            r#"{"model":"claude-haiku-4-5","max_tokens":9,"messages":[{"role":"user","content":"a"}]}"#,
            "messages",
        ),
        (r#"{"contents":[{"parts":[{"text":"a"}]}]}"#, "gemini"),
    ] {
        let (code, output, errors) = run(&["count", "--explain"], body);
        assert_eq!(code, 0, "{errors}");
        assert!(output.contains(&format!("api            {api}\n")), "{body}: {output}");
    }
}

#[test]
fn count_takes_the_provider_from_the_command_line_or_the_config() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("t.yaml");
    let config = |others: &str| {
        format!(
            "upstreams: {{ a: {{ base_url: 'https://us-central1-aiplatform.googleapis.com/v1' }}{others} }}\n\
             environments: {{ e: {{ upstream: a, quotas: {{ requests: {{ limit: 99, per: minute }} }} }} }}\n"
        )
    };
    let explained = |more: &[&str]| {
        let fixed = ["count", "--explain", "--config", file.to_str().unwrap()];
        let (code, output, errors) = run(&[&fixed, more].concat(), HELLO);
        assert_eq!(code, 0, "{errors}");
        output.lines().find_map(|line| line.strip_prefix("provider ")).unwrap().trim().to_owned()
    };
    std::fs::write(&file, config("")).unwrap();
    assert_eq!(explained(&[]), "vertex");
    assert_eq!(explained(&["--provider", "ai-studio"]), "ai-studio");
    std::fs::write(&file, config(", b: { base_url: 'https://api.openai.com/v1' }")).unwrap();
    assert_eq!(explained(&[]), "unknown");
    assert_eq!(run(&["count", "--provider", "nobody"], HELLO).0, 2);
}

#[test]
fn figures_of_the_config_replace_those_of_the_table() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("t.yaml");
    std::fs::write(
        &file,
        "upstreams: { u: { base_url: 'http://u/v1' } }\n\
         environments: { e: { upstream: u, quotas: { requests: { limit: 1, per: day } } } }\n\
         models: [{ match: mine, model: gpt-4o, overhead: 100, tool_factor: 1.5 }, { match: 'gpt-4o*', overhead: 0 }]\n",
    )
    .unwrap();
    let tools = r#","tools":[{"type":"function","function":{"name":"look","description":"Looks around."}}]}"#;
    let with_tools = format!("{}{tools}", &HELLO[..HELLO.len() - 1]);
    let count = |body: &str| {
        let output = run(&["count", "--explain", "--config", file.to_str().unwrap()], body).1;
        let of = |name: &str| {
            let line = output.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_default();
            line.rsplit(' ').next().unwrap_or_default().parse::<u64>().unwrap_or(u64::MAX)
        };
        (of("overhead"), of("tools"), output.clone())
    };
    // One message: 3 tokens, and 3 for the request, which the rule replaces.
    let (plain, plain_tools, _) = count(&with_tools.replace("gpt-4o", "openai/gpt-4o"));
    let (none, ..) = count(HELLO);
    let (mine, mine_tools, explained) = count(&with_tools.replace("gpt-4o", "mine"));
    assert_eq!((plain, none, mine), (6, 3, 103));
    assert_eq!(mine_tools, (plain_tools * 3).div_ceil(2));
    assert!(
        explained.contains("overhead       100 tokens per request besides the messages, set in the config\n")
    );
    assert!(explained.contains("tool factor    1.500, set in the config\n"), "{explained}");
}

/// `count` reads the calibrations from the store, even while a gateway uses the same store.
#[tokio::test(flavor = "multi_thread")]
async fn count_shows_the_calibrations_of_the_gateway() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::always(Answer::chat(HELLO_TOKENS + 40, 2)).await;
    let file = folder.path().join("t.yaml");
    let text = format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ backend: {{ base_url: 'http://{}/v1' }} }}\n\
         environments: {{ e: {{ upstream: backend, quotas: {{ requests: {{ limit: 99, per: minute }} }} }} }}\ndefault_environment: e\n\
         models: [{{ match: mine, encoding: cl100k_base }}]\nstore: {{ path: '{}' }}\n",
        upstream.address,
        folder.path().join("tollgate.db").display()
    );
    std::fs::write(&file, &text).unwrap();
    let explain = || run(&["count", "--explain", "--config", file.to_str().unwrap()], HELLO).1;
    assert!(explain().contains("there is no answer for this model and kind yet"), "{}", explain());
    let gateway = Gateway::from_config(&text).await;
    for _ in 0..5 {
        assert_eq!(gateway.chat(HELLO).await.status, 200);
    }
    soon("the calibration to be stored", async {
        while !explain().contains("corrected      48 for upstream backend, from its last") {
            gateway.chat(HELLO).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    gateway.shutdown().await;
    assert!(explain().contains("prompt tokens  8\n"), "{}", explain());
    let mine = HELLO.replace("gpt-4o", "mine");
    let (_, output, _) = run(&["count", "--config", file.to_str().unwrap()], &mine);
    assert!(output.contains("cl100k_base"), "{output}");
    assert_eq!(run(&["count", "--config", "no/such.yaml"], HELLO).0, 2);
    assert!(run(&["count", "--explain"], HELLO).1.contains("with --config FILE"));
}

fn read(api: Api, json: &str) -> Result<PromptEstimate, BodyFault> {
    let started = Instant::now();
    let text = BodyText::of(json.as_bytes());
    let body = text.as_ref().map_err(Clone::clone).and_then(|text| Body::read(api, text));
    let estimate = body.map(|body| {
        let model = Models::default().named(body.model.as_deref().unwrap_or("gpt-4o"));
        body.prompt.estimate(&model)
    });
    // The bound allows for a debug build on a busy machine.
    assert!(started.elapsed() < Duration::from_secs(20), "{api:?}: {json:.80}");
    estimate
}

fn user(content: &Value) -> String {
    json!({"model": "gpt-4o", "messages": [{"role": "user", "content": content}]}).to_string()
}

#[test]
fn broken_images_and_files_are_counted_by_default_sizes() {
    let image = |url: &str| user(&json!([{"type": "image_url", "image_url": {"url": url}}]));
    let default_size = read(Api::Chat, &image("https://example.com/a.png")).unwrap().of(PromptPart::Images);
    assert_eq!(default_size, 425, "640 by 480 pixels");
    for url in [
        "data:image/png;base64,!!!!",
        "data:image/png;base64,",
        "data:,",
        "data:image/png",
        "",
        "data:image/png;base64,iVBORw0KGgo",
    ] {
        assert_eq!(read(Api::Chat, &image(url)).unwrap().of(PromptPart::Images), default_size, "{url}");
    }
    // The header claims an enormous size. The image counts as the largest image that the API accepts.
    let huge = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUv////////8IAgAAAA==";
    assert!((85..=10_000).contains(&read(Api::Chat, &image(huge)).unwrap().of(PromptPart::Images)));
    for data in ["data:application/pdf;base64,JVBERi0=", "data:application/pdf;base64,%%%", "JVBERi0xLjQK"] {
        let file = user(&json!([{"type": "file", "file": {"filename": "a.pdf", "file_data": data}}]));
        assert!(read(Api::Chat, &file).unwrap().tokens() > 100, "{data}");
    }
    let sound =
        user(&json!([{"type": "input_audio", "input_audio": {"data": "UklGRgAAAAA=", "format": "wav"}}]));
    assert!((7..5_000).contains(&read(Api::Chat, &sound).unwrap().tokens()));
}

#[test]
fn cyclic_and_exploding_schemas_are_counted_in_bounded_time() {
    let with = |schema: &Value| {
        json!({"model": "gpt-4o", "messages": [{"role": "user", "content": "a"}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}})
        .to_string()
    };
    let cyclic = json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/t"}},
        "$defs": {"t": {"type": "object", "properties": {"b": {"$ref": "#/$defs/t"}, "c": {"$ref": "#/$defs/u"}}}, "u": {"$ref": "#/$defs/u"}}});
    assert!((20..400).contains(&read(Api::Chat, &with(&cyclic)).unwrap().tokens()));
    // Each of 60 levels refers 200 times to the next one.
    let many: serde_json::Map<String, Value> = (0..60)
        .map(|n| {
            (format!("t{n}"), json!({"anyOf": vec![json!({"$ref": format!("#/$defs/t{}", n + 1)}); 200]}))
        })
        .collect();
    let exploding = json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/t0"}}, "$defs": many});
    let body = with(&exploding);
    assert!(read(Api::Chat, &body).unwrap().tokens() < 5 * body.len() as u64);
    // One large definition, repeated by `required`, by lists of types and by references.
    let large: serde_json::Map<String, Value> =
        (0..400).map(|n| (format!("p{n}"), json!({"type": "string"}))).collect();
    let names: Vec<String> = (0..400).map(|n| format!("p{n}")).collect();
    let again = json!({"type": "object", "required": names, "properties": large,
        "$defs": {"a": {"type": vec!["object"; 2_000], "properties": large}}});
    let unions = json!({"type": "object", "properties": {"a": {"anyOf": vec![json!({"$ref": "#/$defs/a"}); 2_000]}},
        "$defs": {"a": {"type": vec!["object"; 500], "properties": large, "required": names}}});
    for schema in [&again, &unions] {
        let body = with(schema);
        assert!(read(Api::Chat, &body).unwrap().tokens() < 6 * body.len() as u64);
    }
    let mut deep = json!({"type": "string"});
    for _ in 0..40 {
        deep = json!({"type": "object", "properties": {"a": deep}});
    }
    assert!((40..2_000).contains(&read(Api::Chat, &with(&deep)).unwrap().tokens()));
    let nested = format!("{}1{}", "{\"items\":".repeat(1_000), "}".repeat(1_000));
    let refused = read(Api::Chat, &with(&json!("X")).replace("\"X\"", &nested)).unwrap_err();
    assert!(refused.to_string().contains("128"), "{refused}");
}

/// A small PDF can decompress to an enormous text, and a request can carry many of these files.
#[test]
fn the_text_decompressed_from_files_is_bounded_per_request() {
    use base64::Engine as _;
    use std::io::Write as _;
    let mut deflated = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    deflated.write_all(format!("BT {} ET", "(aa) Tj 0 1 Td ".repeat(1 << 18)).as_bytes()).unwrap();
    let head =
        b"%PDF-1.4\n3 0 obj <</Type /Page /Contents 4 0 R>> endobj 4 0 obj <</Filter /FlateDecode>> stream\n";
    let pdf = [head.as_slice(), &deflated.finish().unwrap(), b"\nendstream endobj\n"].concat();
    let data = base64::engine::general_purpose::STANDARD.encode(pdf);
    let tokens = |files: usize| {
        let part = json!({"type": "file", "file": {"filename": "a.pdf", "file_data": format!("data:application/pdf;base64,{data}")}});
        read(Api::Chat, &user(&json!(vec![part; files]))).unwrap().tokens()
    };
    let (one, many) = (tokens(1), tokens(500));
    assert!((20_000..200_000).contains(&one), "{one}");
    assert!(many < 500 * 2_000 + 100 * one, "{many} for 500 files, {one} for one");
}

#[test]
fn fields_that_are_null_have_no_content() {
    let text = json!({"type": "text", "text": "hi"});
    let dumped = json!({"type": "text", "text": "hi", "image_url": null, "input_audio": null, "file": null,
        "file_data": null, "file_id": null, "filename": null, "detail": null, "video_url": null});
    let tokens = |part: &Value| read(Api::Chat, &user(&json!([part]))).unwrap();
    assert_eq!(tokens(&text), tokens(&dumped));
}

#[test]
fn sound_counts_the_same_in_every_shape() {
    let sound = "UklGRiQAAABXQVZFZm10IBAAAAABAAEAQB8AAIA+AAACABAAZGF0YQAA".to_owned() + &"A".repeat(40_000);
    let of = |model: &str, audio: Value| {
        let messages = json!([{"role": "user", "content": [{"type": "input_audio", "input_audio": audio}]}]);
        read(Api::Chat, &json!({"model": model, "messages": messages}).to_string()).unwrap().tokens()
    };
    let object = json!({"data": sound, "format": "wav"});
    for model in ["gpt-4o-audio", "voxtral-small", "google/gemini-2.5-flash"] {
        assert_eq!(of(model, object.clone()), of(model, json!(sound)), "{model}");
        assert_eq!(
            of(model, object.clone()),
            of(model, json!(format!("data:audio/wav;base64,{sound}"))),
            "{model}"
        );
    }
    // Two seconds: of 30 begun ones.
    assert!((375..390).contains(&of("voxtral-small", object)));
    assert!(
        of("gpt-4o-audio", json!("https://example.com/a.mp3")) > 500,
        "a minute, if the length is unknown"
    );
}

#[test]
fn any_number_of_messages_and_fields_of_any_type_are_counted_or_rejected() {
    let many = json!({"model": "gpt-4o", "messages": vec![json!({"role": "user", "content": "a"}); 100_000]});
    assert_eq!(read(Api::Chat, &many.to_string()).unwrap().tokens(), 3 + 5 * 100_000);
    let many = json!({"model": "text-embedding-3-small", "input": vec!["a"; 300_000]});
    assert!(read(Api::Embeddings, &many.to_string()).unwrap().tokens() >= 131_072);
    for odd in [
        "5",
        "-1.5e300",
        "true",
        "null",
        "[]",
        "{}",
        "[[[]]]",
        "[null]",
        "[5]",
        "{\"type\":5}",
        "[{\"type\":\"text\",\"text\":5}]",
    ] {
        for (api, body) in [
            (
                Api::Chat,
                format!(
                    r#"{{"model":"gpt-4o","messages":[{{"role":{odd},"content":{odd},"name":{odd},"tool_calls":{odd}}}]}}"#
                ),
            ),
            (
                Api::Chat,
                format!(
                    r#"{{"model":"gpt-4o","messages":{odd},"tools":{odd},"response_format":{odd},"tool_choice":{odd}}}"#
                ),
            ),
            (Api::Completions, format!(r#"{{"model":"gpt-4o","prompt":{odd},"suffix":{odd}}}"#)),
            (Api::Embeddings, format!(r#"{{"model":"gpt-4o","input":{odd}}}"#)),
            (
                Api::Responses,
                format!(
                    r#"{{"model":"gpt-4o","input":{odd},"instructions":{odd},"text":{odd},"reasoning":{odd}}}"#
                ),
            ),
            (
                Api::Messages,
                format!(
                    r#"{{"model":"claude-3","system":{odd},"messages":{odd},"tools":{odd},"thinking":{odd}}}"#
                ),
            ),
            (
                Api::Gemini,
                format!(
                    r#"{{"contents":{odd},"systemInstruction":{odd},"tools":{odd},"generationConfig":{odd}}}"#
                ),
            ),
        ] {
            if let Ok(estimate) = read(api, &body) {
                assert!(estimate.tokens() < 5_000, "{body}: {}", estimate.tokens());
            }
        }
    }
}

#[test]
fn half_a_surrogate_pair_counts_as_a_replacement_character() {
    let tokens = |text| read(Api::Chat, &user(&json!("X")).replace('X', text)).unwrap().tokens();
    for half in [r"\ud800", r"\udfff", r"\uDBFF"] {
        assert_eq!(tokens(half), tokens(r"\ufffd"), "{half}");
    }
    assert_eq!(tokens(r"\ud800\u0041"), tokens(r"\ufffdA"));
    assert_eq!(tokens(r"\ud83d\ude00"), 8);
}
