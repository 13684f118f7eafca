//! `GET /api/openapi.json`: real answers have the shape that it describes.

use super::{TOKEN, bearer, gateway, request, sign_in};
use crate::support::*;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

const KEY: &str = "authorization: Bearer sk-some-key-of-web-app\r\n";

/// Checks a value against a schema of the description. `Err`: the place and the fault.
fn validate(root: &Value, schema: &Value, value: &Value, place: &str) -> Result<(), String> {
    let schema = resolve(root, schema);
    if let Some(all) = schema.get("allOf").and_then(Value::as_array) {
        // The fields of several objects in one: each part ignores those of the others.
        let known: BTreeSet<String> = all.iter().flat_map(|part| property_names(root, part)).collect();
        let unknown = value.as_object().into_iter().flat_map(Map::keys).find(|name| !known.contains(*name));
        if let Some(unknown) = unknown {
            return Err(format!("{place}.{unknown} is not described"));
        }
        return all.iter().try_for_each(|part| {
            let names = property_names(root, part);
            let mut own = value.clone();
            if let Some(object) = own.as_object_mut() {
                object.retain(|name, _| names.contains(name));
            }
            validate(root, part, &own, place)
        });
    }
    for choice in ["oneOf", "anyOf"] {
        if let Some(choices) = schema.get(choice).and_then(Value::as_array) {
            let results: Vec<_> = choices.iter().map(|schema| validate(root, schema, value, place)).collect();
            return if results.iter().any(Result::is_ok) { Ok(()) } else { Err(format!("{results:?}")) };
        }
    }
    let types: Vec<&str> = match schema.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => return Ok(()),
    };
    if !types.iter().any(|name| has_type(value, name)) {
        return Err(format!("{place} is {value}, which is none of {types:?}"));
    }
    if let Some(minimum) = schema.get("minimum").and_then(Value::as_f64)
        && value.as_f64().is_some_and(|value| value < minimum)
    {
        return Err(format!("{place} is {value}, less than {minimum}"));
    }
    if let (Some(items), Some(list)) = (schema.get("items"), value.as_array()) {
        for (at, item) in list.iter().enumerate() {
            validate(root, items, item, &format!("{place}[{at}]"))?;
        }
    }
    validate_object(root, schema, value, place)
}

fn validate_object(root: &Value, schema: &Value, value: &Value, place: &str) -> Result<(), String> {
    let Some(object) = value.as_object() else { return Ok(()) };
    for name in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
        if !object.contains_key(name.as_str().unwrap()) {
            return Err(format!("{place} has no {name}"));
        }
    }
    let properties = schema.get("properties").and_then(Value::as_object);
    for (name, value) in object {
        let place = format!("{place}.{name}");
        let described = properties.and_then(|properties| properties.get(name));
        match described.or_else(|| schema.get("additionalProperties")) {
            Some(schema) => validate(root, schema, value, &place)?,
            None if properties.is_some() => return Err(format!("{place} is not described")),
            None => {}
        }
    }
    Ok(())
}

fn has_type(value: &Value, name: &str) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("the description has the type {other}"),
    }
}

fn resolve<'d>(root: &'d Value, schema: &'d Value) -> &'d Value {
    let Some(reference) = schema.get("$ref").and_then(Value::as_str) else { return schema };
    let found = root.pointer(reference.strip_prefix('#').unwrap());
    resolve(root, found.unwrap_or_else(|| panic!("{reference} leads nowhere")))
}

fn property_names(root: &Value, schema: &Value) -> BTreeSet<String> {
    let schema = resolve(root, schema);
    let parts = schema.get("allOf").and_then(Value::as_array).into_iter().flatten();
    let own =
        schema.get("properties").and_then(Value::as_object).into_iter().flat_map(|all| all.keys().cloned());
    own.chain(parts.flat_map(|part| property_names(root, part))).collect()
}

/// The operation of a request, by its method and target.
fn operation<'d>(root: &'d Value, method: &str, target: &str) -> (String, &'d Value) {
    let path = target.split('?').next().unwrap();
    let fits = |template: &str| {
        let (template, path): (Vec<_>, Vec<_>) = (template.split('/').collect(), path.split('/').collect());
        template.len() == path.len() && template.iter().zip(&path).all(|(t, p)| t == p || t.starts_with('{'))
    };
    let paths = root["paths"].as_object().unwrap();
    let exact = paths.get_key_value(path);
    let (template, item) = exact.or_else(|| paths.iter().find(|(template, _)| fits(template))).unwrap();
    (format!("{method} {template}"), &item[method.to_lowercase()])
}

fn check(root: &Value, method: &str, target: &str, reply: &Reply) -> String {
    let (name, operation) = operation(root, method, target);
    let described = &operation["responses"][reply.status.to_string()];
    assert!(described.is_object(), "{method} {target}: status {} is not described", reply.status);
    let content = &described["content"];
    let answer = reply.header("content-type").unwrap_or_default();
    if answer == "application/json" {
        let schema = &content["application/json"]["schema"];
        assert!(schema.is_object(), "{method} {target} {}: no schema", reply.status);
        let result = validate(root, schema, &reply.json(), "");
        assert_eq!(result, Ok(()), "{method} {target} {}", reply.status);
    } else if !reply.body.is_empty() && !answer.starts_with("text/csv") {
        let kind = answer.split(';').next().unwrap();
        assert!(
            content.get(kind).is_some() || content.is_null(),
            "{method} {target}: {kind} is not described"
        );
    }
    name
}

#[tokio::test]
async fn real_answers_of_every_request_have_the_described_shape() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 2)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, &folder).await;
    for _ in 0..3 {
        gateway.send("POST", CHAT, KEY, HELLO).await;
    }
    let root = request(&gateway, "GET", "/api/openapi.json", &bearer(TOKEN), "").await.json();
    let quota = "/api/environments/production/quotas/requests/day";
    let of_upstream = "/api/upstreams/u/quotas/requests/minute";
    let mut covered = BTreeSet::new();
    for (method, target, body) in [
        ("GET", "/", ""),
        ("GET", "/page/main.js", ""),
        ("GET", "/page/nothing", ""),
        ("GET", "/livez", ""),
        ("GET", "/readyz", ""),
        ("GET", "/metrics", ""),
        ("GET", "/api/environments", ""),
        ("GET", "/api/environments?sort=nothing", ""),
        ("GET", "/api/environments/production", ""),
        ("GET", "/api/environments/nowhere", ""),
        ("PUT", quota, r#"{"limit":5}"#),
        ("PUT", quota, "[]"),
        ("PUT", "/api/environments/production/quotas/requests/week", r#"{"limit":5}"#),
        ("PUT", "/api/environments/production/quotas/requests/day?dry_run=true", r#"{"limit":7}"#),
        ("GET", "/api/overrides", ""),
        ("PATCH", "/api/environments/production", r#"{"enforce":false}"#),
        ("PATCH", "/api/environments/production", "[]"),
        ("GET", "/api/overrides", ""),
        ("PATCH", "/api/environments/production", r#"{"enforce":null}"#),
        ("POST", "/api/environments/production/quotas/requests/day/reset", ""),
        ("DELETE", quota, ""),
        ("POST", "/api/environments/production/reset", ""),
        ("GET", "/api/upstreams", ""),
        ("GET", "/api/upstreams/u", ""),
        ("GET", "/api/upstreams/other", ""),
        ("PUT", of_upstream, r#"{"limit":50}"#),
        ("PUT", of_upstream, "[]"),
        ("PUT", "/api/upstreams/u/quotas/requests/minute?dry_run=true", r#"{"limit":50}"#),
        ("PUT", "/api/upstreams/u/quotas/requests/minute?model=none", r#"{"limit":50}"#),
        ("GET", "/api/overrides", ""),
        ("POST", "/api/upstreams/u/quotas/requests/minute/reset", ""),
        ("DELETE", of_upstream, ""),
        ("GET", "/api/audit", ""),
        ("GET", "/api/audit?limit=x", ""),
        ("GET", "/api/config", ""),
        ("POST", "/api/config/reload", ""),
        ("GET", "/api/log-level", ""),
        ("PUT", "/api/log-level", r#"{"level":null}"#),
        ("PUT", "/api/log-level", "[]"),
        ("GET", "/api/openapi.json", ""),
        ("GET", "/api/rejections", ""),
        ("GET", "/api/rejections?limit=x", ""),
        ("POST", "/api/session", &json!({ "token": TOKEN }).to_string()),
        ("POST", "/api/session", "{}"),
        ("GET", "/api/system", ""),
        ("GET", "/api/usage?group_by=model,caller", ""),
        ("GET", "/api/usage?format=csv", ""),
        ("GET", "/api/usage?step=0", ""),
        ("POST", "/api/explain?environment=production&caller=web", HELLO),
        ("POST", "/api/explain?environment=production&caller=web", "{"),
        ("POST", "/api/explain?environment=production", HELLO),
    ] {
        let reply = request(&gateway, method, target, &bearer(TOKEN), body).await;
        covered.insert(check(&root, method, target, &reply));
        if target.starts_with("/api") {
            let separator = if target.contains('?') { '&' } else { '?' };
            let target = format!("{target}{separator}unknown=1");
            let refused = request(&gateway, method, &target, &bearer(TOKEN), body).await;
            assert_eq!(refused.status, 400, "{method} {target}");
            check(&root, method, &target, &refused);
        }
        if target.starts_with("/api") && target != "/api/session" {
            let refused = request(&gateway, method, target, "", body).await;
            assert_eq!(refused.status, 401, "{method} {target}");
            check(&root, method, target, &refused);
        }
    }
    let (session, csrf) = sign_in(&gateway).await;
    let headers = format!("cookie: tollgate_session={session}\r\nx-tollgate-csrf: {csrf}\r\n");
    let ended = request(&gateway, "DELETE", "/api/session", &headers, "").await;
    covered.insert(check(&root, "DELETE", "/api/session", &ended));
    covered.insert(check_events(&root, &gateway).await);
    let described = root["paths"].as_object().unwrap().iter().flat_map(|(path, item)| {
        item.as_object().unwrap().keys().map(move |method| format!("{} {path}", method.to_uppercase()))
    });
    let missing: Vec<_> = described.filter(|name| !covered.contains(name)).collect();
    assert!(missing.is_empty(), "no request of this test covers {missing:?}");
}

/// The data of a snapshot and of an update have the described shape.
async fn check_events(root: &Value, gateway: &Gateway) -> String {
    let mut caller = Caller::connect(gateway.admin).await;
    let head = format!("GET /api/events HTTP/1.1\r\nhost: {}\r\n{}\r\n", gateway.admin, bearer(TOKEN));
    caller.send(head.as_bytes()).await;
    assert!(caller.head().await.contains("text/event-stream"));
    for schema in ["SnapshotEvent", "UpdateEvent"] {
        let event = String::from_utf8(caller.chunk().await.unwrap()).unwrap();
        let data = event.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
        let result =
            validate(root, &root["components"]["schemas"][schema], &serde_json::from_str(data).unwrap(), "");
        assert_eq!(result, Ok(()), "{schema} {data}");
        gateway.send("POST", CHAT, KEY, HELLO).await;
    }
    operation(root, "GET", "/api/events").0
}

#[test]
fn the_validator_finds_values_that_do_not_fit() {
    let root = json!({ "components": { "schemas": {
        "A": { "type": "object", "required": ["n"], "properties": { "n": { "type": "integer", "minimum": 0 } } },
        "B": { "allOf": [{ "$ref": "#/components/schemas/A" }, { "type": "object", "properties": { "s": { "type": ["string", "null"] } } }] },
    } } });
    let is_valid = |name: &str, value: Value| {
        validate(&root, &json!({ "$ref": format!("#/components/schemas/{name}") }), &value, "").is_ok()
    };
    for valid in [json!({ "n": 1 }), json!({ "n": 1, "s": null }), json!({ "n": 0, "s": "x" })] {
        assert!(is_valid("B", valid.clone()), "{valid}");
    }
    for wrong in [
        json!({}),
        json!({ "n": -1 }),
        json!({ "n": 0.5 }),
        json!({ "n": 1, "s": 2 }),
        json!({ "n": 1, "t": 2 }),
        json!([]),
    ] {
        assert!(!is_valid("B", wrong.clone()), "{wrong}");
    }
    assert!(!is_valid("A", json!({ "n": 1, "s": "x" })));
}
